"""A chain as one tensor of bytes, in a state dict under torch's name for extra state.

Weight averaging, ``safetensors`` and loops over a state dict's values expect nothing but tensors.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_lightning.chain.chain import Chain
from cola_lightning.chain.codec import STATE_DICT, check_version, describe, links_of, named_tensors
from cola_lightning.errors import UserError

EXTRA_STATE = "_extra_state"  # torch's name
ALIGNMENT = 16  # bytes


def pack(chain: Chain, **facts: Any) -> Tensor:
    """Packs a chain and additional JSON values: the length of a JSON header, the header, and all tensors.

    Shape:
        A vector of uint8.
    """
    tensors = named_tensors(chain.links)
    kinds = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()]
    description = describe(chain.links, chain.base, STATE_DICT.version)
    header = json.dumps(description | {"facts": facts, "tensors": kinds}).encode()
    begin = len(header).to_bytes(ALIGNMENT, "little"), header
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in begin]
    parts += [_bytes(value) for value in tensors.values()]
    return torch.cat([F.pad(part, (0, -len(part) % ALIGNMENT)) for part in parts])


def unpack(packed: Any) -> tuple[Chain, dict[str, Any]]:
    """The chain and the facts from :func:`pack`.

    Raises:
        UserError: if the tensor was cast or otherwise changed.
    """
    try:
        packed = packed.cpu()
        end = ALIGNMENT + int.from_bytes(packed[:ALIGNMENT].numpy().tobytes(), "little")
        description = json.loads(packed[ALIGNMENT:end].numpy().tobytes())
        check_version(description["format_version"], STATE_DICT, "the state dict")
        tensors, start = {}, end + -end % ALIGNMENT
        for name, kind, shape in description["tensors"]:
            dtype: torch.dtype = getattr(torch, kind)
            size = math.prod(shape) * dtype.itemsize
            tensors[name] = packed[start : start + size].clone().view(dtype).reshape(shape)
            start += size + -size % ALIGNMENT
        return Chain(*links_of(description, tensors)), description["facts"]
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"state_dict: expected a chain as state_dict() gives it, received a changed one ({error!r})") from error


def _bytes(value: Tensor) -> Tensor:
    plain = value.detach().cpu().contiguous().flatten()
    return (torch.view_as_real(plain).flatten() if plain.is_complex() else plain).view(torch.uint8)
