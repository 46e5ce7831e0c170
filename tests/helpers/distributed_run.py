"""What test_distributed.py runs on two processes, and the same on one.

``distributed_run.py FOLDER JOB ...`` is started as torchrun does; each process leaves what it holds in the folder. With
``TEST_DEVICE=cuda`` it runs on a GPU for each process, under NCCL.
"""

import os
import signal
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from cola_lightning import (
    ChainOfLoRA,
    COLACausalLM,
    COLAModule,
    COLAPreferenceLM,
    EpochDataModule,
    LastCheckpoint,
    PredictionWriter,
    TemplateDataModule,
    UserError,
    layout,
)
from cola_lightning.data.batch import collate_language
from cola_lightning.decoding import Decoding
from cola_lightning.hf import causal_lm, chunked_loss
from tests.helpers import tiny
from tests.helpers.toy import trainer

RANKS = [4, 2, 6]
WHOLE = {"chain": {}, "arguments": {"target_modules": None}}  # full fine-tuning
STACK = {"arguments": {"finished_links": "stack"}}
KEPT = {"arguments": {"kept_optimizer_state": 0.5}, "gradient_clip_val": None}
SHARE = {"chain": {"every_n_train_steps": 4, "knot": "half"}}
EXPERTS = {"model": "qwen3_moe", "arguments": {"experts": True}}
LLAMA_64 = {"model": "llama", "precision": "64-true"}
TIMEOUT = timedelta(seconds=60)
IS_ON_GPU = os.environ.get("TEST_DEVICE") == "cuda"

# Runs of three links, by names that end in their strategy: each is the run of one process, to rounding.
SAME = {
    "mlp-stack-ddp": STACK | {"precision": "64-true"},
    "llama-ddp": LLAMA_64,
    "share-fsdp2": SHARE,
    "whole-fsdp2": WHOLE,
    "llama-fsdp1": {"model": "llama"},
    "llama-fsdp2": {"model": "llama"},
    "mlp-stack-fsdp2": STACK,
}
SLOW = {  # by pytest -m slow
    "kept-fsdp2": KEPT,
    "idle-fsdp2": {"model": "idle", "arguments": {"modules_to_save": ["3"]}},
    "experts-stack-fsdp2": EXPERTS | {"arguments": {"experts": True, "finished_links": "stack"}},
    "experts-fsdp1": EXPERTS,
    "cnn-fsdp1": {"model": "cnn"},
    "gpt2-fsdp2": {"model": "gpt2"},
}

# Those that run on one process, too.
ALONE = ["mlp-stack-ddp", "whole-fsdp2", "mlp-stack-fsdp2", "llama-fsdp1"]

# Runs of one process that no checkpoint interrupts.
STAYED = {"stayed-64": LLAMA_64, "stayed": {"model": "llama"}, "stayed-whole": WHOLE}
# What goes on from another's checkpoint, by names that end in the strategy: that checkpoint, and the run that stayed.
MOVED = {
    "ddp-single": ("llama-ddp.step6", "stayed-64"),
    "ddp-single-ddp": ("ddp-single.step9", "stayed-64"),
    "fsdp2-single": ("llama-fsdp2.step6", "stayed"),
    "fsdp1-single": ("llama-fsdp1.step6", "stayed"),
    "single-fsdp2": ("stayed.step6", "stayed"),
    "single-fsdp1": ("stayed.step6", "stayed"),
    "whole-fsdp2-single": ("whole-fsdp2.step6", "stayed-whole"),
    "whole-single-fsdp2": ("stayed-whole.step6", "stayed-whole"),
}


def world():
    return int(os.environ.get("WORLD_SIZE", "1"))


class MLP(COLAModule):
    """Its 13 outputs are 7 and 6 on two processes; a subclass shards as it likes, and need not think of what is trained."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 6))

    def shard_model(self, mesh):
        fully_shard(self.model[0], mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def loss(self, batch):
        return F.mse_loss(self.model(batch["x"].to(self.dtype)), batch["y"].to(self.dtype))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return {"prediction": self.model(batch["x"]).sum(-1), "target": batch["y"].sum(-1)}


class CNN(MLP):
    """Rows of eight numbers as images of two by two, and 13 channels, 7 and 6 on two processes."""

    def build_model(self):
        first = nn.Conv2d(2, 13, 3, padding=1)
        return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), first, nn.Tanh(), nn.Flatten(1), nn.Linear(52, 6))

    def shard_model(self, mesh):
        fully_shard(self.model[1], mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Idle(MLP):
    """An MLP with a weight that is trained whole and has no gradient on any process."""

    def build_model(self):
        model = super().build_model().append(nn.Identity())
        model[3].weight = nn.Parameter(torch.ones(6))
        return model


class Diverse(MLP):
    """Its validation loss falls on one process as it rises on the other, and stands still in the mean."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (2.0 * self.global_rank - 1) * self.trainer.global_step)


class Decoder(MLP):
    """A tiny decoder with the language-model loss; it is sharded by its blocks."""

    shard_model = COLAModule.shard_model

    def __init__(self, architecture, **arguments):
        super().__init__(**arguments)
        self.architecture = architecture

    def build_model(self):
        import transformers

        return transformers.AutoModelForCausalLM.from_config(tiny.config(self.architecture))

    def loss(self, batch):
        logits = self.model(input_ids=batch["ids"][:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten())


class Data(EpochDataModule):
    """64 rows, 8 at a step on all processes together: 8 steps an epoch."""

    def __init__(self):
        super().__init__(batch_size=8 // world())

    def setup(self, stage):
        generator = torch.Generator().manual_seed(3)
        x, y = (torch.randn(64, size, generator=generator) for size in (8, 6))
        ids = torch.randint(2, 400, (64, 12), generator=generator)
        self.train = [{"x": x[k], "y": y[k], "ids": ids[k]} for k in range(64)]
        self.val = self.train[:8]
        self.test = self.train[:9]  # on two processes parts of five and four, in batches of four


class CPUFSDP(FSDPStrategy):
    """Lightning's, which refuses its own class on a CPU and no subclass of it, and names no CPU to FSDP1."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(timeout=TIMEOUT),
    "fsdp2": lambda: ModelParallelStrategy(world(), 1, timeout=TIMEOUT),
    "fsdp1": lambda: (FSDPStrategy if IS_ON_GPU else CPUFSDP)(timeout=TIMEOUT),
}


def make(model, **arguments):
    targets = ["1", "4"] if model == "cnn" else "all-linear"
    arguments = {"target_modules": targets, "rank": 6, "alpha": 8, "seed": 1} | arguments
    own = {"mlp": MLP, "idle": Idle, "cnn": CNN, "diverse": Diverse}
    return own[model](**arguments) if model in own else Decoder(model, **arguments)


def trainer_by(strategy, folder, *callbacks, **options):
    strategy = STRATEGIES[strategy]() if strategy in STRATEGIES else strategy
    options |= {"accelerator": "gpu" if IS_ON_GPU else "cpu"}
    return trainer(folder, *callbacks, devices=world(), strategy=strategy, **options)


def fit(folder, name, model="mlp", strategy="single", *, ckpt_path=None, chain=None, callbacks=(), arguments=None, **options):
    """Trains three links of four steps, and leaves checkpoints of step 6 (or 9) and the last, and what each process holds."""
    module, watch = make(model, **arguments or {}), Watch(folder, name)
    chain = {"every_n_train_steps": 4, "ranks": RANKS} if chain is None else chain
    rule = chain if isinstance(chain, ChainOfLoRA) else ChainOfLoRA(**chain)
    made = trainer_by(strategy, folder, watch, rule, *callbacks, **{"max_steps": 12, "gradient_clip_val": 0.5} | options)
    made.fit(module, datamodule=Data(), ckpt_path=ckpt_path and str(ckpt_path))
    made.save_checkpoint(folder / f"{name}.ckpt")
    torch.save(held(module) | {"losses": torch.tensor(watch.losses)}, folder / f"{name}.rank{made.global_rank}.pt")
    return module


class Watch(Callback):
    """Notes the training losses, as means over all processes, and saves a checkpoint inside a link and an epoch."""

    def __init__(self, folder, name):
        self.folder, self.name, self.losses = folder, name, []

    def on_train_batch_end(self, trainer, *args):
        self.losses.append(float(trainer.callback_metrics.get("train_loss", 0)))  # none before the first step
        if trainer.global_step == (9 if self.name == "ddp-single" else 6):
            trainer.save_checkpoint(self.folder / f"{self.name}.step{trainer.global_step}.ckpt")


def held(module):
    """What this process holds of a module: its layers' weights with all links in them, and what else is trained."""
    found = {}
    for layers in module.adapted.by_unit():
        for name, layer in layers.items():
            found[name] = layout.gather(layer.weight) + layer.delta_weight().cpu()
            if layer.stack is not None:
                A, B = layer.stack.factors
                delta = (B @ A).T if layer.weight_is_transposed else B @ A
                found[name] += delta.view(layer.delta_weight().shape).cpu()
    state = {name: layout.gather(value) for name, value in module.state_dict().items() if not name.startswith("chain.")}
    return found | {name: value for name, value in state.items() if ".lora_" not in name}


class Sent(TorchDispatchMode):
    """Notes what collectives carry: a kind of operation, and the bytes of the whole message."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else args[:1]
            flat = [part for tensor in tensors for part in (tensor if isinstance(tensor, list) else [tensor])]
            self.messages.append((func._opname, sum(tensor.nbytes for tensor in flat)))
        return func(*args, **(kwargs or {}))


class SentAtEachStep(Callback):
    """Notes what is sent in each step, from the end of the one before on: a knot comes between."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, *args):
        self.sent = Sent().__enter__()

    def on_train_batch_end(self, *args):
        self.on_train_end()
        self.steps.append(self.sent.messages)
        self.on_train_start()

    def on_train_end(self, *args):
        self.sent.__exit__(None, None, None)


def same(folder):
    """Every model, strategy and mode after three links."""
    for name, settings in SAME.items():
        fit(folder, name, strategy=name.rpartition("-")[2], **settings)
    fit(folder, "dropped", strategy="ddp", arguments={"dropout": 0.2})


def same_slow(folder):
    """The slow ones of them."""
    for name, settings in SLOW.items():
        fit(folder, name, strategy=name.rpartition("-")[2], **settings)


def alone(folder):
    """Some of them."""
    for name in ALONE:
        fit(folder, name, strategy=name.rpartition("-")[2], **SAME[name])


def moved(folder, *strategies):
    """Goes on from checkpoints of other numbers of processes and other strategies."""
    for name, (checkpoint, stayed) in MOVED.items():
        if (strategy := name.rpartition("-")[2]) in strategies:
            fit(folder, name, strategy=strategy, ckpt_path=folder / f"{checkpoint}.ckpt", **STAYED[stayed])


def resumed(folder):
    """The same on two processes."""
    moved(folder, "ddp", "fsdp2", "fsdp1")
    fit(folder, "dropped-resumed", strategy="ddp", ckpt_path=folder / "dropped.step6.ckpt", arguments={"dropout": 0.2})


def used_again(folder):
    """What a module and its Trainer can be used for after a fit by FSDP2: all but an export of its weights."""
    found = {}
    for name in ("merge", "stack"):
        module = make("mlp", finished_links=name)
        made = trainer_by("fsdp2", folder, Watch(folder, f"again-{name}"), chain={"every_n_train_steps": 4}, max_steps=10)
        made.validate(module, datamodule=Data())
        made.fit(module, datamodule=Data())
        made.save_checkpoint(folder / f"again-{name}.ckpt")
        made.validate(module, datamodule=Data())
        found |= {f"{name}, all": module.merged_model(), f"{name}, 1 link": module.merged_model(links=1)}
        if made.is_global_zero:
            module.export(folder / f"again-{name}", "chain")
        made.test(module, datamodule=Data(), ckpt_path=str(folder / f"again-{name}.step6.ckpt"))
        found[f"{name}, back"] = module.merged_model()
    found = {name: model.state_dict() for name, model in found.items()}
    torch.save(found, folder / f"again.rank{torch.distributed.get_rank()}.pt")


class Quantized(MLP):
    """An MLP whose first layer is in 4 bits."""

    def build_model(self):
        from bitsandbytes.nn import Linear4bit

        model = super().build_model()
        model[0] = Linear4bit(8, 13, quant_type="nf4").to("cpu")
        return model


def refused(folder):
    """What two processes say of what does not go together."""

    def fit_again(module, strategy, **options):
        trainer_by(strategy, folder, chain={}, max_steps=1, **options).fit(module, datamodule=Data())

    wrapped, sharded = (make("mlp", finished_links="stack") for _ in range(2))
    fit_again(wrapped, "fsdp1")
    fit_again(sharded, "fsdp2")
    cases = {
        "4 bits": lambda: fit_again(Quantized(rank=2, finished_links="stack"), "fsdp2"),
        "fsdp1 again": lambda: fit_again(wrapped, "fsdp1"),
        "another strategy": lambda: fit_again(sharded, "ddp"),
        "another precision": lambda: fit_again(sharded, "fsdp2", precision="bf16-true"),
        "merged": lambda: sharded.export(folder / "merged", "merged"),
        "peft": lambda: sharded.export(folder / "peft", "peft"),
    }
    found = {}
    for name, do in cases.items():
        try:
            do()
        except UserError as error:
            found[name] = str(error).partition(":")[0]
    torch.save(found, folder / f"refused.rank{torch.distributed.get_rank()}.pt")


class Killed(Callback):
    """The second process is gone without a word in the middle of the sixth step."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 5 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder):
    callbacks = [LastCheckpoint(every_n_train_steps=1), Killed()]
    fit(folder, "killed", strategy=folder.name, callbacks=callbacks, enable_checkpointing=True)


def counted(folder):
    """What is sent at each step, by strategy; a knot falls at step 4."""
    for strategy in ("ddp", "fsdp2"):
        sent = SentAtEachStep()
        fit(folder, f"counted-{strategy}", "gpt2", strategy, max_steps=6, gradient_clip_val=None, callbacks=[sent])
        torch.save(sent.steps, folder / f"counted-{strategy}.sent")


class OwnRule(ChainOfLoRA):
    """Knots by a metric of which each process has its own value."""

    def should_tie(self, epoch, global_step):
        return global_step % 8 == 0 and self.module.trainer.callback_metrics["val_loss"] < 0


def plateau(folder):
    """Knots by that loss."""
    for name, rule in {"plateau": ChainOfLoRA(patience=1), "own rule": OwnRule()}.items():
        settings = {"arguments": {"lr_schedule": "constant"}, "max_steps": -1, "max_epochs": 4}
        fit(folder, name, "diverse", "ddp", chain=rule, **settings)


def predicted(folder):
    """A run whose seed the first process draws, with dropout; what it predicts, by each strategy."""
    for strategy in ("ddp", "fsdp2"):
        settings = {"arguments": {"seed": None, "dropout": 0.2}, "callbacks": [PredictionWriter()]}
        module = fit(folder / strategy, "predicted", "mlp", strategy, **settings)
        module.trainer.predict(module, datamodule=Data())


@mock.patch.object(causal_lm, "ANSWER", Decoding(max_new_tokens=6, stop=("\n",)))
def written(folder):
    """Generated answers; the model and its rows lie in the folder."""
    for strategy in ("ddp", "fsdp2") if world() > 1 else ("single",):
        module = COLACausalLM(str(folder / "model"), target_modules=["q_proj"], rank=2, seed=0)
        data = TemplateDataModule(str(folder), prompt="The town {name} is", answer="answers", batch_size=4)
        made = trainer_by(strategy, folder / f"written-{strategy}", PredictionWriter(), chain={})
        (metrics,) = made.validate(module, datamodule=data, verbose=False)
        assert metrics.keys() == {"val_loss", "val_f1", "val_exact_match"}
        made.predict(module, datamodule=data)
        if strategy != "single":  # in a fit
            module = COLACausalLM(str(folder / "model"), rank=2, seed=0, generate_in_validation=True)
            data = TemplateDataModule(str(folder), prompt="The town {name} is", answer="answers", batch_size=2)
            made = trainer_by(strategy, folder, max_epochs=1, limit_train_batches=1)
            made.fit(module, datamodule=data)
            assert {"val_f1", "val_exact_match"} < made.callback_metrics.keys()


WEIGHED = {"links": {"chunked_loss": True}, "whole": {"chunked_loss": True, "target_modules": None}}


def weighed(folder):
    """A language model's steps of four batches of unequal sizes, over the processes; one computes its losses in one piece."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(2, 400, (n,), generator=generator).tolist(), "spans": [1, n]} for n in (4, 21, 9, 2) * 4
    ]
    batches = [collate_language(rows[k : k + 1 + k % 5], 0) for k in range(12)]
    chunked_loss.CHUNK = 4 * 400 * 7  # seven positions
    for strategy, (name, arguments) in product(("ddp", "fsdp2") if world() > 1 else ("single",), WEIGHED.items()):
        module = COLACausalLM(str(folder / "llama"), **{"rank": 2, "seed": 0} | arguments)
        module.chunked_loss = module.chunked_loss and world() > 1
        watch = Watch(folder, name := f"weighed-{name}-{strategy}")
        settings = {"max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False, "gradient_clip_val": 0.5}
        made = trainer_by(strategy, folder, watch, chain={}, accumulate_grad_batches=4 // world(), **settings)
        loader = DataLoader(batches[made.global_rank :: world()], batch_size=None)
        made.fit(module, loader, loader)
        losses = torch.tensor(watch.losses[4 // world() - 1 :: 4 // world()])
        torch.save(held(module) | {"losses": losses}, folder / f"{name}.rank{made.global_rank}.pt")


def preferred(folder):
    """Preference tuning with a reference that three knots move: six steps of four pairs, over the processes."""
    batches = [tiny.pair_batch(tiny.random_pairs(2, seed=k)) for k in range(12)]
    for strategy in ("ddp", "fsdp2") if world() > 1 else ("single",):
        module = COLAPreferenceLM(str(folder / "llama"), rank=2, seed=0, reference="link")
        watch, chain = Watch(folder, name := f"preferred-{strategy}"), {"every_n_train_steps": 2}
        settings = {"max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
        made = trainer_by(strategy, folder, watch, chain=chain, accumulate_grad_batches=2 // world(), **settings)
        loader = DataLoader(batches[made.global_rank :: world()], batch_size=None)
        made.fit(module, loader, loader)
        torch.save(held(module) | {"losses": torch.tensor(watch.losses[-1:])}, folder / f"{name}.rank{made.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if IS_ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if IS_ON_GPU else "gloo")
    for job in sys.argv[2:]:
        globals()[job](Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it exits
