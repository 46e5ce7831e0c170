"""The ``cola`` command."""

from cola_lightning.cli.entry import main

__all__ = ["main"]
