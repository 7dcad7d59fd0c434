"""`python -m palate`, for where the command is not on the path."""

from palate.cli import main

if __name__ == "__main__":
    main()
