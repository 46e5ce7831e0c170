"""Several sources of links, such as adapters that were trained one after the other, as one chain."""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from cola_lightning.chain.chain import Chain, Link
from cola_lightning.chain.peft import CONFIG_NAME, read_config
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


def with_names(sources: Sequence[Source]) -> list[Source]:
    """The sources, with its folder's name for each adapter without a name; or its path, where another source has that name."""
    names = [Path(source.path).expanduser().resolve().name if source.name is None else source.name for source in sources]
    return [
        source._replace(name=name if names.count(name) == 1 else source.path)
        if source.name is None and _is_adapter(source)
        else source
        for source, name in zip(sources, names, strict=True)
    ]


def _is_adapter(source: Source) -> bool:
    return (Path(source.path).expanduser() / CONFIG_NAME).is_file()


def configs_of(sources: Sequence[Source]) -> dict[str | None, dict[str, Any]]:
    """The configurations of the sources that are PEFT adapters, by their names."""
    return {source.name: read_config(Path(source.path).expanduser()) for source in sources if _is_adapter(source)}


def notes_on_base(sources: Sequence[Source], base: str) -> list[str]:
    """A line for each adapter whose configuration names another model than this base.

    A copy of a model, or one in 4 bits, counts as that model if its name has the same end.
    """
    notes, what = list[str](), "both are one model"
    for name, config in configs_of(sources).items():
        named = config.get("base_model_name_or_path")
        if named and _end_of_name(named) != _end_of_name(base):
            notes.append(f"{name} names the base {named!r}, and not {base!r}: it fits only if {what}")
        what = "the first is a merge of the adapters before it, or both are one model"
    return notes


def _end_of_name(model: str) -> str:
    """The last part of a model's name or path, without its revision and what unsloth adds to a copy in 4 bits.

    Example:
        >>> _end_of_name("unsloth/Qwen3-0.6B-unsloth-bnb-4bit"), _end_of_name("hub/models--Qwen--Qwen3-0.6B/snapshots/c1899d/")
        ('qwen3-0.6b', 'qwen3-0.6b')
    """
    parts = os.path.normpath(model.partition("@")[0]).split("/")
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return re.sub(r"([-_](unsloth|bnb|4-?bit|nf4))+$", "", (cached or parts)[-1].lower())


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
    base = chains[0][1].base
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
        if n_shared and not base.weight_norms:  # of a run that began from what is before it
            base = chain.base
        carried = links[-1].extras if links else {}
        new = [replace(link, extras=carried | link.extras) for link in mine[n_shared:]]
        links += [replace(link, index=index) for index, link in enumerate(new, len(links))]
    return Chain(links, base)
