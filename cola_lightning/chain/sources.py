"""Several sources of links, such as adapters that were trained one after the other, as one chain."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from cola_lightning.chain.chain import Chain, Link
from cola_lightning.chain.schedule import is_stage_name
from cola_lightning.errors import UserError


class Source(NamedTuple):
    """Where links come from.

    Attributes:
        path: a checkpoint, a run's folder, a chain folder or the folder of a PEFT LoRA.
        name: the stage that its links belong to; None: the names that they have.
    """

    path: str
    name: str | None = None

    @classmethod
    def of(cls, text: str | Path) -> Self:
        """A source as it is typed.

        Example:
            >>> Source.of("sft=out/sft"), Source.of("runs/rate=1e-4")
            (Source(path='out/sft', name='sft'), Source(path='runs/rate=1e-4', name=None))
        """
        name, equals, path = str(text).partition("=")
        is_named = equals and "/" not in name and is_stage_name(name) and not os.path.exists(text)
        return cls(path, name) if is_named else cls(str(text))

    def __str__(self) -> str:
        """The source as it is typed."""
        return self.path if self.name is None else f"{self.name}={self.path}"


def sources_of(given: str | Path | Sequence[str | Path | Source]) -> list[Source]:
    """One source or several, as a user gives them."""
    several = [given] if isinstance(given, str | Path) else given
    return [one if isinstance(one, Source) else Source.of(one) for one in several]


def join(chains: Sequence[tuple[Source, Chain]], continues: Collection[str] = (), field: str = "checkpoint") -> Chain:
    """The links of several chains, one chain after the other, on the base of the first.

    A beginning that a chain shares with those before it is there once. What a stage trained besides its links (a new head)
    stays until a later stage replaces it.

    Args:
        chains: the chains and their sources.
        continues: the names of sources in which the adapter of the source before went on. Such an adapter contains the earlier
            one, which becomes a record: the next link contains it.
        field: the sources' name in messages.

    Raises:
        UserError: for chains that have only some links in common, and for names that no source has.
    """
    if unknown := set(continues) - {source.name for source, _ in chains[1:]}:
        raise UserError(f"continues: there is no source {min(unknown)!r} after the first one. Name it: {min(unknown)}=PATH")
    links: list[Link] = []
    for source, chain in chains:
        mine = [link if source.name is None else replace(link, name=source.name) for link in chain.links]
        pairs = zip(links, mine, strict=False)
        same = [ours.at_end().is_same_update(theirs.at_end()) for ours, theirs in pairs]
        n_shared = (*same, False).index(False)
        if 0 < n_shared < min(len(links), len(mine)):
            raise UserError(f"{field}: {source.path!r} and what is before it have the same {n_shared} links, and then others")
        if source.name in continues and source.name is not None:
            if not links or not mine or links[-1].factors.keys() != mine[0].factors.keys():
                raise UserError(f"continues: {source.path!r} has not the layers of the adapter before it, so it is another one")
            links[-1] = replace(links[-1], share=0.0)
        if n_shared == len(links):  # of the longer chain, which knows what became of them
            links = [replace(theirs, name=ours.name) for ours, theirs in zip(links, mine, strict=False)]
        carried = links[-1].extras if links else {}
        new = [replace(link, extras=carried | link.extras) for link in mine[n_shared:]]
        links += [replace(link, index=index) for index, link in enumerate(new, len(links))]
    return Chain(links, chains[0][1].base)
