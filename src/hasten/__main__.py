"""``python -m hasten``: the same as the installed command ``hasten``."""

from hasten.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
