"""The chain under the Trainer, against a hand-written loop and closed forms."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from cola_lightning import LastCheckpoint, UserError, lora_layers
from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.errors import NonFiniteError
from cola_lightning.lora.layer import initialize_link
from tests.helpers.toy import Toy, Watch, assert_bit_equal, batches, toy, trainer, weights


def hand_written_loop(steps, every, ranks, accumulate=1, clip=None, lr=1e-2, seed=0, max_rank=6, alpha=4):
    """COLA in plain torch: what the Trainer must compute, to the bit. Returns the parameters and each step's loss."""
    module = toy(rank=max_rank, alpha=alpha, seed=seed)
    module.configure_model()  # for its base and its first A alone
    named = dict(module.model.named_parameters())
    base = {name: (named[f"{name}.weight"], named[f"{name}.bias"]) for name in ("0", "2")}
    lora = {name: (named[f"{name}.lora_A"], named[f"{name}.lora_B"]) for name in ("0", "2")}
    data = list(batches())
    losses, link, done = [], -1, 0
    while done < steps:
        for start in range(0, len(data), accumulate):
            if done % every == 0:
                with torch.no_grad():
                    for name, (A, B) in lora.items() if link >= 0 else ():
                        r = ranks[link]
                        base[name][0].add_(alpha / r * (B[:, :r].contiguous() @ A[:r].contiguous()))
                link += 1
                initialize_link(lora_layers(module.model), seed, link, ranks[link], alpha)  # draws A, zeroes B
                parameters = [p for pair in lora.values() for p in pair]
                optimizer = AdamW(parameters, lr=lr)
            r = ranks[link]
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - done % every / every)
            for x, y in data[start : start + accumulate]:
                for name in ("0", "2"):
                    (W, b), (A, B) = base[name], lora[name]
                    x = F.linear(x, W, b) + F.linear(F.linear(x, A[:r]) * (alpha / r), B[:, :r])
                    x = torch.tanh(x) if name == "0" else x
                loss = F.mse_loss(x, y)
                losses.append(loss.item())
                (loss / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    return weights(module), losses


@pytest.mark.parametrize(
    ("accumulate", "clip", "ranks"),
    [(1, None, [6, 6, 6, 6]), (3, 0.05, [4, 2, 6, 3])],
    ids=["plain", "accumulation, clipping, ranks"],
)
def test_a_run_equals_a_hand_written_loop_to_the_bit(tmp_path, accumulate, clip, ranks):
    steps = 4 * math.ceil(10 / accumulate)
    every = steps // 4
    expected, losses = hand_written_loop(steps, every, ranks, accumulate, clip)
    module = toy(rank=6, optimizer=lambda p: AdamW(p, lr=1e-2))
    watch = Watch(lambda trainer, module: module.n_finished)
    chain = {"every_n_train_steps": every, "ranks": ranks}
    run = trainer(tmp_path, watch, chain=chain, max_epochs=4, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    run.fit(module, batches())
    assert module.n_finished == 3
    assert sorted(set(watch.seen)) == [0, 1, 2, 3]
    assert_bit_equal(weights(module), expected)
    assert run.callback_metrics["train_loss"].item() == pytest.approx(losses[-1], abs=1e-7)


class Manual(Toy):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.lr_schedulers().step()


def test_manual_optimization_has_the_same_links(tmp_path):
    manual, automatic = toy(Manual), toy()
    for module in (manual, automatic):
        trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=2).fit(module, batches())
    assert manual.n_finished == 4
    assert_bit_equal(weights(manual), weights(automatic))


class TwoOptimizers(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(Toy.training_step(self, batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 1e-2) for layer in self.adapted.layers.values()]


@pytest.mark.parametrize(("chain", "n_messages"), [({"every_n_train_steps": 4}, 1), ({"knots": 2}, 1), ({"at_epochs": [1]}, 0)])
def test_knots_by_the_steps_of_two_optimizers_are_warned_of(tmp_path, caplog, chain, n_messages):
    trainer(tmp_path, chain=chain, max_epochs=2).fit(toy(TwoOptimizers), batches())
    assert len([message for message in caplog.messages if "each of the 2 optimizers" in message]) == n_messages


def test_without_knots_and_without_the_callback_it_is_lora(tmp_path):
    with_callback, without = toy(), toy()
    trainer(tmp_path, chain={}, max_epochs=2).fit(with_callback, batches())
    trainer(tmp_path, max_epochs=2).fit(without, batches())
    assert_bit_equal(weights(with_callback), weights(without))


def test_a_chain_beside_weights_that_are_trained_is_refused(tmp_path):
    module = toy()
    module.configure_model()
    module.freeze()
    module.unfreeze()
    with pytest.raises(UserError, match=r"model: .* must be frozen"):
        trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())


@pytest.mark.parametrize("next_is", ["a step", "a checkpoint", "a knot", "the end"])
def test_a_nan_stops_the_run_names_its_step_and_is_never_written(tmp_path, next_is):
    class Poisoned(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step == 13 else loss

    module = toy(Poisoned)
    every = 1 if next_is == "a checkpoint" else 5
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, save_last=True, every_n_train_steps=every)
    knots, max_steps = 7 if next_is == "a knot" else 5, 14 if next_is == "the end" else -1
    chain, settings = {"every_n_train_steps": knots}, {"max_epochs": 3, "max_steps": max_steps, "enable_checkpointing": True}
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 13 \(epoch 1\), in link {13 // knots}"):
        trainer(tmp_path, checkpoint, chain=chain, **settings).fit(module, batches())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for name, value in state.items() if not name.startswith("chain."))
    assert all(torch.isfinite(factor).all() for link in module.chain.links for pair in link.factors.values() for factor in pair)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_refused_beside_knots_and_without_them_a_checkpoint_has_the_runs_own_position(tmp_path):
    for rule in ({"at_steps": [3]}, {"patience": 1}):
        with pytest.raises(UserError, match=r"trainer\.callbacks: EMAWeightAveraging cannot be combined with knots"):
            trainer(tmp_path, EMAWeightAveraging(), chain=rule, max_epochs=1).fit(toy(), batches())
    by_hand = Watch(lambda trainer, module: trainer.global_step == 3 and module.tie_knot())
    with pytest.raises(UserError, match=r"trainer\.callbacks: EMAWeightAveraging cannot be combined with knots"):
        trainer(tmp_path, EMAWeightAveraging(), by_hand, max_epochs=1).fit(toy(), batches())
    saving = ModelCheckpoint(dirpath=tmp_path, filename="5", every_n_train_steps=5)
    module = toy()
    trainer(tmp_path, EMAWeightAveraging(), saving, chain={}, max_steps=5, enable_checkpointing=True).fit(module, batches())
    module.tie_knot()  # of the averaged weights
    state = StoredState.of(torch.load(tmp_path / "5.ckpt", weights_only=True)["state_dict"])
    assert state.facts.position == (0, 5)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_weights_that_are_averaged_at_the_end_are_in_the_last_checkpoint(tmp_path):
    module, averaging = toy(), StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, device=None)
    trainer(tmp_path, averaging, LastCheckpoint(), max_epochs=4, enable_checkpointing=True).fit(module, batches())
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert_bit_equal(weights(Toy.load_from_checkpoint(path)), weights(module))


def test_what_a_run_never_reaches_is_a_warning(tmp_path, caplog):
    trainer(tmp_path, chain={"every_n_epochs": 3}, max_epochs=2).fit(toy(), batches())
    assert "ends before its first knot" in caplog.text


class Net(nn.Module):
    """Calls one layer, reads the weights of the next, and takes one of two experts, by the batch."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 12), nn.Linear(12, 12)
        self.experts = nn.ModuleList([nn.Linear(12, 6), nn.Linear(12, 6)])
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        h = F.linear(self.called(x), self.read.weight, self.read.bias)
        return self.experts[self.n_calls % 2](h.tanh())


class NetToy(Toy):
    def build_model(self):
        return Net()


def test_a_layer_that_gets_no_gradient_is_named_once_a_fit_unless_the_user_froze_it(tmp_path, caplog):
    def named(module):
        caplog.clear()
        trainer(tmp_path, chain={}, max_steps=3, accumulate_grad_batches=2).fit(module, batches())  # and so with both experts
        return [message for message in caplog.messages if "got no gradient" in message]

    module = toy(NetToy)
    for _ in range(2):
        (message,) = named(module)
        assert message.startswith("model.target_modules: 1 of 4 ")
        assert "(read)" in message
    module.model.read.requires_grad_(False)
    assert named(module) == named(toy(dropout=0.1)) == named(toy(target_modules=None)) == []


class Halving(Toy):
    """Gives each link half of the finished one's rank, and notes what it was called with."""

    def on_knot(self, link):
        assert self.n_finished == link.index + 1
        self.restart_link(rank=link.rank // 2)
        self.log("finished_rank", float(link.rank))


class Listener(Callback):
    def __init__(self):
        self.seen = []

    def on_knot(self, trainer, pl_module, link):
        self.seen.append((trainer.global_step, link.rank, pl_module.adapted.current.rank))

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/6.ckpt")


@pytest.mark.parametrize("kept", [0, 0.5])
def test_on_knot_is_called_after_each_knot_and_a_link_begun_again_there_is_the_one_of_that_rank_and_resumes(tmp_path, kept):
    by_schedule, whole, resumed = (toy(cls, rank=4, kept_optimizer_state=kept) for cls in (Toy, Halving, Halving))
    chain, listener = {"every_n_train_steps": 4}, Listener()
    trainer(tmp_path, chain=chain | {"ranks": [4, 2, 1]}, max_steps=12).fit(by_schedule, batches(3))
    run = trainer(tmp_path, listener, chain=chain, max_steps=12)
    run.fit(whole, batches(3))
    assert listener.seen == [(4, 4, 2), (8, 2, 1)]
    assert run.callback_metrics["finished_rank"] == 2
    assert_bit_equal(weights(whole), weights(by_schedule))
    trainer(tmp_path, chain=chain, max_steps=12).fit(resumed, batches(3), ckpt_path=tmp_path / "6.ckpt")
    assert_bit_equal(weights(resumed), weights(whole))
