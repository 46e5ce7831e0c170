"""``python -m cola_lightning`` and the console script ``cola``."""

import os
import sys
import warnings


def entry_point() -> None:
    """Runs the command line; what it imports takes seconds, in which Ctrl-C is as good as later."""
    sys.path.insert(0, os.getcwd())  # a user's own modules lie where the user is
    # Lightning's own use of torch's tree utilities: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    try:
        from cola_lightning.cli import main

        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
