"""Logits of a causal language model at the requested positions, with as little computation as possible."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.errors import UserError, one_line
from cola_lightning.modes import evaluating

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]

# Options share their prompt where that leaves less than half of the tokens to be computed: a row then takes two passes.
WORTH_SHARING = 2

# The cost of one more forward pass, in tokens. On a CPU it reads the weights once more: 14 to 20 per thread were measured (135
# million parameters, 1 and 2 threads). Elsewhere, not measured, as many as keep a GPU busy.
PASS_COST_A_THREAD = 16
PASS_COST_ELSEWHERE = 4096

# The fields of a batch with one value per token.
BY_TOKEN = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}


def logits_of(model: nn.Module, batch: Batch, keep: int | Tensor) -> Tensor:
    """The logits of a causal language model, in float32, at the requested positions.

    Args:
        model: a Hugging Face model.
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on either side; or a mask for each pair of tokens
            (rows x 1 x length x length), true or 1 where attention is allowed, or additive, as for packed sequences.
        keep: the number of positions at the end, or the positions.

    Shape:
        result: rows x positions x vocabulary.

    Raises:
        UserError: for any other mask.
    """
    return logits_and_router_loss(model, batch, keep)[0]


def logits_and_router_loss(model: nn.Module, batch: Batch, keep: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits of :func:`logits_of`, and what Hugging Face adds to the tokens' loss, if :func:`has_router_loss`."""
    taken_by_name = inspect.signature(model.forward).parameters
    mask = batch.get("attention_mask")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
    if mask is not None and mask.dim() == 2:  # a row begins at position 0, after padding on the left, too
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    elif mask is not None:
        inputs["attention_mask"] = _additive(mask, model)
    inputs |= {name: batch[name] for name in ("position_ids", "token_type_ids") if name in batch}
    taken = {name: value for name, value in inputs.items() if name in taken_by_name}
    output = model(**taken)
    logits: Tensor = output.logits
    if "logits_to_keep" not in taken:  # an older architecture: its head has seen all positions
        logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    router_loss = getattr(output, "aux_loss", None) if has_router_loss(model) else None  # a model without experts has none
    return logits.float(), None if router_loss is None else router_loss * _router_loss_weight(model)


def _additive(mask: Tensor, model: Any) -> Tensor:
    """A mask of pairs of tokens that any attention takes: eager attention adds booleans, sdpa refuses another dtype."""
    if mask.dim() != 4:
        raise UserError(
            "batch: expected attention_mask of rows x length, or rows x 1 x length x length, received one of shape "
            f"{tuple(mask.shape)}"
        )
    device = mask.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    lowest = torch.finfo(dtype).min  # not -inf: a row without any true value would become NaN
    if not mask.is_floating_point():
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, lowest)
    if (mask > 0).any():
        raise UserError(
            "batch: expected attention_mask of four dimensions with booleans, or with numbers to be added (0, or far below), "
            f"received numbers up to {mask.max():g}"
        )
    return mask.float().clamp(min=lowest).to(dtype)


def has_router_loss(model: nn.Module) -> bool:
    """Whether the load-balancing loss of a mixture of experts is used: ``output_router_logits`` of its configuration."""
    config: Any = model.config
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _router_loss_weight(model: Any) -> float:
    """The weight of the router's loss in Hugging Face's loss: most models have it in their configuration, under either name."""
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the latter is JetMoE's
    for holder, name in ((holder, name) for holder in (model, model.config.get_text_config()) for name in names):
        if (weight := getattr(holder, name, None)) is not None:
            return float(weight)
    raise UserError(
        f"model.model_name: expected a weight of the router's loss ({' or '.join(names)}) beside output_router_logits in "
        f"config.json, received none for {type(model).__name__}; output_router_logits false trains without that loss"
    )


def split_by_length(batch: Batch, lengths: Sequence[int] | None = None) -> list[tuple[Tensor, Batch]]:
    """Splits a batch into parts of rows of similar length, without the padding that only longer rows of other parts need.

    Each part is a separate forward pass, so there are only as many as save time.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on the left, and other values per token.
        lengths: of the rows; None: read from the mask, which waits for the device.

    Returns:
        the row indices and the batch of each part. A batch without padding on the left is one part, itself.
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
    """The cost of one more forward pass on a device, in tokens."""
    return PASS_COST_A_THREAD * torch.get_num_threads() if device.type == "cpu" else PASS_COST_ELSEWHERE


def cut_by_length(lengths: Sequence[int], part_cost: float) -> list[int]:
    """Where to cut rows, so that the parts, each padded to its longest row, have the lowest total cost.

    Args:
        lengths: of the rows, from the longest to the shortest.
        part_cost: cost of a part, besides its tokens.

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


def _are_near(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def _are_same(model: Any, logits: Tensor, expected: Tensor) -> bool:
    """Whether logits computed in different ways are equal up to rounding, of which half precision has more."""
    return _are_near(logits, expected, 1e-2 if model.dtype.itemsize >= 4 else 1e-1)


def _are_untouched(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits computed in the same way, beside other tokens, are equal: hardly any rounding, in any dtype."""
    return _are_near(logits, expected, 1e-3)


@torch.no_grad()
def check_decoder(model: nn.Module) -> None:
    """Refuses a model that, on three tokens, is not a decoder or gives other logits after padding on the left.

    The latter are models that count positions without taking ``position_ids``. Only three tokens are tried: what appears only
    in longer sequences, or with other tokens, is not found.

    Raises:
        UserError: if the last token's logits are not those with four tokens of padding before them, or if the logits of the
            first two change with the last.
    """
    name = type(model).__name__
    with evaluating(model):
        alone, changed, padded = _logits_of_probes(model)
    if not _are_same(model, padded, alone[:, -1:]):
        raise UserError(
            "model.model_name: expected a decoder that can be padded on the left, received "
            f"{name}, which then gives other logits"
        )
    if not _are_untouched(changed[:, :-1], alone[:, :-1]):
        raise UserError(
            "model.model_name: expected a decoder, whose logits follow from a token and those before it, received "
            f"{name}, in which they change with a later token (an encoder, or is_decoder is false in its config.json)"
        )


def _logits_of_probes(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of three tokens, at the model's own positions; with another last token; and, padded, of the last token."""
    tokens = torch.arange(3).unsqueeze(0) + model.config.get_text_config().vocab_size // 2
    mask = torch.ones_like(tokens)
    alone, changed = (
        model(input_ids=ids, attention_mask=mask).logits.float() for ids in (tokens, tokens - torch.tensor([0, 0, 2]))
    )
    padded = logits_of(model, {"input_ids": F.pad(tokens, (4, 0)), "attention_mask": F.pad(mask, (4, 0))}, 1)
    return alone, changed, padded


@torch.no_grad()
def shared_logits(model: Any, batch: Batch, n_positions: int) -> Tensor:
    """The logits at the last positions of an option batch's sequences, with each row's shared prefix computed once.

    The prefix has its own forward pass, and the rest of each option uses its keys and values. Rows are computed one by one:
    the keys and values of all would take as much memory as a batch of that many sequences in training.

    Args:
        model: a Hugging Face model that :func:`can_share`.
        batch: ``input_ids`` and ``attention_mask`` (sequences x length, padded on the left), row by row;
            ``n_sequences`` and ``n_shared`` (rows): the number of a row's sequences, and of the tokens in their shared prefix,
            without those at the requested positions.
        n_positions: number of positions at the end.

    Shape:
        result: sequences x positions x vocabulary, in float32.
    """
    logits: list[Tensor] = []
    first = 0
    for n_sequences, n_shared in zip(batch["n_sequences"].tolist(), batch["n_shared"].tolist(), strict=True):
        row = slice(first, first + n_sequences)
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
        lengths = mask.sum(1)
        longest = int(lengths.max())
        ids, mask = ids[:, -longest:], mask[:, -longest:]
        first += n_sequences
        if n_sequences * longest < WORTH_SHARING * (n_shared + n_sequences * (longest - n_shared)):
            logits.append(logits_of(model, {"input_ids": ids, "attention_mask": mask}, n_positions))
        else:
            logits.append(_logits_after_prefix(model, ids, lengths, n_shared, n_positions))
    return torch.cat([F.pad(part, (0, 0, n_positions - part.shape[1], 0)) for part in logits])  # a row's own may be fewer


def _logits_after_prefix(model: Any, ids: Tensor, lengths: Tensor, n_shared: int, n_positions: int) -> Tensor:
    """The logits at the last positions of sequences, padded on the left, whose shared prefix is computed once.

    They are padded on the right here: with padding between the prefix and the rest, a model that uses distances between tokens
    (a window of local attention, a bias by distance) would count the padding, too.
    """
    n_sequences, longest = ids.shape
    rows, places = torch.arange(n_sequences, device=ids.device).unsqueeze(1), torch.arange(longest, device=ids.device)
    ids = ids[rows, (places + longest - lengths.unsqueeze(1)) % longest]
    name = str(_name_of_cache(model))
    prefix = model(input_ids=ids[:1, :n_shared], use_cache=True, logits_to_keep=1)[name]
    prefix.batch_repeat_interleave(n_sequences)
    starts = lengths - n_positions  # of the requested positions; those before the rest are of no option's token
    start = max(int(starts.min()), n_shared)
    rest: dict[str, Any] = {
        "input_ids": ids[:, n_shared:],
        "attention_mask": (places < lengths.unsqueeze(1)).long(),
        "position_ids": places[n_shared:].expand(n_sequences, -1),
    }
    rest |= {name: prefix, "use_cache": True, "logits_to_keep": longest - start}
    logits: Tensor = model(**rest).logits
    requested = torch.arange(n_positions, device=ids.device) + (starts - start).unsqueeze(1)
    return logits[rows, requested.clamp(min=0)].float()


def _name_of_cache(model: nn.Module) -> str | None:
    """The name that a model's ``forward`` gives its key-value cache: the newer one, or that of older models."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def is_free_of_length(model: nn.Module) -> bool:
    """Whether a token's position means the same in a batch of any length: some rotary embeddings depend on the longest row."""
    config: Any = model.config
    rotation = str(getattr(config.get_text_config(), "rope_parameters", None))
    return not any(kind in rotation for kind in ("longrope", "dynamic"))


@torch.no_grad()
def can_share(model: nn.Module) -> bool:
    """Whether options can share the computation of their prompt: tried out on a few tokens, in three forward passes.

    A model must cache plain keys and values of all tokens, and give the same logits with them.
    """
    if not _caches_all(model):
        return False
    config: Any = model.config
    ids, mask = torch.arange(48, device=next(model.parameters()).device).view(4, 12) // 2, torch.ones(4, 12, dtype=torch.long)
    ids %= config.get_text_config().vocab_size
    for row in range(4):  # of 12, 11, 10 and 9 tokens, of which the first 8 are the same
        ids[row, row : row + 8], mask[row, :row] = ids[0, :8], 0
    batch = {"input_ids": ids, "attention_mask": mask.to(ids.device)}
    batch |= {"n_sequences": torch.tensor([4]), "n_shared": torch.tensor([8])}
    with evaluating(model):
        expected = logits_of(model, batch, 1)
        try:
            received = shared_logits(model, batch, 1)
        except Exception as error:  # whatever a model raises that cannot use its cache: prompts are not shared then
            log.info("Options do not share their prompt's computation, for %s fails to: %s", type(model).__name__, error)
            return False
    return _are_same(model, received, expected)


def _caches_all(model: nn.Module) -> bool:
    """Whether a model, by its configuration, caches keys and values of all tokens."""
    taken = inspect.signature(model.forward).parameters
    return (
        {"position_ids", "logits_to_keep"} <= taken.keys() and _name_of_cache(model) is not None and _is_full_attention(model)
    )


def _is_full_attention(model: nn.Module) -> bool:
    """Whether all layers attend to all tokens, by a model's configuration: a window is longer than what can be tried."""
    config: Any = model.config
    parts = (config, config.get_text_config())
    kinds = {kind for part in parts for kind in getattr(part, "layer_types", None) or ()}
    has_window = any(getattr(part, "sliding_window", None) for part in parts)  # None or, of Qwen2-MoE, 0: none
    return kinds <= {"full_attention"} and not has_window


@torch.no_grad()
def takes_mask_of_pairs(model: nn.Module) -> bool:
    """Whether a mask of pairs of tokens keeps packed sequences apart: tried out on nine tokens, in three forward passes.

    A window, which would need its own masks, a recurrent or convolutional state, and a mask that is ignored let a sequence see
    those before it. The logits of the second of two must not change with the first, and must equal those of it alone.
    """
    if not _is_full_attention(model):
        return False
    config: Any = model.config
    device = next(model.parameters()).device
    n = config.get_text_config().vocab_size
    first, second = ((torch.arange(9, device=device).unsqueeze(0) + n // 2) % n).split([5, 4], dim=1)
    places = torch.arange(9, device=device)
    is_second = places >= 5
    pairs = (is_second[:, None] == is_second) & (places[:, None] >= places)
    packed = {"attention_mask": pairs[None, None], "position_ids": (places - 5 * is_second).unsqueeze(0)}
    with evaluating(model), torch.autocast(device.type, enabled=False):
        alone = logits_of(model, {"input_ids": second, "attention_mask": torch.ones_like(second)}, 4)
        try:
            behind, behind_other = (
                logits_of(model, packed | {"input_ids": torch.cat([some, second], dim=1)}, 4)
                for some in (first, (first - 7) % n)
            )
        except Exception as error:  # whatever a model raises that takes rows x length alone
            log.info("%s does not take an attention mask of four dimensions: %s", type(model).__name__, one_line(str(error)))
            return False
    return _are_untouched(behind_other, behind) and _are_same(model, behind, alone)
