"""Compares a run that was killed and resumed with the same run that nobody killed: its records and its last checkpoint."""

import torch

# Lightning's counters: one of them counts the gradients that were set to zero, and so a window that was begun twice.
NOT_COMPARED = "loops"


def differences_of_records(whole, killed, resumed):
    """The killed run must be the whole one's beginning, the resumed one its end, without a gap between; else what is not."""
    start = len(whole) - len(resumed)
    found = [
        first_difference(killed, whole[: len(killed)], "killed"),
        first_difference(resumed, whole[max(start, 0) :], "resumed"),
        f"the {len(killed) + 1}. record: in neither run" if start > len(killed) else None,
    ]
    return [text for text in found if text]


def twice_done(whole, killed, resumed):
    """What the killed and the resumed run both did to its end."""
    return whole[max(len(whole) - len(resumed), 0) : len(killed)]


def too_much_done_twice(twice, allowed_steps):
    """A partial accumulation window may be done twice, and a validation that was interrupted or that falls into it.

    After SIGKILL, a few whole steps and what comes between them, too.
    """
    steps = sum(record.get("has_stepped", False) for record in twice)
    if steps > allowed_steps:
        return [f"{steps} finished steps were done twice, at most {allowed_steps} expected"]
    if not allowed_steps and len(twice) > 1 and twice[0]["event"] == "validation":
        return [f"the validation at step {twice[0]['global_step']} was done twice, for all that it had ended"]
    return []


def differences_of_checkpoints(expected, received):
    """What is not the same, to the bit, at the end of two runs."""
    if not received.exists():
        return ["no checkpoint at the end"]
    theirs, ours = (torch.load(path, weights_only=True) for path in (expected, received))
    names = sorted((theirs.keys() | ours.keys()) - {NOT_COMPARED})
    found = (first_difference(ours.get(name), theirs.get(name), f"checkpoint: {name}") for name in names)
    return [text for text in found if text]


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
