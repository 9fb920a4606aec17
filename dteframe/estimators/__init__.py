"""Built-in estimators, one file each."""
