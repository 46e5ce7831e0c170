"""What the result of a run depends on: its options, and the contents of the files that it reads."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import import_object  # type: ignore[attr-defined]

from cola_lightning.data.reading import hash_of_file
from cola_lightning.data.source import SourceDataModule, contents_of
from cola_lightning.pretrained import PACKAGE_PREFIX, package_folder

# The groups of options that are arguments of one class.
GROUPS = {"chain": "cola_lightning.ChainOfLoRA", "trainer": "lightning.pytorch.Trainer"}
# Options that change no result, but how fast it is there, and what is shown and written meanwhile.
NO_MATTER = {f"data.{name}" for name in ("num_workers", "num_proc", "pin_memory", "persistent_workers", "prefetch_factor")}
NO_MATTER |= {f"trainer.enable_{name}" for name in ("progress_bar", "model_summary", "checkpointing")}
NO_MATTER |= {f"trainer.{name}" for name in ("logger", "log_every_n_steps", "default_root_dir", "profiler", "barebones")}
NO_MATTER |= {"last", "config", "contents", "ckpt_path", "weights_only", "model.activation_checkpointing"}
DEVICES = {f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy")}

Change = tuple[str, Any, Any]  # an option's name, its value now, and its value before


def facts_of(config: Mapping[str, Any], data: Any, **more: Any) -> dict[str, Any]:
    """What the result of a run depends on: its configuration, and ``contents``, hashes of what its files contain.

    Args:
        config: the run's complete configuration.
        data: its data module.
        **more: what else it depends on, by name.
    """
    contents = dict[str, Any]()
    for group in ("model", "data"):
        for name, value in (config[group].get("init_args") or {}).items():  # any text may be a path
            if (found := with_contents(value)) != value:
                contents[f"{group}.{name}"] = found
    if isinstance(data, SourceDataModule):  # which knows what else it reads, such as the files that match a pattern
        sources = data.identity.get("sources", [data.identity])
        contents["data.source"] = [
            [contents_of(one), {name: value for name, value in one.items() if name not in ("source", "files", "folder")}]
            for one in sources
        ]
    return {**config, "contents": json.loads(json.dumps(contents)), **more}


def changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    """What of the facts of a run has changed, so that its result may be another one.

    The spelling of a path is no change if its contents are known on both sides, and neither is an option that only one of two
    versions of this package has, at its default.

    Args:
        mine: the :func:`facts_of` a run.
        theirs: those of an earlier run.
    """
    here, there = mine["contents"], theirs.get("contents") or {}
    for change in option_changes(mine, theirs):
        if not (change[0] in here and change[0] in there) and change[0] not in DEVICES:
            yield change
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            yield f"what {name} contains", here[name], there[name]


def option_changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    """The options that have changed, also if they name the same files, or are those of the devices."""
    here, there = (dict(one for group in mine for one in _options(facts.get(group), group)) for facts in (mine, theirs))
    for option, value in here.items():
        name, owner, argument = option
        before = there[option] if option in there else _defaults(owner).get(argument) if owner else None
        if value != before:
            yield name, value, before


def _options(value: Any, name: str, owner: str = "", argument: str = "") -> Iterator[tuple[tuple[str, str, str], Any]]:
    """The options in a value: the name of each, the class whose argument it is, the argument's name there, and its value.

    An option that is a class has its arguments as options.
    """
    if name in NO_MATTER:
        return
    if isinstance(value, Mapping) and ("class_path" in value or name in GROUPS):
        owner_below = value.get("class_path") or GROUPS[name]
        if "class_path" in value:
            yield (name, owner, argument), owner_below
            value = (value.get("init_args") or {}) | {"dict_kwargs": value.get("dict_kwargs") or None}
        for below, one in value.items():
            yield from _options(one, f"{name}.{below}", owner_below, below)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        yield (name, owner, argument), len(value)
        for place, one in enumerate(value):
            yield from _options(one, f"{name}[{place}]")
    else:
        yield (name, owner, argument), value


@functools.cache
def _defaults(class_path: str) -> dict[str, Any]:
    """The defaults of a class' arguments, as a configuration has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(import_object(class_path), fail_untyped=False)
    text = parser.dump(parser.get_defaults(skip_validation=True), skip_none=False, skip_validation=True)
    return dict(yaml.safe_load(text) or {})


def with_contents(value: Any) -> Any:
    """A value in which each text that is the path of a file, or of a folder, is replaced by a hash of its contents."""
    if isinstance(value, Mapping):
        return {name: with_contents(one) for name, one in value.items()}
    if isinstance(value, list):
        return [with_contents(one) for one in value]
    if not isinstance(value, str) or not value:
        return value
    path = package_folder(value) if value.startswith(PACKAGE_PREFIX) else Path(os.path.expanduser(value))
    if os.path.isfile(path):
        return hash_of_file(path)
    if not os.path.isdir(path):
        return value
    last = path / "checkpoints" / "last.ckpt"  # of a run's folder, in which anything else may be written
    files = [last] if last.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    known = [(str(file.relative_to(path)), hash_of_file(file)) for file in files if "__pycache__" not in file.parts]
    return hashlib.sha256(repr(known).encode()).hexdigest()
