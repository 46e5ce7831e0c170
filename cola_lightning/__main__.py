"""``python -m cola_lightning`` and the console script ``cola``."""

import io
import logging
import os
import select
import sys
import warnings
from typing import TextIO


def entry_point() -> None:
    """Runs the command line; what it imports takes seconds, in which Ctrl-C is as good as later."""
    sys.path.append(os.getcwd())  # a user's own modules lie where the user is; they are not taken for a library's
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
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):  # it is another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _has_no_reader(output: TextIO | None) -> bool:
    """Whether an output is a pipe whose reader has ended, as of ``cola generate ... | head``."""
    if output is None:
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    entry_point()
