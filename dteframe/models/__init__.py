"""Built-in models, one file each."""
