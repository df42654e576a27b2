"""`python -m glade` is the program `glade`."""

from glade.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
