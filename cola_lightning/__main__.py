"""``python -m cola_lightning`` and the console script ``cola``."""

import io
import logging
import os
import sys
import warnings


def entry_point() -> None:
    """Runs the command line; what it imports takes seconds, in which Ctrl-C is as good as later."""
    sys.path.append(os.getcwd())  # a user's own modules lie where the user is; they are not taken for a library's
    if not sys.stderr.isatty():  # bars of other libraries, such as one for each file of a model, would fill a log
        os.environ.setdefault("TQDM_DISABLE", "1")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # a generated text has any character
    # Lightning's own use of torch's tree utilities: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    # Lightning's advice for short runs, whose interval is then a tenth of the run.
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    # Its log lines that say nothing about the run.
    noise = ("💡 Tip:", "TPU available:", "HPU available:")
    lightnings = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightnings.addFilter(lambda record: not record.getMessage().startswith(noise))
    try:
        from cola_lightning.cli import main

        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
