"""The `edgelora` script, and `python -m edgelora` for checkouts."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130 also while it is still being imported."""
    try:
        from edgelora.cli import cli

        cli(prog_name="edgelora")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
