"""Built-in objectives, one file each."""
