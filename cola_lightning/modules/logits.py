"""Logits of a causal language model, at the positions that are asked for and with as little computed as can be."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.errors import UserError

Batch = Mapping[str, Any]

# Options share their prompt where that leaves less than half of the tokens to be computed: a row then takes two passes.
WORTH_SHARING = 2

# What one more forward pass costs, in tokens. On a CPU it reads the weights once more: 14 to 20 for each thread were measured
# (135 million parameters, 1 and 2 threads). Elsewhere, unmeasured, so many that a pass over them keeps a GPU busy.
PASS_COST_A_THREAD = 16
PASS_COST_ELSEWHERE = 4096

# What a batch has for each token.
BY_TOKEN = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}


def logits_of(model: nn.Module, batch: Batch, keep: int | Tensor) -> Tensor:
    """The logits of a causal language model, in float32, at the positions that are asked for.

    Args:
        model: a Hugging Face model.
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on either side.
        keep: how many positions at the end, or which.

    Shape:
        result: rows x positions x vocabulary.
    """
    taken_by_name = inspect.signature(model.forward).parameters
    mask = batch.get("attention_mask")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
    if mask is not None and mask.dim() == 2:  # behind padding on the left, too, a row begins at position 0
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs |= {name: batch[name] for name in ("position_ids", "token_type_ids") if name in batch}
    taken = {name: value for name, value in inputs.items() if name in taken_by_name}
    logits: Tensor = model(**taken).logits
    if "logits_to_keep" not in taken:  # an older architecture: its head has seen all positions
        logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    return logits.float()


def split_by_length(batch: Batch, lengths: Sequence[int] | None = None) -> list[tuple[Tensor, Batch]]:
    """A batch as parts whose rows are of like length, without the padding that only longer rows of other parts need.

    A part is a forward pass of its own, so there are no more of them than save time.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on the left, and what else it has for each token.
        lengths: of the rows; None: the mask is asked, which waits for the device.

    Returns:
        each part, and which rows of the batch it has. A batch without padding on the left is one part, itself.
    """
    ids = batch["input_ids"]
    whole = [(torch.arange(len(ids), device=ids.device), batch)]
    by_token = {name: batch[name] for name in BY_TOKEN & batch.keys() if batch[name] is not None}
    if "attention_mask" not in by_token or len(ids) == 1 or any(some.shape != ids.shape for some in by_token.values()):
        return whole
    if lengths is None:
        lengths = (ids.shape[1] - batch["attention_mask"].bool().int().argmax(1)).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    cuts = cut_by_length([lengths[row] for row in order], pass_cost(ids.device))
    if len(cuts) == 1:
        return whole
    parts: list[tuple[Tensor, Batch]] = []
    for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        rows, longest = torch.tensor(order[start:end], device=ids.device), lengths[order[start]]
        parts.append((rows, {name: value[rows, -longest:] for name, value in by_token.items()}))
    return parts


def pass_cost(device: torch.device) -> float:
    """What one more forward pass costs on a device, in tokens."""
    return PASS_COST_A_THREAD * torch.get_num_threads() if device.type == "cpu" else PASS_COST_ELSEWHERE


def cut_by_length(lengths: Sequence[int], part_cost: float) -> list[int]:
    """Where to cut rows, so that their parts, each padded to its longest row, are cheapest together.

    Args:
        lengths: of the rows, from the longest to the shortest.
        part_cost: of a part, besides its tokens.

    Returns:
        where each part begins.

    Example:
        >>> cut_by_length([90, 80, 20, 20], 10), cut_by_length([90, 80, 20, 20], 200)
        ([0, 2], [0])
    """
    cheapest: list[tuple[float, int]] = [(0, 0)]  # of the first rows: the cost, and where the last part begins
    for end in range(1, len(lengths) + 1):
        costs = ((cheapest[start][0] + lengths[start] * (end - start) + part_cost, start) for start in range(end))
        cheapest.append(min(costs))
    cuts, end = [], len(lengths)
    while end:
        end = cheapest[end][1]
        cuts.append(end)
    return cuts[::-1]


@torch.no_grad()
def check_left_padding(model: nn.Module) -> None:
    """Refuses a model for which padding on the left changes what a sequence means.

    Such are encoders, encoder-decoders, and models that count positions without asking for them.

    Raises:
        UserError: if the logits of a few tokens with padding before them are not those without.
    """
    config: Any = model.config
    tokens = torch.arange(3).unsqueeze(0) + config.get_text_config().vocab_size // 2
    is_training = model.training
    model.eval()
    mask = torch.ones_like(tokens)
    alone = model(input_ids=tokens, attention_mask=mask).logits[:, -1:].float()  # as the model itself counts positions
    padded = logits_of(model, {"input_ids": F.pad(tokens, (4, 0)), "attention_mask": F.pad(mask, (4, 0))}, 1)
    model.train(is_training)
    tolerance = 1e-2 if model.dtype.itemsize >= 4 else 1e-1  # type: ignore[operator]
    if not (alone - padded).abs().max() <= tolerance * alone.abs().max():
        raise UserError(
            "model.model_name: expected a decoder that can be padded on the left, received "
            f"{type(model).__name__}, which then gives other logits"
        )


@torch.no_grad()
def shared_logits(model: Any, batch: Batch, n_positions: int) -> Tensor:
    """The logits at the last positions of an option batch's sequences, each row's shared beginning computed once.

    The beginning goes through the model alone, and its keys and values are there for what follows in each option. Row by row:
    the keys and values of all would take as much memory as a batch of that many sequences in training.

    Args:
        model: a Hugging Face model that :func:`can_share`.
        batch: ``input_ids`` and ``attention_mask`` (sequences x length, padded on the left), a row's one after another;
            ``n_sequences`` and ``n_shared`` (rows): how many sequences each row has, and with how many tokens they all begin,
            without those at the positions that are asked for.
        n_positions: how many at the end.

    Shape:
        result: sequences x positions x vocabulary, in float32.
    """
    logits: list[Tensor] = []
    first, name = 0, str(_name_of_cache(model))
    for n_sequences, n_shared in zip(batch["n_sequences"].tolist(), batch["n_shared"].tolist(), strict=True):
        row = slice(first, first + n_sequences)
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
        lengths = mask.sum(1)
        longest = int(lengths.max())
        ids, mask, pads = ids[:, -longest:], mask[:, -longest:], longest - lengths
        first += n_sequences
        if n_sequences * longest < WORTH_SHARING * (n_shared + n_sequences * (longest - n_shared)):
            logits.append(logits_of(model, {"input_ids": ids, "attention_mask": mask}, n_positions))
            continue
        whole = int(pads.argmin())
        beginning = model(input_ids=ids[whole : whole + 1, :n_shared], use_cache=True, logits_to_keep=1)[name]
        beginning.batch_repeat_interleave(n_sequences)
        places = torch.arange(longest - n_shared, device=ids.device)
        is_rest = (places >= pads.unsqueeze(1)).to(mask.dtype)  # a shorter one is padded between its beginning and its rest
        rest: dict[str, Any] = {
            "input_ids": ids[:, n_shared:],
            "attention_mask": torch.cat([mask.new_ones(n_sequences, n_shared), is_rest], 1),
            "position_ids": n_shared + (is_rest.cumsum(-1) - 1).clamp(min=0),
        }
        rest |= {name: beginning, "use_cache": True, "logits_to_keep": n_positions}
        logits.append(model(**rest).logits.float())
    return torch.cat([F.pad(part, (0, 0, n_positions - part.shape[1], 0)) for part in logits])  # a row's own may be fewer


def _name_of_cache(model: nn.Module) -> str | None:
    """What a model calls the keys and values of what it has read; transformers renames it between its versions 5.0 and 5.40."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def is_free_of_length(model: nn.Module) -> bool:
    """Whether a token's place means the same in a batch of any length: some rotate by the longest row that there is."""
    config: Any = model.config
    rotation = str(getattr(config.get_text_config(), "rope_parameters", None))
    return not any(kind in rotation for kind in ("longrope", "dynamic"))


def can_share(model: nn.Module) -> bool:
    """Whether a model keeps plain keys and values of all that it has read, and takes them up again."""
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None or kinds != {"full_attention"}
    return {"position_ids", "logits_to_keep"} <= taken.keys() and _name_of_cache(model) is not None and not has_window
