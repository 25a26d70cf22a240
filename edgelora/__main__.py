"""`python -m edgelora`, for checkouts; users run the `edgelora` command."""

from edgelora.cli import main

main()
