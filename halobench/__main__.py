"""`python -m halobench`: the command line."""

from halobench.cli import main

if __name__ == "__main__":
    main()
