"""Rules by which relatives of COLA differ from it: which factor a link trains, and which optimizer state survives a knot.

A layer's forward pass does not depend on them: it uses A and B, whichever of them is trained.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.errors import UserError
from cola_lightning.seeding import derive_seed

TrainedFactors = Literal["both", "B", "random"]
Factor = Literal["A", "B"]


# A rule's name -> the factor that a link does not train, from the run's seed and the link's index; see frozen_factor.
FROZEN_FACTOR: dict[str, Callable[[int, int], Factor | None]] = {
    "both": lambda seed, link: None,
    "B": lambda seed, link: "A",
    "random": lambda seed, link: "B" if derive_seed(seed, link, "frozen factor") % 2 else "A",
}


def frozen_factor(trained: TrainedFactors, seed: int, link: int) -> Factor | None:
    """The factor that a link does not train: it is drawn, and the other begins at zero. None if both are trained.

    Args:
        trained: ``both`` (LoRA, COLA, ReLoRA); ``B``: A stays as drawn; ``random``: a randomly chosen factor.
        seed: the run's seed.
        link: the link's index.

    Example:
        >>> [frozen_factor("random", 0, link) for link in range(5, 11)]
        ['A', 'B', 'A', 'A', 'B', 'A']

    Source: ``B``: Zhu et al., "Asymmetry in Low-Rank Adapters" (arXiv 2402.16842); ``random``: Malinovsky et al., "Randomized
        Asymmetric Chain of LoRA" (arXiv 2410.08305), algorithm 1.
    """
    return FROZEN_FACTOR[trained](seed, link)


def check_trained_factors(trained: str) -> None:
    """Refuses a name that is no rule's."""
    if trained not in FROZEN_FACTOR:
        raise UserError(f"model.trained_factors: expected {', '.join(FROZEN_FACTOR)}, received {trained!r}")


@torch.no_grad()
def keep_state(old: Optimizer, new: Optimizer, share: float, factors: Mapping[int, tuple[slice, ...]]) -> None:
    """Copies optimizer state over a knot: of the factors' moments only some entries, of other parameters all of it.

    Those are the entries with the largest first moments, and each moment retains the same: a first moment without its second
    would be divided by zero, as A's gradient is 0 while the new B is. Step counts are copied too.

    Args:
        old: the previous link's optimizer.
        new: the next link's optimizer, on the same parameters.
        share: the share of entries that the factors' moments retain, above 0.
        factors: by the id of each factor, the entries that both links use: a factor has those of the largest rank.

    Raises:
        UserError: for a state of which no part can be retained; see :func:`check_state`.

    Source: Lialin et al., "ReLoRA" (arXiv 2307.05695), section 3: a partial reset of the optimizer by magnitude.
    """
    check_state(old, share, factors)
    for group in new.param_groups:
        for parameter in group["params"]:
            state = old.state.get(parameter)
            if state:
                used = factors.get(id(parameter))
                new.state[parameter] = {**state} if used is None else _kept(state, parameter, share, used)


def check_state(optimizer: Optimizer, share: float, factors: Container[int]) -> None:
    """Refuses to retain a part of a state that is not a number for each entry of a factor: 8-bit codes, or sums over rows.

    Args:
        optimizer: a link's, after a step.
        share: the share that a knot retains; 0 and 1 suit any state.
        factors: the ids of the links' factors.
    """
    if share in (0, 1):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items() if id(parameter) in factors else ():
            if not isinstance(value, Tensor) or value.numel() == 1:
                continue
            if value.shape != parameter.shape or not value.is_floating_point():
                raise UserError(
                    f"model.kept_optimizer_state: expected 0 or 1 with {type(optimizer).__name__}, whose {name} has other "
                    f"values than a number for each entry of a factor, received {share:g}"
                )


def _kept(state: dict[str, Any], parameter: Tensor, share: float, used: tuple[slice, ...]) -> dict[str, Any]:
    """A state whose moments are 0 but for the used entries with the largest first moments; what is no moment unchanged."""
    is_used = torch.zeros_like(parameter, dtype=torch.bool)
    is_used[used] = True
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    moments = [name for name, value in tensors.items() if value.shape == parameter.shape]
    if not moments or (share == 1 and is_used.all()):
        return {**state}
    sizes = state[moments[0]].abs()  # the first moment, in torch's optimizers
    n_kept = max(1, round(share * int(is_used.sum())))
    is_kept = is_used & (sizes >= sizes[is_used].topk(n_kept).values[-1])
    return {name: torch.where(is_kept, value, 0) if name in moments else value for name, value in state.items()}
