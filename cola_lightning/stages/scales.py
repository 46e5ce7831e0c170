"""A factor for what each stage changed, chosen by validation data: nothing is trained."""

import statistics
from collections.abc import Callable, Mapping, Sequence

FACTORS = (0.5, 0.75, 1.25)  # that are tried for each stage; the first stage also tries 1

Scale = Mapping[str, float]  # the factor of each stage's updates


def fit_scales(stages: Sequence[str], losses_of: Callable[[str, Sequence[Scale]], Sequence[Sequence[float]]]) -> Scale:
    """Chooses the factors with the lowest losses, one stage after the other.

    A task's loss counts as a share of that without factors: losses of preferences and of texts have different sizes.

    Args:
        stages: their names.
        losses_of: the validation losses of each task, under each of the factors that are tried for a stage.

    Shape:
        what ``losses_of`` returns: tries x tasks.

    Example:
        >>> fit_scales(["sft", "dpo"], lambda stage, tried: [[2 + abs(scale["dpo"] - 0.7)] for scale in tried])
        {'sft': 1.0, 'dpo': 0.75}
    """
    scale: Scale = dict.fromkeys(stages, 1.0)
    before, best = list[float](), float("inf")
    for stage in stages:
        tried = [{**scale, stage: factor} for factor in (FACTORS if before else (1.0, *FACTORS))]
        losses = losses_of(stage, tried)
        before = before or list(losses[0])
        means = [statistics.fmean(loss / first for loss, first in zip(some, before, strict=True)) for some in losses]
        best, scale = min([(best, scale), *zip(means, tried, strict=True)], key=lambda pair: pair[0])
    return scale
