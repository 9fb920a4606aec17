"""Built-in replay, one file each."""
