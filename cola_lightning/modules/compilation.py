"""Models that are compiled."""

import inspect

import torch
from torch import nn

# For each rank of a chain, training and evaluation; torch's own is 8, where it cannot be set for one model.
RECOMPILE_LIMIT = 64


def compile_model(model: nn.Module) -> None:
    """Compiles a model in place: its names and its type stay."""
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    model.compile(**({"recompile_limit": RECOMPILE_LIMIT} if has_limit else {}))
