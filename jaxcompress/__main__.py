"""The program `jaxcompress`, also `python -m jaxcompress`."""

from __future__ import annotations

import sys

from jaxcompress._extras import MissingExtra, extra


def main() -> int:
    """Runs one command; returns the exit code."""
    try:
        with extra("cli"):
            from jaxcompress import cli
    except MissingExtra as error:
        print(f"jaxcompress: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
