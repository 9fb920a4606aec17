"""Built-in trackers, one file each."""
