"""How FSDP2 and FSDP1 lay out a module over processes: frozen parameters are sharded, trained ones are replicated.

A link is small compared with its base. Replicated, as under DDP, it needs no gathering: not for a knot, which each process
applies to its own shard, nor for a checkpoint, which is written and read as on one device. Only its gradients must be averaged.
With full fine-tuning (``target_modules: null``), all is sharded, which needs FSDP2.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.errors import UserError
from cola_lightning.lora.layer import is_quantized_model, lora_layers
from cola_lightning.module.run import Run


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, such as a decoder's layers: the items of its outermost lists of more than single layers.

    Example:
        >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
        >>> len(repeated_blocks(nn.Sequential(nn.Linear(2, 2), blocks)))
        3
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        parts = list(child.children())
        is_list = isinstance(child, nn.ModuleList) and all(list(part.children()) for part in parts)
        blocks += parts if is_list else repeated_blocks(child)
    return blocks


@contextmanager
def without_trained(model: nn.Module) -> Iterator[None]:
    """Removes trained parameters from a model inside the block, so that ``fully_shard`` does not shard them."""
    named = [(module, list(module.named_parameters(recurse=False))) for module in model.modules()]
    trained = [(module, name, parameter) for module, own in named for name, parameter in own if parameter.requires_grad]
    for module, name, _ in trained:
        delattr(module, name)
    try:
        yield
    finally:
        for module, name, parameter in trained:
            module.register_parameter(name, parameter)


def replicate_trained(strategy: Strategy) -> None:
    """Adds :class:`ReplicatedTrainables` to the class of a strategy that shards parameters; others do not change.

    In place: the user gave it to the Trainer, under Lightning's name and with its own options.
    """
    if shards(strategy) and not isinstance(strategy, ReplicatedTrainables):
        strategy.__class__ = type(type(strategy).__name__, (ReplicatedTrainables, type(strategy)), {})


def check_sharding(strategy: Strategy, run: Run) -> None:
    """Refuses what a strategy does not support, before any model is made.

    Raises:
        UserError: for tensor parallelism, for FSDP1 with full fine-tuning, and for a module laid out for another strategy.
    """
    is_sharded = run.made is not None and layout.is_model_sharded(run.made.model)
    if run.is_wrapped_by_fsdp1 or (is_sharded and not isinstance(strategy, ModelParallelStrategy)):
        raise UserError("trainer.strategy: this module was sharded already. Load a new one (load_from_checkpoint)")
    mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
    if mesh is not None and (n_tensor := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"trainer.strategy: tensor parallelism is not supported, got tensor_parallel_size {n_tensor}. Use "
            f"data_parallel_size {mesh.size()} and tensor_parallel_size 1"
        )
    if isinstance(strategy, FSDPStrategy) and run.config.target_modules is None:
        raise UserError("trainer.strategy: fsdp does not work with model.target_modules null. Use ModelParallelStrategy or ddp")


def shards(strategy: Strategy) -> bool:
    """Whether a strategy shards parameters."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def shard_module(strategy: Strategy, run: Run, shard_model: Callable[[DeviceMesh], None]) -> None:
    """Shards a module's model, if the strategy shards and has not done so yet.

    Args:
        strategy: the Trainer's strategy.
        run: the module's, with its model.
        shard_model: shards the model under FSDP2.

    Raises:
        UserError: for a base that cannot be sharded.
    """
    if not shards(strategy):
        return
    if is_quantized_model(run.adapted.model):
        raise UserError("trainer.strategy: a 4-bit base cannot be sharded. Use ddp or one device")
    if isinstance(strategy, FSDPStrategy):
        if not run.is_wrapped_by_fsdp1:
            _configure_fsdp1(strategy, run.module)
        run.is_wrapped_by_fsdp1 = True
    elif not layout.is_model_sharded(run.adapted.model):
        mesh = cast(ModelParallelStrategy, strategy).device_mesh["data_parallel"]
        with without_trained(run.adapted.model) if run.config.target_modules is not None else nullcontext():
            shard_model(mesh)


class ReplicatedTrainables(Strategy):
    """A mixin for a strategy that shards parameters: trained parameters are replicated.

    Gradients are averaged before anything reads them. Checkpoints are written and read as under DDP: one file, the hooks in the
    same order, on any number of processes. Lightning's own way would gather by name, load before the chain is replayed, and
    take a step with a new optimizer.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def closure_and_average() -> Any:
            loss = closure()
            _average_gradients(optimizer)
            return loss

        return super().optimizer_step(optimizer, closure_and_average, *args, **kwargs)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return _gathered(Strategy.lightning_module_state_dict(self), is_writer=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        parts = state["state"].items()
        return state | {"state": {key: _gathered(part, is_writer=self.is_global_zero) for key, part in parts}}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {key: _laid_out_as(part, parameters[key]) for key, part in state["state"].items()}
            states.append(state | {"state": parts})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def _configure_fsdp1(strategy: FSDPStrategy, module: Any) -> None:
    """Configures FSDP1, which wraps the module later: what not to shard, where to wrap by default, and how to clip."""
    # Lightning wraps the whole module. As under FSDP2, what is outside of the model is replicated; a checkpoint contains it.
    inside = {id(parameter) for parameter in module.model.parameters()}
    replicated = [p for p in module.parameters() if p.requires_grad or id(p) not in inside]
    for layer in lora_layers(module).values():  # FSDP1 moves only what it shards
        if layer.stack is not None:
            layer.stack.apply_(lambda tensor: tensor.to(strategy.root_device))
    for parameter in replicated:
        parameter.data = parameter.data.to(strategy.root_device)
    strategy.kwargs["ignored_states"] = [*strategy.kwargs.get("ignored_states", ()), *replicated]
    if "auto_wrap_policy" not in strategy.kwargs and (blocks := repeated_blocks(module)):
        strategy.kwargs["auto_wrap_policy"] = ModuleWrapPolicy({type(block) for block in blocks})
    # Lightning refuses to clip by the norm, of which a shard has a part. What is trained here is whole on each process.
    strategy.precision_plugin.clip_grad_by_norm = Precision().clip_grad_by_norm  # type: ignore[method-assign]


def _average_gradients(optimizer: Optimizer) -> None:
    """Averages the gradients of replicated parameters; one that has a gradient on no process has none afterwards, either."""
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = [parameter for parameter in everything if not layout.is_sharded(parameter)]  # FSDP2 averages the others
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    is_used = gradients[0].new_tensor([p.grad is not None for p in parameters])
    layout.average_([*gradients, is_used])
    for parameter, gradient, used in zip(parameters, gradients, is_used, strict=True):
        if parameter.grad is None and used:  # on another process
            parameter.grad = gradient


def _gathered(state: Mapping[str, Any], *, is_writer: bool) -> dict[str, Any]:
    """The values by name, with sharded ones gathered, and retained only by the process that writes them."""
    whole = {}
    for name, value in state.items():
        is_sharded = isinstance(value, Tensor) and layout.is_sharded(value)
        found = layout.gather(value) if is_sharded else value
        if is_writer or not is_sharded:
            whole[name] = found
    return whole


def _laid_out_as(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """An optimizer's state of a parameter, with tensors of the parameter's shape in its layout."""
    return {
        name: layout.lay_out(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in state.items()
    }
