"""What each kind of plugin promises: one module per kind, one small function per promise."""
