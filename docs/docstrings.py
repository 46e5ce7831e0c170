"""An extension of griffe: what it reads of the package's docstrings in another form."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod):`~?(?:[\w.]+\.)?(\w+)`")  # of Sphinx
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # Google's style guide says `Examples:`, and griffe only that
SOURCE = re.compile(r"^( *)(Source|Shape): (?=\S)", re.MULTILINE)  # griffe would cut it into a title and a text


class Docstrings(griffe.Extension):
    """Shows the name alone where a docstring has a role of Sphinx, and doctests as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that is loaded."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", ROLE.sub(r"``\1``", obj.docstring.value))
            obj.docstring.value = SOURCE.sub(r"\1**\2:** ", text)
