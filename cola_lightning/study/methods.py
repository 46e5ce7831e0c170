"""The methods, each defined by the options of ``cola fit`` that turn a config into it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cola_lightning.chain.schedule import START, ChainSchedule, RunLength
from cola_lightning.errors import UserError, nearest
from cola_lightning.lora.config import LoRAConfig

Config = Mapping[str, Any]

RULES: dict[str, Any] = {"kept_optimizer_state": 0}  # COLA's, from which the relatives differ


@dataclass(frozen=True)
class Method:
    """A method for a config.

    Attributes:
        links: the number of links of a run; 1 for a chain of which it is not known beforehand, 0 for full fine-tuning.
        rank: the largest rank of a link; None for full fine-tuning.
        options: the options of ``cola fit`` that override the config.
    """

    links: int
    rank: int | None
    options: Mapping[str, Any]


def method(name: str, config: Config) -> Method:
    """The method of a name, for a config.

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
    if n_links is None:
        return METHODS[kind](config, lambda: _config_chain(name, config))
    if kind == "lora-sum-rank":  # one link, so the run need not be divisible
        return METHODS[kind](config, lambda: ([_rank(config)] * int(n_links), {}))
    return METHODS[kind](config, lambda: _equal_links(config, int(n_links)))


def chain_options(**options: Any) -> dict[str, Any]:
    """All options of a chain except its name, which replace the config's; those that are not given have their defaults."""
    return {f"chain.{one.name}": options.get(one.name, one.default) for one in fields(ChainSchedule) if one.name != "name"}


FindChain = Callable[[], tuple[list[int], dict[str, Any]]]


def _lora(config: Config, chain: FindChain) -> Method:
    """One link over the whole run."""
    return Method(1, _rank(config), chain_options() | _without_rules(config))


def _cola(config: Config, chain: FindChain) -> Method:
    """A chain: the config's, or one of links of equal length."""
    ranks, options = chain()
    return Method(len(ranks), max(ranks), options)


def _lora_sum_rank(config: Config, chain: FindChain) -> Method:
    """One link whose rank is the sum of the chain's, with the same scaling."""
    ranks, _ = chain()
    scaling = model_option(config, "alpha") / _rank(config)
    sizes = {"model.rank": sum(ranks), "model.alpha": scaling * sum(ranks)}
    return Method(1, sum(ranks), chain_options() | _without_rules(config) | sizes)


def _full(config: Config, chain: FindChain) -> Method:
    """Every parameter is trained, without links."""
    alone: dict[str, Any] = {"model.target_modules": None, "model.modules_to_save": [], "model.modules_to_save_lr": None}
    return Method(0, None, chain_options() | alone)


def _relora(config: Config, chain: FindChain) -> Method:
    """A chain whose optimizer retains 1 % of its state over a knot, with one cosine and a warm-up after each knot: ReLoRA.

    The warm-up is the config's, else a tenth of the link, which need not be as long as the paper's 50 to 100 steps.
    """
    found = _cola(config, chain)
    jagged = {"model.lr_schedule": "cosine", "model.schedule_scope": "run", "model.kept_optimizer_state": 0.01}
    rise = config["model"].get("init_args", {}).get("knot_warmup_steps") or 0.1
    return replace(found, options={**found.options, **_without_rules(config), **jagged, "model.knot_warmup_steps": rise})


def _same_A(share: float) -> Callable[[Config, FindChain], Method]:
    """A chain that goes on over each knot with the same A and optimizer; the knot merges a share of B A.

    Of N links, the knots are those of ``chain.knots``, which are not in the decay of a stable schedule.
    """

    def same_A(config: Config, chain: FindChain) -> Method:
        ranks, options = chain()
        half = {"chain.knot": "half", "chain.share": share, "chain.ranks": None, "chain.alphas": None}
        knots = chain_options(knots=len(ranks) - 1 or None) if options else {}
        return Method(len(ranks), _rank(config), {**knots, **_without_rules(config), **half})

    return same_A


METHODS: dict[str, Callable[[Config, FindChain], Method]] = {
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
    """The options that undo a relative's rules in the config, where it has any."""
    options = config["model"].get("init_args", {})
    return {f"model.{name}": value for name, value in RULES.items() if options.get(name, value) != value}


def model_option(config: Config, name: str) -> Any:
    """The value of an option of the config's module.

    Raises:
        UserError: for a module whose constructor does not take it.
    """
    options = config["model"].get("init_args", {})  # none for a constructor without parameters
    if name not in options:
        raise UserError(f"model: {name} must be set, but {config['model']['class_path']} has no such argument")
    return options[name]


def _rank(config: Config) -> int:
    return int(model_option(config, "rank"))


def _config_chain(name: str, config: Config) -> tuple[list[int], dict[str, Any]]:
    """The ranks of the config's own chain; it needs no options."""
    chain = config["chain"]
    schedule = ChainSchedule(**chain)
    if not schedule.has_knots:
        raise UserError(f"methods: {name!r} needs a config with knots. To set the number of links here, write {name}-4")
    epochs, steps = _length(config)
    limit = epochs if chain["every_n_epochs"] or chain["at_epochs"] else steps
    if schedule.knots_unknown or (limit is None and schedule.knots is None):  # the number of links is known only after each run
        if name == "lora-sum-rank":
            raise UserError(f"methods: the number of links of this chain is known only after a run. Write it: {name}-4")
        return [max(schedule.ranks or [_rank(config)])], {}
    # In epochs of one step, both count the same.
    run = RunLength(lambda epoch: 1, float(epochs or math.inf), float(steps or math.inf))
    n_links = schedule.knots + 1 if schedule.knots else len(schedule.link_lengths(START, run))
    lora = LoRAConfig(rank=_rank(config))
    return [schedule.rank_and_alpha(link, lora)[0] for link in range(n_links)], {}


def _equal_links(config: Config, n_links: int) -> tuple[list[int], dict[str, Any]]:
    """The ranks of a chain of ``n_links`` links of equal length, and its options."""
    epochs, steps = _length(config)
    total = steps or epochs
    if total is None:
        raise UserError("trainer: to divide a run into links, set max_steps or max_epochs")
    knots = [round(k * total / n_links) for k in range(1, n_links)]
    if len({0, *knots, total}) <= n_links:
        raise UserError(f"methods: a run of {total} epochs (or steps) cannot have {n_links} links")
    ranks = [_rank(config)] * n_links
    return ranks, chain_options(**{"at_steps" if steps else "at_epochs": knots or None})


def _length(config: Config) -> tuple[int | None, int | None]:
    """A run's epochs and its optimizer steps: the limit that ends it, and None for the other."""
    trainer = config["trainer"]
    steps = trainer["max_steps"] if (trainer["max_steps"] or -1) >= 0 else None
    epochs = trainer["max_epochs"] if (trainer["max_epochs"] or -1) >= 0 else None
    return (None if steps else epochs), steps
