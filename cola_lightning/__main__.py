"""``python -m cola_lightning``: the ``cola`` command."""

from cola_lightning.cli import entry_point

if __name__ == "__main__":
    entry_point()
