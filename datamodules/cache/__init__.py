"""The image cache: decoded images in one memory-mapped file, read by `store`, written by `build`."""
