"""Names of layers and tensors, which differ between files and releases of transformers."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import takewhile


class Names:
    """Names of tensors, that are found by the names that other releases and other files have for them.

    Files may lack the prefix that a model has (gpt2's), have another one (models of texts and images in transformers 4 and 5),
    or have ``_orig_mod.`` in them (a compiled model's).

    Args:
        known: the names.

    Example:
        >>> names = Names(["h.0.attn.weight", "h.1.attn.weight", "vision.h.0.attn.weight"])
        >>> names.find("transformer.h.1.attn.weight"), names.find("transformer.h.2.attn.weight")
        ('h.1.attn.weight', None)
    """

    def __init__(self, known: Collection[str]) -> None:
        self.known = known
        self.by_end: dict[tuple[str, ...], list[str]] = {}
        for name in known:
            self.by_end.setdefault(_key(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The known name of the same tensor: the one with the longest common end, and then the most common parts."""
        if name in self.known:
            return name

        def score(known: str) -> tuple[int, int]:
            mine, theirs = name.split("."), known.split(".")
            end = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(mine), reversed(theirs), strict=False))
            return len(list(end)), (Counter(mine) & Counter(theirs)).total()

        scored = sorted(((score(known), known) for known in self.by_end.get(_key(name), ())), reverse=True)
        is_found = scored and scored[0][0][0] >= 2 and (len(scored) == 1 or scored[0][0] > scored[1][0])
        return scored[0][1] if is_found else None


def _key(name: str) -> tuple[str, ...]:
    """What all names of a tensor share: its last two parts, and its numbers."""
    parts = name.split(".")
    return (*parts[-2:], *filter(str.isdigit, parts))


def matched(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """For names, those by which other files know the same tensors; names without one are left out."""
    found = Names(known)
    return {name: other for name in names if (other := found.find(name)) is not None}
