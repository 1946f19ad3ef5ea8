"""Entry point of `python -m pruning`."""

from pruning.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
