"""Other people's LightningModules as chains: a stand-in for them, and a real one of torchgeo (``pytest -m slow``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

from cola_lightning import COLACausalLM, COLAModule, EpochDataModule, UserError
from cola_lightning.cli import main
from tests.helpers import foreign_tasks, tiny
from tests.helpers.foreign_tasks import Pictures, fit
from tests.helpers.forked import as_torchrun
from tests.helpers.resuming import last
from tests.helpers.toy import assert_bit_equal, toy, weights


class Task(LightningModule):
    """Written as torchgeo's are, and knows nothing of chains."""

    def __init__(self, width=8, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.configure_models()
        self.criterion = nn.CrossEntropyLoss()
        self.train_metrics = MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro")}, prefix="train_")
        self.val_metrics = self.train_metrics.clone(prefix="val_")
        self.sizes = []

    def configure_models(self):
        width = self.hparams["width"]
        self.model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    def forward(self, *args):
        return self.model(*args)

    def training_step(self, batch, batch_idx):
        return self.evaluate(batch, self.train_metrics, "train_loss")

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, self.val_metrics, "val_loss")

    def evaluate(self, batch, metrics, name):
        logits = self(batch["image"])
        loss = self.criterion(logits, batch["label"])
        self.sizes.append(len(logits))
        self.log(name, loss, batch_size=len(logits))
        metrics(logits, batch["label"])
        self.log_dict(metrics, batch_size=len(logits))
        return loss


class ChainedTask(Task, COLAModule):
    __init__ = COLAModule.__init__

    def build_model(self):
        return self.adopt(Task(width=64)).model


class Rows(EpochDataModule):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(3)
        images, labels = torch.randn(56, 8, generator=generator), torch.randint(3, (56,), generator=generator)
        rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        self.train, self.val = rows[:40], rows[40:]


def chained(cls=ChainedTask, **arguments):
    return toy(cls, **{"target_modules": ["0"], "modules_to_save": ["4"]} | arguments)


def test_only_the_links_of_a_foreign_module_are_trained_by_its_own_optimizer_and_measured_by_its_own_metrics(tmp_path):
    module, rows = chained(), Rows(4)
    before = weights(module)
    run = fit(tmp_path, module, rows)
    changed = {name for name, value in weights(module).items() if name not in before or not torch.equal(value, before[name])}
    statistics = {f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"model.0.weight", "model.0.lora_A", "model.0.lora_B", "model.4.weight", "model.4.bias", *statistics}
    (optimizer,) = run.optimizers
    assert (type(optimizer), optimizer.defaults["momentum"]) == (torch.optim.SGD, 0.9)
    assert type(run.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.ReduceLROnPlateau
    assert (len(module.chain), module.hparams, len(module.sizes)) == (1, {"width": 64, "lr": 0.1}, 2 * (10 + 4))
    images, labels = (torch.stack([row[name] for row in rows.val]) for name in ("image", "label"))
    expected = multiclass_accuracy(module.eval()(images), labels, 3, average="micro")
    assert run.callback_metrics["val_accuracy"] == expected
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} == run.callback_metrics.keys()


def test_a_checkpoint_of_a_foreign_module_has_no_frozen_weight_and_gives_it_back_and_resumes_to_the_bit(tmp_path):
    module = chained()
    run = fit(tmp_path, module, Rows(4))
    state = torch.load(last(tmp_path), weights_only=True)["state_dict"]
    factors = {f"model.0.lora_{factor}" for factor in "AB"}
    assert {name for name in state if not name.startswith("chain.")} == {
        *factors,
        *(f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        *(f"model.4.{name}" for name in ("weight", "bias")),
    }
    fit(tmp_path / "part", chained(), Rows(4), stop=13)
    resumed = chained()
    again = fit(tmp_path / "again", resumed, Rows(4), ckpt_path=last(tmp_path / "part"))
    assert_bit_equal(weights(resumed), weights(module))
    assert again.callback_metrics["val_loss"] == run.callback_metrics["val_loss"]
    assert again.optimizers[0].param_groups[0]["lr"] == run.optimizers[0].param_groups[0]["lr"]

    loaded = ChainedTask.load_from_checkpoint(last(tmp_path))
    assert_bit_equal(weights(loaded), weights(module))
    assert (loaded.hparams, loaded.run.config) == (module.hparams, module.run.config)
    assert run.validate(loaded, datamodule=Rows(4), verbose=False)[0]["val_loss"] == run.callback_metrics["val_loss"]
    merged = loaded.merged_model()
    assert {type(part) for part in merged} == {nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout}
    rows = torch.ones(3, 8)
    torch.testing.assert_close(merged.eval()(rows), module.eval()(rows))
    theirs = Task(width=64)
    theirs.model.load_state_dict(merged.state_dict())  # as it was before there was a chain


class Parts(Task):
    """Has its network in two parts, none of which is called ``model``, and makes them in ``configure_model``, as for FSDP."""

    def configure_models(self):
        self.backbone = self.head = None

    def configure_model(self):
        if self.backbone is None:
            self.backbone, self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, *args):
        return self.head(self.backbone(*args))


class ChainedParts(Parts, COLAModule):
    __init__ = COLAModule.__init__
    configure_model = COLAModule.configure_model
    configure_optimizers = COLAModule.configure_optimizers

    def build_model(self):
        task = Parts()
        task.configure_model()
        return self.adopt(task).backbone


def test_a_part_is_the_base_and_the_rest_is_fully_trained_by_this_packages_optimizer_if_a_line_says_so(tmp_path):
    module = chained(ChainedParts, modules_to_save=[])
    before = weights(module)
    run = fit(tmp_path, module, Rows(4))
    assert type(run.optimizers[0]) is torch.optim.AdamW
    assert module.backbone is module.model
    after = weights(module)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(module.merged_model(0)[0].weight, before["model.0.weight"])
    names = {name for name in module.state_dict() if not name.startswith("chain.")}
    assert names == {"model.0.lora_A", "model.0.lora_B", "head.weight", "head.bias"}
    loaded = ChainedParts.load_from_checkpoint(last(tmp_path))
    assert_bit_equal(weights(loaded), after)


def test_a_foreign_module_is_trained_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", f"{__name__}.ChainedTask", "--model.rank", "2", "--model.target_modules", "['0']"]
    data = ["--data", f"{__name__}.Rows", "--data.batch_size", "4"]
    assert main(["fit", *model, *data, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"]) == 0
    assert main(["export", "runs/version_0", "--format", "merged", "--output", "merged"]) == 0
    names = Task(width=64).model.state_dict().keys()
    assert load_file("merged/model.safetensors").keys() == names


class Reversed(COLAModule, Task):
    build_model = ChainedTask.build_model


class Backbone(ChainedTask):
    def build_model(self):
        return self.adopt(Task()).model[:2]


class Forgetful(Task, COLAModule):
    """Its constructor is Task's, which takes no option of a link."""

    build_model = ChainedTask.build_model


def having(name, value):
    """A chain of a module with an attribute that is also one of COLAModule's."""

    class Having(ChainedTask):
        def build_model(self):
            task = Task()
            setattr(task, name, value)
            return self.adopt(task).model

    return Having


def test_a_class_whose_constructor_takes_no_option_of_a_link_is_refused():
    with pytest.raises(UserError, match="Forgetful needs the line"):
        Forgetful()


def test_an_option_that_a_constructor_does_not_pass_on_is_named(caplog):
    class Losing(ChainedTask):
        def __init__(self, width=16, **cola):
            Task.__init__(self)

    Losing(rank=3, width=8)
    assert "rank has no effect: the __init__ of Losing" in caplog.text
    caplog.clear()
    ChainedTask(rank=3)
    assert "no effect" not in caplog.text


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Reversed, r"adopt: Reversed must be a class \(Task, COLAModule\), with Task first"),
        (having("seed", 3), "adopt: Task has an attribute 'seed', which is COLAModule's own"),
        (having("step_loss", nn.MSELoss()), "adopt: Task has an attribute 'step_loss', which is COLAModule's own"),
        (Backbone, "model: .*target_modules and modules_to_save choose its parts"),
    ],
)
def test_a_class_that_would_use_another_optimizer_loss_or_part_without_a_word_is_refused(cls, message):
    with pytest.raises(UserError, match=f"^{message}"):
        chained(cls, modules_to_save=[]).configure_model()


# ---------------------------------------------------------------------- encoder-decoders


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_the_example_of_an_encoder_decoder_trains_a_t5_and_exports_it_and_no_causal_model_takes_it(tmp_path, monkeypatch):
    sizes = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    folder = str(tmp_path / "t5")
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special)).save_pretrained(folder)
    tiny.tokenizer("gpt2", pad=True).save_pretrained(folder)
    with pytest.raises(UserError, match=r"^model\.model_name: AutoModelForCausalLM cannot load"):
        COLACausalLM(folder, rank=2).configure_model()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": __name__}
    exec((foreign_tasks.ROOT / "examples" / "encoder_decoder.py").read_text().replace("google-t5/t5-small", folder), names)
    module = names["module"]
    assert len(module.chain) == 1
    assert all(link.norm() > 0 for link in module.full_chain().links)
    assert {name.rpartition(".")[2] for name in module.adapted.layers} == {"q", "v"}
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("my_t5")
    batch = next(iter(names["loader"]))
    module.eval()
    torch.testing.assert_close(model(**batch).logits, module(**batch).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(**batch).logits, module.merged_model(0).eval()(**batch).logits, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- a real one


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_real_module_trains_its_links_by_its_own_optimizer_and_resumes_to_the_bit_and_runs_on_two_processes(tmp_path):
    module = foreign_tasks.segmentation()
    before = weights(module)
    run = fit(tmp_path / "whole", module, Pictures(batch_size=2))
    after = weights(module)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    adapted = {f"model.{name}.weight" for name in module.adapted.layers}  # changed by the knot
    assert changed - adapted <= module.state_dict().keys()
    assert {f"model.{name}.lora_B" for name in module.adapted.layers} <= changed
    assert len(module.chain) == 1
    assert type(run.optimizers[0]) is torch.optim.AdamW
    assert "val_MulticlassJaccardIndex" in run.callback_metrics
    assert_bit_equal(weights(type(module).load_from_checkpoint(last(tmp_path / "whole"))), after)

    fit(tmp_path / "part", foreign_tasks.segmentation(), Pictures(batch_size=2), stop=6)
    resumed = foreign_tasks.segmentation()
    again = fit(tmp_path / "again", resumed, Pictures(batch_size=2), ckpt_path=last(tmp_path / "part"))
    assert_bit_equal(weights(resumed), after)
    assert again.callback_metrics["val_loss"] == run.callback_metrics["val_loss"]

    command = [sys.executable, foreign_tasks.__file__, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment) for environment in as_torchrun(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    names = [name for name in first if name in dict(module.named_parameters())]
    assert_bit_equal({name: first[name] for name in names}, {name: second[name] for name in names})


@pytest.mark.slow
def test_the_example_of_optuna_finds_a_learning_rate(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs pip install optuna")
    monkeypatch.chdir(foreign_tasks.ROOT)  # where the config's class paths begin
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    shorter = {
        "studies/optuna": str(tmp_path),
        "n_trials=6": "n_trials=2",
        '"examples/digits.yaml"': '"examples/digits.yaml", "--trainer.max_epochs=10"',
    }
    example, names = (foreign_tasks.ROOT / "examples" / "rates_by_optuna.py").read_text(), {"__name__": __name__}
    for stated, short in shorter.items():
        assert stated in example
        example = example.replace(stated, short)
    exec(example, names)
    assert [trial.state.name for trial in names["study"].trials] == ["COMPLETE"] * 2
    assert 0.2 < names["study"].best_value <= 1
