"""From files to batches: class folders, decoding, samplers, loader workers."""
