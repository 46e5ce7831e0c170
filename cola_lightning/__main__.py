"""``python -m cola_lightning`` and the console script ``cola``."""

import io
import os
import sys
import warnings


def entry_point() -> None:
    """Runs the command line; what it imports takes seconds, in which Ctrl-C is as good as later."""
    sys.path.insert(0, os.getcwd())  # a user's own modules lie where the user is
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # a generated text has any character
    # Lightning's own use of torch's tree utilities: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    try:
        from cola_lightning.cli import main

        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as in `cola generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
