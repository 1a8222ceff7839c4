"""From a config to a Trainer: checks, forecast, run directory, ranks, training."""
