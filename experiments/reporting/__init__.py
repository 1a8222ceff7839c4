"""What a run says of itself: its result, its page, tables and pictures for trackers."""
