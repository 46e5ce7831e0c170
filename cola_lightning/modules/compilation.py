"""Compilation of models."""

import inspect

import torch
from torch import nn

# A model is compiled for each rank of a chain, in training and in evaluation. Torch's default of 8 remains in versions in which
# the limit cannot be set for one model.
RECOMPILE_LIMIT = 64


def compile_model(model: nn.Module) -> None:
    """Compiles a model in place: its names and its type do not change."""
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    model.compile(**({"recompile_limit": RECOMPILE_LIMIT} if has_limit else {}))
