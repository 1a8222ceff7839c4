"""The picture cache: decoded pictures in one memory-mapped file, read by `store`, written by `build`."""
