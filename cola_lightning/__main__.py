"""``python -m cola_lightning`` and the console script ``cola``."""

import os
import sys


def entry_point() -> None:
    """Runs the command line; what it imports takes seconds, in which Ctrl-C is as good as later."""
    sys.path.insert(0, os.getcwd())  # a user's own modules lie where the user is
    try:
        from cola_lightning.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    entry_point()
