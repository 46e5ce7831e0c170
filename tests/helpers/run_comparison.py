"""Compares what two runs leave, to the bit."""

import torch


def first_difference(mine, theirs, name):
    """Where two trees of plain values and tensors first differ, in words; None where they are the same to the bit."""
    if type(mine) is not type(theirs):
        return f"{name}: {type(mine).__name__} instead of {type(theirs).__name__}"
    if isinstance(mine, torch.Tensor):
        is_same = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(bits(mine), bits(theirs))
        return None if is_same else f"{name}: another tensor"
    if isinstance(mine, list | tuple):
        mine, theirs = dict(enumerate(mine)), dict(enumerate(theirs))
    if not isinstance(mine, dict):
        return None if mine == theirs else f"{name}: {mine!r} instead of {theirs!r}"
    found = (first_difference(mine[key], theirs[key], f"{name}.{key}") for key in mine.keys() & theirs.keys())
    alone = sorted(mine.keys() ^ theirs.keys(), key=str)
    return next((text for text in found if text), f"{name}: {alone[0]!r} in one of the two alone" if alone else None)


def bits(tensor):
    """A tensor's bytes: -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
