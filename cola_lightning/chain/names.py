"""Names of layers and tensors, which differ between files and releases of transformers."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import takewhile


def matched(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For names of tensors, those by which other files know them: the longest common end, and then the most common parts.

    Files may lack the prefix that a model has (gpt2's), have another one (models of texts and images in transformers 4 and 5),
    or have ``_orig_mod.`` in them (a compiled model's). Names without a known one are left out.

    Example:
        >>> matched(["transformer.h.1.weight", "transformer.h.2.weight"], ["h.0.weight", "h.1.weight", "vision.h.0.weight"])
        {'transformer.h.1.weight': 'h.1.weight'}
    """
    by_end, found = defaultdict[tuple[str, ...], list[str]](list), dict[str, str]()
    for name in known:
        by_end[_key(name)].append(name)
    for name in names:
        others = by_end.get(_key(name), [])
        if name in others:
            found[name] = name
        elif others:
            likeness = {other: _likeness(name, other) for other in others}
            best = max(others, key=likeness.__getitem__)
            if likeness[best][0] >= 2 and list(likeness.values()).count(likeness[best]) == 1:
                found[name] = best
    return found


def _key(name: str) -> tuple[str, ...]:
    """What all names of a tensor share: its last two parts, and its numbers."""
    parts = name.split(".")
    return (*parts[-2:], *filter(str.isdigit, parts))


def _likeness(name: str, known: str) -> tuple[int, int]:
    """How many parts two names have in common at their ends, and at all."""
    mine, theirs = name.split("."), known.split(".")
    end = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(mine), reversed(theirs), strict=False))
    return len(list(end)), (Counter(mine) & Counter(theirs)).total()
