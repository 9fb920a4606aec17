"""Let ``python -m dteframe`` do what ``dteframe`` does."""

from dteframe.cli import main

if __name__ == "__main__":
    main()
