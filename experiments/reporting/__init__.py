"""Reports of a run: its result, its page, tables and images for trackers."""
