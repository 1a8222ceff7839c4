"""What is learned and how it is scored: losses, distillation losses, metrics, target encoding."""
