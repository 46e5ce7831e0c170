"""``cola compare`` in tests: its command, runs that take no time, and the part of a config that a method reads."""

import copy
from pathlib import Path

from cola_lightning.cli import main
from cola_lightning.cli.made_run import resolve
from cola_lightning.study.results import Result
from tests.helpers.toy import DIGITS


def config(chain=None, rank=4, **trainer):
    whens = dict.fromkeys(("every_n_epochs", "every_n_train_steps", "at_epochs", "at_steps", "ranks", "alphas"))
    return {
        "model": {"init_args": {"rank": rank, "alpha": 8.0}},
        "chain": whens | (chain or {}),
        "trainer": {"max_epochs": None, "max_steps": -1} | trainer,
    }


def made_up(config, folder, metric, key):
    """In the place of a run: it takes no time, and its metric follows from its options."""
    n_links = 1 + len(config["chain"]["at_epochs"] or ())
    value = key.learning_rate + key.seed / 1000 + (n_links - 1) / 10
    facts = {"steps": 10, "seconds": 1.0, "trainable_parameters": 5, "rank": 1, "links": n_links}
    return Result(**key._asdict(), **facts, curve=[[5, 2 * value], [10, value]], validation=value, test=value)


KNOWN = {}


def known_config(*words):
    """As ``resolve``, which takes a fifth of a second, once for the same options and contents of files."""
    given = tuple(Path(word).read_text() if word.endswith(".yaml") else word for word in words)
    if given not in KNOWN:
        KNOWN[given] = resolve(words)
    return copy.deepcopy(KNOWN[given])


def compare(folder, *words, methods="[lora, cola-2]", seeds=2, fit=()):
    given = ["--config", DIGITS, "--output", str(folder), "--methods", methods, "--seeds", str(seeds), *words]
    return main(["compare", *given, *(["--", *fit] if fit else ())])
