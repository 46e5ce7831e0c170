"""The methods, each defined by the options of ``cola fit`` that turn a config into it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from cola_lightning.chain.schedule import START, ChainSchedule, RunLength
from cola_lightning.errors import UserError, nearest
from cola_lightning.lora.config import LoRAConfig

Config = Mapping[str, Any]


def method(name: str, config: Config) -> dict[str, Any]:
    """The options of ``cola fit`` that turn a config into one of a method.

    Args:
        name: one of :data:`METHODS`; with ``-N`` appended, a method with a chain has N links, as equal as whole epochs or steps
            allow, instead of the config's chain.
        config: the complete configuration of ``cola fit``.

    Raises:
        UserError: for an unknown name, and for a config that lacks what the method needs.
    """
    kind, n_links = re.fullmatch(r"(.*?)(?:-([1-9]\d*))?", name).groups()  # type: ignore[union-attr]
    if kind not in METHODS or (kind in WITHOUT_CHAIN and n_links is not None):
        raise UserError(f"methods: there is no method {name!r}{nearest(name, METHODS)} (all: {', '.join(METHODS)})")
    if kind not in WITHOUT_CHAIN and n_links is None and not ChainSchedule(**config["chain"]).has_knots:
        raise UserError(f"methods: {name!r} needs a config with knots. To set the number of links here, write {name}-4")
    return METHODS[kind](config, None if n_links is None else int(n_links))


def chain_options(**options: Any) -> dict[str, Any]:
    """All options of a chain except its name, which replace the config's; those that are not given have their defaults."""
    return {f"chain.{one.name}": options.get(one.name, one.default) for one in fields(ChainSchedule) if one.name != "name"}


def _lora(config: Config, n_links: int | None) -> dict[str, Any]:
    """One link over the whole run."""
    return chain_options() | _without_rules(config)


def _cola(config: Config, n_links: int | None) -> dict[str, Any]:
    """A chain: the config's, or one of links of equal length."""
    if n_links is None:
        return {}
    epochs, steps = _length(config)
    total = steps or epochs
    if total is None:
        raise UserError("trainer: to divide a run into links, set max_steps or max_epochs")
    knots = [round(k * total / n_links) for k in range(1, n_links)]
    if len({0, *knots, total}) <= n_links:
        raise UserError(f"methods: a run of {total} epochs (or steps) cannot have {n_links} links")
    return chain_options(**{"at_steps" if steps else "at_epochs": knots or None})


def _lora_sum_rank(config: Config, n_links: int | None) -> dict[str, Any]:
    """One link whose rank is the sum of the chain's, with the same scaling."""
    for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if config["model"].get("init_args", {}).get(name):
            raise UserError(f"methods: lora-sum-rank cannot be combined with model.{name}")
    rank = int(model_option(config, "rank"))
    total = n_links * rank if n_links else sum(_chain_ranks(config, rank))
    return _lora(config, None) | {"model.rank": total, "model.alpha": model_option(config, "alpha") / rank * total}


def _full(config: Config, n_links: int | None) -> dict[str, Any]:
    """Every parameter is trained, without links."""
    return chain_options() | {"model.target_modules": None, "model.modules_to_save": [], "model.modules_to_save_lr": None}


def _relora(config: Config, n_links: int | None) -> dict[str, Any]:
    """A chain whose optimizer retains 1 % of its state over a knot, with one cosine and a warm-up after each knot: ReLoRA.

    The warm-up is the config's, else a tenth of the link, which need not be as long as the paper's 50 to 100 steps.
    """
    jagged = {"model.lr_schedule": "cosine", "model.schedule_scope": "run", "model.kept_optimizer_state": 0.01}
    rise = config["model"].get("init_args", {}).get("knot_warmup_steps") or 0.1
    return _cola(config, n_links) | _without_rules(config) | jagged | {"model.knot_warmup_steps": rise}


def _same_A(share: float) -> Callable[[Config, int | None], dict[str, Any]]:
    """A chain that goes on over each knot with the same A and optimizer; the knot merges a share of B A.

    Of N links, the knots are those of ``chain.knots``, which are not in the decay of a stable schedule.
    """

    def same_A(config: Config, n_links: int | None) -> dict[str, Any]:
        half = {"chain.knot": "half", "chain.share": share, "chain.ranks": None, "chain.alphas": None}
        return (chain_options(knots=n_links - 1 or None) if n_links else {}) | _without_rules(config) | half

    return same_A


METHODS: dict[str, Callable[[Config, int | None], dict[str, Any]]] = {
    "lora": _lora,
    "lora-sum-rank": _lora_sum_rank,
    "cola": _cola,
    "full": _full,
    "relora": _relora,
    "same-A": _same_A(1.0),
    "share": _same_A(0.5),
}
WITHOUT_CHAIN = ("lora", "full")


def _without_rules(config: Config) -> dict[str, Any]:
    """The option that undoes a relative's rule in the config, where it has one."""
    return {"model.kept_optimizer_state": 0} if config["model"].get("init_args", {}).get("kept_optimizer_state") else {}


def model_option(config: Config, name: str) -> Any:
    """The value of an option of the config's module.

    Raises:
        UserError: for a module whose constructor does not take it.
    """
    options = config["model"].get("init_args", {})  # none for a constructor without parameters
    if name not in options:
        raise UserError(f"model: {name} must be set, but {config['model']['class_path']} has no such argument")
    return options[name]


def _chain_ranks(config: Config, rank: int) -> list[int]:
    """The ranks of the links of the config's own chain."""
    schedule, (epochs, steps) = ChainSchedule(**config["chain"]), _length(config)
    limit = epochs if schedule.every_n_epochs or schedule.at_epochs else steps
    if schedule.knots_unknown or (limit is None and schedule.knots is None):
        raise UserError("methods: the number of links of this chain is known only after a run. Write it: lora-sum-rank-4")
    # In epochs of one step, both count the same.
    run = RunLength(lambda epoch: 1, float(epochs or math.inf), float(steps or math.inf))
    n_links = schedule.knots + 1 if schedule.knots else len(schedule.link_lengths(START, run))
    return [schedule.rank_and_alpha(link, LoRAConfig(rank=rank))[0] for link in range(n_links)]


def _length(config: Config) -> tuple[int | None, int | None]:
    """A run's epochs and its optimizer steps: the limit that ends it, and None for the other."""
    trainer = config["trainer"]
    steps = trainer["max_steps"] if (trainer["max_steps"] or -1) >= 0 else None
    epochs = trainer["max_epochs"] if (trainer["max_epochs"] or -1) >= 0 else None
    return (None if steps else epochs), steps
