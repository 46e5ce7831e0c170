"""A module from a checkpoint: made as the checkpoint's was, with its values."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.module.arguments import rebuilt


def load(
    cls: type,
    source: Any,
    strict: bool | None,
    weights_only: bool | None,
    links: int | str | None,
    scale: Mapping[int | str, float] | None,
    arguments: dict[str, Any],
) -> Any:
    """The module of a checkpoint, see :meth:`COLAModule.load_from_checkpoint`, whose arguments these are."""
    opened = source
    if not isinstance(opened, OpenedCheckpoint):
        opened = OpenedCheckpoint.open(opened, weights_only=weights_only is not False)
    # Not by Lightning's method, which unpickles what is at a URL, and calls what the hyperparameters name.
    module = rebuilt(cls, opened.state.facts.module, arguments)
    module.expect_state(opened.state, links=links, scale=scale)
    module.make_model()
    module.on_load_checkpoint(opened.contents)
    strict = module.strict_loading if strict is None else strict
    keys = module.load_state_dict(opened.contents["state_dict"], strict=strict)
    if any(keys):
        rank_zero_warn(f"checkpoint: the module alone has {keys.missing_keys}, the checkpoint alone {keys.unexpected_keys}")
    return module
