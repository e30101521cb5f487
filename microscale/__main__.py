"""`python -m microscale` is the command `microscale`."""

from microscale.cli import main

if __name__ == "__main__":
    main()
