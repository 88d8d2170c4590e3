"""``python -m softcurve`` is the command line."""

from softcurve.cli.main import main

if __name__ == "__main__":
    main()
