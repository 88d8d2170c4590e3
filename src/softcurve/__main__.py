"""``python -m softcurve`` is the command line."""

from softcurve.app.cli import main

if __name__ == "__main__":
    main()
