"""Compares a run that was killed and resumed with the same run that nobody killed: its records and its last checkpoint."""

import torch

# Lightning's counters: one of them counts the gradients that were set to zero, and so a window that was begun twice.
NOT_COMPARED = "loops"


def name_of(record):
    """Which batch or validation of a run a record is of."""
    if record["event"] == "batch":
        return f"batch {record['batch']} of epoch {record['epoch']}"
    return f"validation at step {record['global_step']} in epoch {record['epoch']}"


def place_of_first(resumed, whole):
    """Where in the whole run a resumed one sets in; the end where it did nothing, or nothing of the whole run's."""
    names = [name_of(record) for record in whole]
    return names.index(name_of(resumed[0])) if resumed and name_of(resumed[0]) in names else len(whole)


def differences_of_records(whole, killed, resumed):
    """The killed run must be the whole one's beginning, the resumed one its end, without a gap between; else what is not."""
    start = place_of_first(resumed, whole)
    found = [deviation(killed, whole, 0), deviation(resumed, whole, start)]
    if start > len(killed):
        found.append(f"{name_of(whole[len(killed)])}: never done")
    if start + len(resumed) < len(whole):
        found.append(f"resumed: ends before {name_of(whole[start + len(resumed)])}")
    return [text for text in found if text]


def deviation(run, whole, start):
    """The first of a run's records that is not what the whole run has from ``start`` on."""
    names = [*map(name_of, whole), *["the end"] * len(run)]
    for place, record in enumerate(run, start):
        if name_of(record) != names[place]:
            return f"{name_of(record)}: where {names[place]} was due"
        if difference := first_difference(record, whole[place], name_of(record)):
            return difference
    return None


def twice_done(whole, killed, resumed):
    """What the killed and the resumed run both did to its end."""
    return whole[place_of_first(resumed, whole) : len(killed)]


def too_much_done_twice(twice, allowed_steps):
    """A partial accumulation window may be done twice, and a validation that was interrupted or that falls into it.

    After SIGKILL, a few whole steps and what comes between them, too.
    """
    steps = sum(record.get("has_stepped", False) for record in twice)
    if steps > allowed_steps:
        return [f"{name_of(twice[0])}: done twice, and {steps} finished steps, at most {allowed_steps} expected"]
    if not allowed_steps and len(twice) > 1 and twice[0]["event"] == "validation":
        return [f"{name_of(twice[0])}: done twice, for all that it had ended before {name_of(twice[1])}"]
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
    if isinstance(mine, dict):
        if missing := theirs.keys() ^ mine.keys():
            return f"{name}: {min(missing, key=str)!r} in one of the two alone"
        pairs = [(f"{name}.{key}", mine[key], theirs[key]) for key in mine]
    elif isinstance(mine, list | tuple):
        if len(mine) != len(theirs):
            return f"{name}: length {len(mine)} instead of {len(theirs)}"
        pairs = [(f"{name}.{place}", *pair) for place, pair in enumerate(zip(mine, theirs, strict=True))]
    else:
        return None if mine == theirs else f"{name}: {mine!r} instead of {theirs!r}"
    found = (first_difference(ours, other, part) for part, ours, other in pairs)
    return next((text for text in found if text), None)


def bits(tensor):
    """A tensor's bytes: -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
