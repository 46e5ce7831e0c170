"""A command line and its configuration files, before jsonargparse reads them."""

import io
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from cola_lightning.chain.schedule import KNOT_OPTIONS, ChainSchedule
from cola_lightning.errors import UserError, one_line

CLASSES = {"model": "cola_lightning.COLACausalLM", "data": "cola_lightning.TextDataModule"}  # where none is named
DATA_OF_MODEL = {  # likewise, for a model that only one data module fits
    "COLAPreferenceLM": "cola_lightning.PreferenceDataModule",
    "COLASequenceClassifier": "cola_lightning.TextClassificationDataModule",
    "COLAImageClassifier": "cola_lightning.ImageDataModule",
}
CLASS_OPTION = re.compile(
    r"\A--(?P<group>model|data)\.(?!(?:help|class_path|init_args|dict_kwargs)\b)(?P<name>\w+)(?:=(?P<value>.*))?\Z", re.DOTALL
)
WHEN_OPTIONS = (*KNOT_OPTIONS, "until", "monitor", "min_delta", "mode")  # which say when knots fall


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments.

    Example:
        >>> as_words({"model.rank": 4, "chain.at_steps": None})
        ['--model.rank', '4', '--chain.at_steps', 'null']
    """
    values = ((name, value if isinstance(value, str) else json.dumps(value)) for name, value in options.items())
    return [word for name, value in values for word in (f"--{name}", value)]


def as_texts(words: Sequence[str]) -> list[str]:
    """A command line whose options of ``model`` and ``data`` are texts: ``--data.init_args={"prompt": "a: b"}``.

    jsonargparse reads ``--data.prompt 'a: b'`` as YAML before it knows the option's type, and again for that type: a text that
    is a mapping, a list or nothing in YAML is lost. A text inside ``init_args`` is read for its type alone.

    Example:
        >>> as_texts(["fit", "--data.prompt", "a: b", "--model.rank=2", "--chain.ranks", "[2]"])
        ['fit', '--data.init_args={"prompt": "a: b"}', '--model.init_args={"rank": "2"}', '--chain.ranks', '[2]']
    """
    joined: list[str] = []
    for word in words:
        last = CLASS_OPTION.fullmatch(joined[-1]) if joined else None
        if last and last["value"] is None and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [CLASS_OPTION.sub(_inside_init_args, word) for word in joined]


def completed(words: Sequence[str]) -> list[str]:
    """A command line with the classes that it does not name, and whose knots replace those of the files before them.

    The data module is the only one that fits the model, or TextDataModule. Knots replace others whatever option these have:
    else every other option of a file would have to be set to null. Options that are typed together are not replaced: two that
    contradict each other are refused.

    Example:
        >>> completed(["fit", "--config", "configs/paper.yaml", "--chain.knots", "4"])[1:3]
        ['--model=cola_lightning.COLACausalLM', '--data=cola_lightning.TextDataModule']
        >>> completed(["fit", "--config", "configs/paper.yaml", "--chain.knots", "4"])[3:]
        ['--config', 'configs/paper.yaml', '--chain.at_epochs=null', '--chain.knots', '4']
    """
    defaults = {option.name: option.default for option in fields(ChainSchedule) if option.name in WHEN_OPTIONS}
    sources = list[tuple[int, dict[str, Any]]]()  # of options: where each begins among the words, and what it sets of `chain`
    model, is_after_file = "", True
    for place, (word, following) in enumerate(itertools.pairwise([*words, ""])):
        if not word.startswith("-"):
            continue
        option, has_value, value = word.partition("=")
        value = value if has_value else following.removeprefix("--")
        groups = read_groups(value) if (is_file := option in ("--config", "-c")) else {}
        if is_file or is_after_file:
            sources.append((place, dict(groups.get("chain", {}))))
        if option.startswith("--chain."):
            sources[-1][1][option.removeprefix("--chain.")] = None if value == "null" else value
        typed = value if option in ("--model", "--model.class_path") else model
        model, is_after_file = str(groups.get("model", {}).get("class_path", typed)), is_file
    classes = [f"--model={CLASSES['model']}", f"--data={DATA_OF_MODEL.get(model.rpartition('.')[2], CLASSES['data'])}"]
    having_knots = [k for k, (_, options) in enumerate(sources) if any(options.get(name) for name in KNOT_OPTIONS)]
    last = having_knots[-1] if having_knots else 0
    place, mine = sources[last] if having_knots else (1, {})
    earlier = {name for _, options in sources[:last] for name in options if name in defaults and name not in mine}
    resets = [f"--chain.{name}={json.dumps(defaults[name])}" for name in defaults if name in earlier]
    return [words[0], *classes, *words[1:place], *resets, *words[place:]]  # classes first: typed ones replace them


def read_groups(path: str) -> dict[str, dict[str, Any]]:
    """The groups of options in a configuration file or text; none where it cannot be read, which jsonargparse says.

    Raises:
        UserError: for mistakes of which jsonargparse's message names neither the file nor the place.
    """
    try:
        with io.StringIO(path) if path.startswith("{") else open(os.path.expanduser(path), encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise UserError(f"config: {path} is not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"config: {one_line(str(error))}") from error
    except (OSError, ValueError):
        return {}
    groups = {name: group for name, group in config.items() if isinstance(group, dict)} if isinstance(config, dict) else {}
    for name in CLASSES:
        keys = groups.get(name, {}).keys()
        if {"class_path", "init_args"} & keys and (others := keys - {"class_path", "init_args", "dict_kwargs"}):
            raise UserError(f"config: {path}: {min(others)!r} belongs under {name}.init_args")
    return groups


def _inside_init_args(option: re.Match[str]) -> str:
    if option["value"] is None:  # jsonargparse would name the group alone
        raise UserError(f"{option['group']}.{option['name']}: a value must follow")
    text = yaml.safe_dump({option["name"]: option["value"]}, default_style='"', default_flow_style=True, width=sys.maxsize)
    return f"--{option['group']}.init_args={text.strip()}"
