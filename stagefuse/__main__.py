"""`python -m stagefuse`, and the console script."""

import sys


def main() -> None:
    """Run the command line; an interruption while it is imported ends like any other."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
