"""What training holds and sends where a model is larger than the machine at hand: computed from its configuration alone.

    python -m benchmarks.scale

plans LoRA, chains and full fine-tuning on one GPU in a minute, without weights and without a GPU. Links of rank 8 on the
queries and values, two in a chain; 8 rows of 512 tokens, padded on the left, with a loss at one position a row; AdamW; a base
in bf16, but weights that something is added to in float32, under bf16-mixed: the adapted ones with ``finished_links: merge``,
all in full fine-tuning. ``COLA float32`` is a base in float32 under bf16-mixed.

* ``memory``, bytes on a GPU: ``base``: the model's weights; ``links``: A and B in float32; ``stack``: the finished link beside
  the weights in bf16, as will be each further one; ``gradients`` and ``optimizer``: 4 and 8 bytes a trained parameter. What
  kernels need for a moment is not counted.
* ``base_in_4_bits``: those of the base where its linear layers, but for the head, are in nf4.
* ``activations``, bytes that autograd keeps from the forward to the backward pass: each storage once, counted in a forward pass
  on fake tensors, which have shapes and dtypes but no memory. ``copies``, among them: what does not grow with the batch, copies
  of weights in bf16. ``checkpointed``: with activation checkpointing, and what one block keeps, or, where they are more, the
  copies of trained weights, which autocast holds until the forward pass ends.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # as torch's documentation imports it
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from benchmarks import steps
from benchmarks.lines import Lines, Rows, main
from cola_lightning import LoRAConfig, inject_lora, lora_layers
from cola_lightning.hf.logits import logits_at

FILE = Path(__file__).with_suffix(".jsonl")
TARGETS, RANK, ALPHA, ROWS, LENGTH = ["q_proj", "v_proj"], 8, 16, 8, 512

# From the config.json of facebook/opt-1.3b, and in meta-llama of Llama-3.2-1B, Llama-3.2-3B, Llama-2-7b-hf and Meta-Llama-3-8B.
OPT: dict[str, Any] = {
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
}
LLAMA: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
SMALL = LLAMA_3 | {"intermediate_size": 8192, "tie_word_embeddings": True}
MODELS: dict[str, PretrainedConfig] = {
    "OPT-1.3B": OPTConfig(vocab_size=50272, max_position_embeddings=2048, dropout=0.1, **OPT),
    "Llama-3.2-1B": LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, **SMALL),
    "Llama-3.2-3B": LlamaConfig(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, **SMALL),
    "Llama-2-7B": LlamaConfig(vocab_size=32000, intermediate_size=11008, num_key_value_heads=32, **LLAMA),
    "Llama-3-8B": LlamaConfig(intermediate_size=14336, **LLAMA, **LLAMA_3),
}
BYTES_IN_4_BITS = 1 / 2 + 4 / 64  # of a weight's element: 4 bits, and a float32 scale for 64 of them


@dataclass(frozen=True)
class Method:
    """A way to tune a model: what becomes of finished links (None: it has no links), and how many there are."""

    name: str
    finished_links: Literal["merge", "stack"] | None
    n_finished: int = 0
    dtype: torch.dtype = torch.bfloat16  # of the base

    @property
    def is_autocast(self) -> bool:
        """Whether there are float32 weights, to be computed with in bf16."""
        return self.finished_links != "stack"


METHODS = [Method("LoRA", "stack"), Method("COLA merge", "merge", 1), Method("COLA stack", "stack", 1)]
METHODS += [Method("COLA float32", "merge", 1, torch.float32), Method("full fine-tuning", None, 0, torch.float32)]


def build(config: PretrainedConfig, method: Method, device: str = "meta") -> nn.Module:
    """The model as it is trained, with its finished links; on the meta device it takes no memory."""
    with torch.device(device):
        model: nn.Module = steps.build(config, dtype=method.dtype, attn_implementation="sdpa").train()
    if method.finished_links is not None:
        inject_lora(model, LoRAConfig(TARGETS, rank=RANK, alpha=ALPHA, finished_links=method.finished_links))
    for layer in lora_layers(model).values():
        for _ in range(method.n_finished):
            if layer.stack is not None:
                layer.stack.push(*layer.factors, layer.scaling)
    return model


def sizes(model: nn.Module) -> dict[str, int]:
    """The number of trained parameters, and bytes, tied weights once.

    ``base`` are the model's own weights, ``links`` A and B; in ``base_in_4_bits`` the linear layers of its blocks are in nf4.
    """
    layers = lora_layers(model).values()
    blocks = max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len)
    base = sum(p.nbytes for name, p in model.named_parameters() if not name.endswith(("lora_A", "lora_B")))
    linear = [part.weight for part in blocks.modules() if isinstance(part, nn.Linear)]
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base": base,
        "links": sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers),
        "stack": sum(layer.stack.A.nbytes + layer.stack.B.nbytes for layer in layers if layer.stack is not None),
        "base_in_4_bits": base + sum(round(weight.numel() * BYTES_IN_4_BITS) - weight.nbytes for weight in linear),
    }


class AsOnAGPU(TorchFunctionMode):
    """What is otherwise on the CPU, as whose tensors fake ones behave: dropout's mask, and layer norms under autocast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keeps a mask of one byte an element, and widens what autocast widens there."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], True)[0] if kwargs["training"] and kwargs["p"] else args[0]
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            kwargs = {name: arg.float() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def saved_bytes(model: nn.Module, rows: int, length: int, *, is_autocast: bool) -> int:
    """Bytes that autograd keeps from a forward pass to its backward pass, beside what the model holds: each storage once."""
    stacks = [layer.stack for layer in lora_layers(model).values() if layer.stack is not None]
    held = [*model.parameters(), *model.buffers(), *(factor for stack in stacks for factor in (stack.A, stack.B))]
    known = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}  # type: ignore[no-untyped-call]
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()  # type: ignore[no-untyped-call]
        return tensor

    ids, mask = (torch.ones(rows, length, dtype=torch.long) for _ in range(2))
    mask[0, 0] = 0  # padding: with a mask, attention takes other kernels
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with AsOnAGPU(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast), hooks:
        logits = logits_at(model, {"input_ids": ids, "attention_mask": mask}, 1)
        loss = F.cross_entropy(logits[:, 0], ids[:, -1])
    assert loss.requires_grad  # so far all that was saved is alive, and no storage has another's address
    return sum(size for storage, size in saved.items() if storage not in known)


def activations(config: PretrainedConfig, method: Method, rows: int = ROWS, length: int = LENGTH) -> dict[str, int]:
    """Counts them on fake tensors of the CPU, whose autocast and whose choice of attention's kernel are real."""

    def count(n_blocks: int) -> list[int]:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = n_blocks
        model: Any = build(shallow, method)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.tie_weights()  # which to_empty has untied
            found = [saved_bytes(model, n, length, is_autocast=method.is_autocast) for n in (rows, 2 * rows)]
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
            return found + [saved_bytes(model, n, length, is_autocast=method.is_autocast) for n in (rows, 2 * rows)]

    everything, of_twice, inputs, inputs_of_twice = count(config.num_hidden_layers)
    two, _, input_of_two, _ = count(2)
    one, _, input_of_one, _ = count(1)  # the first block is no measure: autograd keeps less of what the embeddings give it
    block = (two - input_of_two) - (one - input_of_one)
    copies = 2 * everything - of_twice
    held = copies - (2 * inputs - inputs_of_twice) if method.finished_links is None else 0
    return {"all": everything, "copies": copies, "checkpointed": inputs + max(block, held)}


def plan(name: str, method: Method) -> dict[str, Any]:
    """The result of a model and a method; the memory is without activations."""
    parts = sizes(build(MODELS[name], method))
    memory = {part: parts[part] for part in ("base", "links", "stack")}
    memory |= {"gradients": 4 * parts["trained"], "optimizer": 8 * parts["trained"]}
    found: dict[str, Any] = {"model": name, "method": method.name, "trained": parts["trained"], "memory": memory}
    return found | {"base_in_4_bits": parts["base_in_4_bits"], "activations": activations(MODELS[name], method)}


COLUMNS = ["model", "full fine-tuning", "float32", "a chain", "`stack`", "`stack`, one row"]
COLUMNS += ["`stack`, checkpointing", "nf4, checkpointing"]


def rows(results: list[dict[str, Any]]) -> Rows:
    """GB of training on one GPU, by the options that save memory."""
    found = {(result["model"], result["method"]): result for result in results}
    table = []
    for model in dict.fromkeys(model for model, _ in found):
        full, wide, merge, stack = (
            found[model, method] for method in ("full fine-tuning", "COLA float32", "COLA merge", "COLA stack")
        )
        held, kept = sum(stack["memory"].values()), stack["activations"]
        of_row = kept["copies"] + (kept["all"] - kept["copies"]) // ROWS
        quantized = held - stack["memory"]["base"] + stack["base_in_4_bits"]
        totals = [sum(each["memory"].values()) + each["activations"]["all"] for each in (full, wide, merge)]
        totals += [held + kept["all"], held + of_row, held + kept["checkpointed"], quantized + kept["checkpointed"]]
        table.append([model, *(_gb(size) for size in totals)])
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.{2 if size < 1e9 else 1}f}"


def run(lines: Lines) -> None:
    """Computes what no line has."""
    torch.set_num_threads(1)
    for method in METHODS:
        for one in lines.missing({"model": name, "method": method.name} for name in MODELS):
            lines.add(plan(one["model"], method))


if __name__ == "__main__":
    main(__doc__, FILE, run, [(COLUMNS, rows)])
