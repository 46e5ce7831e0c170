"""The config that a study's runs share: resolved, overridden by options, and saved beside the results."""

import contextlib
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cola_lightning.callbacks import RunWatch
from cola_lightning.cli.training import COLACLI
from cola_lightning.errors import UserError


def resolved(words: Sequence[str]) -> dict[str, Any]:
    """The complete configuration of ``cola fit`` with these arguments, including defaults; nothing is instantiated.

    Raises:
        UserError: for arguments that ``cola fit`` would refuse when it parses them; likewise jsonargparse's ArgumentError.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        COLACLI(["fit", *words, "--print_config"], RunWatch())
    try:
        config = yaml.safe_load(printed.getvalue())
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        received = f"{shlex.join(words)!r}, which prints something else than a run's config"
        raise UserError(f"cola fit: expected options of a run, received {received}")
    return config


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments.

    Example:
        >>> as_words({"model.rank": 4, "chain.at_steps": None})
        ['--model.rank', '4', '--chain.at_steps', 'null']
    """
    values = ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items())
    return [word for name, value in values for word in (f"--{name}", value)]


def as_text(config: Mapping[str, Any]) -> str:
    """What a study's runs share, as YAML: all but the seed."""
    shared = {name: value for name, value in config.items() if name != "seed_everything"}
    text: str = yaml.safe_dump(shared, sort_keys=False)
    return text


def is_of_study(text: bytes) -> bool:
    """Whether a file's text is a study's configuration, which has more than a run's."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(config, dict) and {"also_seeded", "metric", "mode"} <= config.keys()


def check_same(config: str, known: str, where: str) -> None:
    """Refuses another config than that of the finished runs, which would not be comparable.

    Args:
        config: this command's, by :func:`as_text`.
        known: theirs.
        where: where it was found, for the message.

    Raises:
        UserError: if they differ.
    """
    for name, mine, theirs in _differences(yaml.safe_load(config), yaml.safe_load(known)):
        raise UserError(
            f"config: expected {name}: {theirs!r}, as in {where}, received {mine!r}; a different study needs another output "
            "and, in a shared storage, another study_name"
        )


def _differences(mine: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The options of ``theirs`` with another value in ``mine``; an option introduced since then has its default.

    A switch that no longer exists was off, if it is not to differ. Arguments of a class that it does not name, its
    ``dict_kwargs``, have no default: they differ if one side has none.
    """
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping) and theirs:
        for key in [*theirs, *({"dict_kwargs"} & mine.keys() - theirs.keys())]:
            if key in mine or theirs[key] is not False:
                yield from _differences(mine.get(key), theirs.get(key), f"{name}.{key}".removeprefix("."))
    elif mine != theirs:
        yield name, mine, theirs
