"""`python -m hawada` is the command `hawada`."""

from hawada.cli import main

if __name__ == "__main__":
    main()
