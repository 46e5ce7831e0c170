"""The chain under the Trainer, against a hand-written loop and closed forms."""

import copy
import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from cola_lightning import ChainOfLoRA, UserError, lora_layers
from cola_lightning.callbacks import check_strategy
from cola_lightning.chain.link import begin_link
from cola_lightning.chain.schedule import frozen_factor
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


class Watch(Callback):
    """Runs a function at the start of each batch, after the knot if there is one."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(self.look(trainer, module))


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
                begin_link(lora_layers(module.model), seed, link, ranks[link], alpha)  # draws A, zeroes B
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
                torch.nn.utils.clip_grad_norm_(parameters, clip)
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
    watch = Watch(lambda trainer, module: module.link)
    chain = {"every_n_train_steps": every, "ranks": ranks}
    run = trainer(tmp_path, watch, chain=chain, max_epochs=4, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    run.fit(module, batches())
    assert module.link == 3
    assert sorted(set(watch.seen)) == [0, 1, 2, 3]
    assert_bit_equal(weights(module), expected)
    assert run.callback_metrics["train_loss"].item() == pytest.approx(losses[-1], abs=1e-7)


def test_a_knot_keeps_the_function():
    module = toy(rank=3)
    module.configure_model()
    x = next(iter(batches()))[0]
    for layer in lora_layers(module.model).values():
        torch.nn.init.normal_(layer.lora_B)
    before = module.model(x)
    link = module.tie_knot()
    after = module.model(x)
    assert ((after - before).norm() / before.norm()).item() < 1e-6
    assert (link.index, module.link, len(module.chain)) == (0, 1, 1)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("64-true", 1e-10)])
def test_the_weights_move_by_the_sum_of_the_links(tmp_path, precision, tolerance):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module = toy(rank=2, optimizer=lambda p: AdamW(p, lr=3e-2))
    module.configure_model()
    base = {name: layer.weight.detach().double().clone() for name, layer in lora_layers(module.model).items()}
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=5, precision=precision).fit(module, batches(dtype=dtype))
    module.tie_knot()
    assert len(module.chain) == 5
    for name, layer in lora_layers(module.model).items():
        moved = layer.weight.detach().double() - base[name]
        delta = module.chain.delta(name).double()
        scale = delta.norm() if precision == "64-true" else base[name].norm()
        assert (moved - delta).norm() / scale < tolerance
        ranks = [torch.linalg.matrix_rank(link.delta(name)).item() for link in module.chain.links]
        assert max(ranks) <= 2 < torch.linalg.matrix_rank(delta) <= module.chain.total_rank(name) == 10


def test_after_a_knot_everything_of_a_link_is_new(tmp_path):
    def look(trainer, module):
        (optimizer,) = trainer.optimizers
        layers = lora_layers(module.model).values()
        frozen = [p.grad is None for p in module.parameters() if not p.requires_grad]
        return (
            module.link,
            optimizer,
            len(optimizer.state),
            optimizer.param_groups[0]["lr"],
            all(layer.lora_A.any() for layer in layers),
            any(layer.lora_B.any() for layer in layers),
            all(frozen),
            [layer.lora_B.grad is not None and bool(layer.lora_B.grad.any()) for layer in layers],
        )

    class Gradients(Watch):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append(all(layer.lora_B.grad.any() for layer in lora_layers(module.model).values()))

        def on_train_batch_start(self, *_):
            pass

    watch, gradients = Watch(look), Gradients(None)
    module = toy(optimizer=lambda p: AdamW(p, lr=1e-2), lr_schedule="linear")
    trainer(tmp_path, watch, gradients, chain={"every_n_train_steps": 5}, max_steps=20).fit(module, batches())
    assert len(watch.seen) == 20
    for step, (link, _, n_states, lr, has_A, has_B, is_frozen, _) in enumerate(watch.seen):
        first = step % 5 == 0
        assert link == step // 5
        assert lr == pytest.approx(1e-2 * (1 - step % 5 / 5))
        assert (n_states, has_B) == ((0, False) if first else (4, True))
        assert has_A
        assert is_frozen
    assert len({seen[1] for seen in watch.seen}) == 4
    assert all(gradients.seen)


def test_two_runs_of_one_seed_are_equal_and_the_global_generator_does_not_matter(tmp_path):
    def run(disturb, seed=5, dropout=0.3):
        module = toy(seed=seed, dropout=dropout)
        watch = Watch(lambda trainer, module: torch.rand(disturb * trainer.global_step) if disturb else None)
        trainer(tmp_path, watch, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches())
        return module

    one, two = run(disturb=0), run(disturb=0)
    assert_bit_equal(weights(one), weights(two))
    disturbed, other = run(disturb=3, dropout=0.0), run(disturb=0, dropout=0.0)
    assert_bit_equal(weights(disturbed), weights(other))
    assert not torch.equal(run(disturb=0, seed=6).model[0].lora_A, one.model[0].lora_A)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ({"every_n_epochs": 2}, [0, 20, 40]),
        ({"every_n_train_steps": 15}, [0, 15, 30, 45]),
        ({"at_epochs": [1, 4]}, [0, 10, 40]),
        ({"at_steps": [3, 17]}, [0, 3, 17]),
        ({}, [0]),
    ],
    ids=str,
)
def test_knots_fall_where_the_schedule_says(tmp_path, chain, expected):
    watch = Watch(lambda trainer, module: (module.link, trainer.global_step))
    module = toy(lr_schedule="cosine")
    trainer(tmp_path, watch, chain=chain, max_epochs=5).fit(module, batches())
    first_steps = dict(reversed(watch.seen))
    assert [first_steps[link] for link in sorted(first_steps)] == expected
    assert [link.start_step for link in module.chain.links] == expected[:-1]
    assert [link.end_step for link in module.chain.links] == expected[1:]


def test_without_knots_and_without_the_callback_it_is_lora(tmp_path):
    with_callback, without = toy(), toy()
    trainer(tmp_path, chain={}, max_epochs=2).fit(with_callback, batches())
    trainer(tmp_path, max_epochs=2).fit(without, batches())
    assert_bit_equal(weights(with_callback), weights(without))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_callbacks_work_together_in_any_order(tmp_path, order):
    logger = CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=-1, dirpath=tmp_path / "checkpoints")
    monitor = LearningRateMonitor(logging_interval="step")
    callbacks = [ChainOfLoRA(every_n_epochs=2), checkpoint, EarlyStopping("val_loss", patience=10), monitor]
    run = trainer(
        tmp_path, *(callbacks[i] for i in order), logger=logger, enable_checkpointing=True, max_epochs=4, log_every_n_steps=1
    )
    module = toy(ValidatedToy, optimizer=lambda p: SGD(p, lr=0.1), lr_schedule="linear")
    run.fit(module, batches(), batches(2))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    rates = [float(row["lr-SGD"]) for row in logger_rows(logger) if row.get("lr-SGD")]
    assert rates == pytest.approx([0.1 * (1 - step % 20 / 20) for step in range(40)])
    assert module.link == 1


def logger_rows(logger):
    import csv

    with open(f"{logger.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def test_early_stopping_counts_on_across_knots(tmp_path):
    module = toy(ValidatedToy, lr_schedule="constant", optimizer=lambda p: SGD(p, lr=0.0))
    stopping = EarlyStopping("val_loss", patience=3)
    run = trainer(tmp_path, stopping, chain={"every_n_epochs": 1}, max_epochs=20)
    run.fit(module, batches(), batches(2))
    assert run.current_epoch == 4  # one best epoch and three without improvement, knots or not
    assert module.link == 3


@pytest.mark.parametrize(
    ("arguments", "steps", "links"),
    [
        ({"fast_dev_run": True}, 1, 0),
        ({"max_steps": 7}, 7, 3),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 2),
        ({"max_epochs": 3, "overfit_batches": 2}, 6, 2),
        ({"max_epochs": 1}, 10, 4),
    ],
    ids=str,
)
def test_the_trainers_own_limits_hold(tmp_path, arguments, steps, links):
    module = toy(ValidatedToy)
    run = trainer(tmp_path, chain={"every_n_train_steps": 2}, **arguments)
    run.fit(module, batches(), batches(2))
    assert (run.global_step, module.link) == (steps, links)


def test_max_time_ends_a_run(tmp_path):
    run = trainer(tmp_path, chain={"every_n_train_steps": 5}, max_time={"seconds": 1}, max_epochs=-1)
    module = toy(lr_schedule="constant")
    run.fit(module, batches())
    assert run.global_step > 5
    assert module.link == (run.global_step - 1) // 5


def test_a_second_fit_goes_on_with_the_chain(tmp_path):
    module = toy()
    trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=4).fit(module, batches())
    assert module.link == 1
    trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=4).fit(module, batches())
    assert module.link == 2
    module.tie_knot(rank=1, alpha=3)
    trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=4).fit(module, batches())
    assert [link.index for link in module.chain.links] == [0, 1, 2, 3]
    assert (module.chain.links[3].rank, module.chain.links[3].alpha) == (1, 3)


def rates():
    return Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("scope", ["link", "run"])
def test_a_second_fit_has_a_schedule_of_its_own(tmp_path, scope):
    module = toy(optimizer=lambda p: SGD(p, lr=0.01), schedule_scope=scope)
    trainer(tmp_path, chain={"every_n_epochs": 5}, max_epochs=10).fit(module, batches())
    watch = rates()
    second = trainer(tmp_path, watch, chain={"every_n_epochs": 2}, max_epochs=4)
    second.fit(module, batches())
    length = 20 if scope == "link" else 40
    assert [100 * rate for rate in watch.seen] == pytest.approx([1 - step % length / length for step in range(40)])
    watch.seen.clear()
    second.fit_loop.max_epochs = 6
    second.fit(module, batches())
    expected = [1 - step / 20 for step in range(20)] if scope == "link" else [1 - (40 + step) / 60 for step in range(20)]
    assert [100 * rate for rate in watch.seen] == pytest.approx(expected)
    watch.seen.clear()
    trainer(tmp_path, watch, max_epochs=3).fit(module, batches())  # without knots: one link over the run
    assert [100 * rate for rate in watch.seen] == pytest.approx([1 - step / 30 for step in range(30)])


def test_a_knot_in_a_validation_brings_a_new_optimizer(tmp_path):
    class Knots(ValidatedToy):
        def on_validation_end(self):
            if not self.trainer.sanity_checking:
                self.tie_knot()

    optimizers = Watch(lambda trainer, module: (trainer.optimizers[0], len(trainer.optimizers[0].state)))
    module = toy(Knots, lr_schedule="constant")
    trainer(tmp_path, optimizers, chain={}, max_epochs=2).fit(module, batches(), batches(2))
    assert optimizers.seen[10][0] is not optimizers.seen[9][0]
    assert optimizers.seen[10][1] == 0


def test_a_knot_by_hand_at_the_end_of_an_epoch_counts_as_its_knot(tmp_path):
    class ByHand(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                module.tie_knot()

    module = toy(lr_schedule="constant")
    trainer(tmp_path, ByHand(), chain={"every_n_epochs": 2}, max_epochs=5).fit(module, batches())
    assert [(link.start_step, link.end_step) for link in module.chain.links] == [(0, 20), (20, 40)]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_a_link_from_a_knot_by_hand_at_the_end_of_an_epoch_has_a_schedule_of_its_length(tmp_path, hook):
    class ByHand(Callback):
        """At the end of the first epoch."""

    def tie(self, trainer, module, *_):
        if trainer.global_step == 10 and module.link == 0 and not trainer.sanity_checking:
            module.tie_knot()

    setattr(ByHand, hook, tie)
    watch, module = rates(), toy(ValidatedToy, warmup_steps=0.2, optimizer=lambda p: SGD(p, lr=1.0))
    trainer(tmp_path, ByHand(), watch, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches(), batches(1))
    assert watch.seen == pytest.approx([0, 0.5, *(1 - step / 8 for step in range(8))] * 3)


def test_an_evaluation_by_another_trainer_inside_a_fit_changes_nothing(tmp_path):
    class Evaluating(Callback):
        def on_train_epoch_end(self, run, module):
            trainer(tmp_path).validate(module, batches(1), verbose=False)
            assert module.trainer is run

    seen = []
    for callbacks in ([], [Evaluating()]):
        module, watch = toy(ValidatedToy, warmup_steps=1), rates()
        trainer(tmp_path, watch, *callbacks, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches(4), batches(1))
        assert [link.end_step for link in module.chain.links] == [4, 8]
        seen.append((watch.seen, weights(module)))
    assert seen[1][0] == seen[0][0]
    assert_bit_equal(seen[1][1], seen[0][1])


class WithCopy(Toy):
    """As for a moving average of the weights, a reference or a teacher."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.configure_model()
        self.copy = copy.deepcopy(self.model).requires_grad_(requires_grad=False)


def test_a_copy_of_the_model_in_the_module_is_left_alone(tmp_path):
    alone, beside = toy(), toy(WithCopy)
    before = weights(beside.copy)
    for module in (alone, beside):
        trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches())
    assert_bit_equal(weights(beside.model), weights(alone.model))
    assert_bit_equal(weights(beside.copy), before)


class Keeping(Toy):
    """Keeps the schedule that its ``configure_optimizers`` makes, and steps it by hand."""

    def configure_optimizers(self):
        optimizer = SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)
        self.kept = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return optimizer

    def on_train_batch_end(self, *_):
        assert self.kept.optimizer is self.trainer.optimizers[0]
        self.kept.step()


def fit_of_two_steps(path):
    run = trainer(path.parent, chain={"every_n_train_steps": 3}, max_epochs=1)
    run.fit(toy(Keeping), batches(2))
    run.save_checkpoint(path)
    return path


def test_what_configure_optimizers_keeps_in_the_module_is_what_trains(tmp_path):
    watch, arguments = rates(), {"chain": {"every_n_train_steps": 3}, "max_epochs": 3}
    trainer(tmp_path, watch, **arguments).fit(toy(Keeping), batches(2))
    assert watch.seen == [1, 0.5, 0.25] * 2
    trainer(tmp_path, **arguments).fit(toy(Keeping), batches(2), ckpt_path=fit_of_two_steps(tmp_path / "run.ckpt"))


@pytest.mark.parametrize("factors", ["B", "random"])
def test_an_optimizer_of_ones_own_with_all_factors_trains_those_of_the_rule(tmp_path, factors):
    class Own(Toy):
        def configure_optimizers(self):
            return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def trained(**how):
        module = toy(Own, trained_factors=factors, **how)
        trainer(tmp_path, chain={}, max_epochs=1, accumulate_grad_batches=2).fit(module, batches())
        return {name: p.detach() for name, p in module.model.named_parameters() if name.endswith(frozen)}, module

    frozen = f"lora_{frozen_factor(factors, 0, 0)}"
    after, module = trained()
    drawn = toy(Own, trained_factors=factors).model.state_dict()
    assert_bit_equal(after, {name: drawn[name] for name in after})
    assert all(layer.lora_A.any() and layer.lora_B.any() for layer in module.adapted.layers.values())


def test_a_chain_beside_weights_that_are_trained_is_refused(tmp_path):
    module = toy()
    module.configure_model()
    module.freeze()
    module.unfreeze()
    with pytest.raises(UserError, match="model: expected frozen weights under a chain, received a trainable one in"):
        trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())


def test_a_short_last_link_is_warmed_up_over_its_length(tmp_path):
    watch = rates()
    module = toy(lr_schedule="constant", warmup_steps=8, optimizer=lambda p: SGD(p, lr=1.0))
    trainer(tmp_path, watch, chain={"every_n_train_steps": 9}, max_epochs=1).fit(module, batches())
    assert watch.seen == pytest.approx([*(step / 8 for step in range(8)), 1.0, 0.0])
    watch.seen.clear()
    trainer(tmp_path, watch, chain={"every_n_train_steps": 9}, max_epochs=2, limit_train_batches=7).fit(module, batches())
    assert watch.seen == pytest.approx([*(step / 8 for step in range(8)), 1.0, *(step / 5 for step in range(5))])


def test_an_A_that_was_set_by_hand_stays(tmp_path):
    class Own(Toy):
        def configure_model(self):
            super().configure_model()
            with torch.no_grad():
                self.model[0].lora_A.fill_(7.0)

    watch = Watch(lambda trainer, module: module.model[0].lora_A.detach().clone())
    trainer(tmp_path, watch, chain={}, max_steps=1).fit(toy(Own), batches())
    assert (watch.seen[0] == 7).all()


def test_a_knot_leaves_the_float32_precision_as_it_was():
    module = toy()
    module.configure_model()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        module.tie_knot()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_rule_of_ones_own_decides_the_knots(tmp_path):
    class AtOddSteps(ChainOfLoRA):
        asked = ()

        def should_tie(self, epoch, global_step):
            self.asked = (*self.asked, global_step)
            return global_step in (3, 7)

    rule, module = AtOddSteps(), toy(lr_schedule="constant")
    trainer(tmp_path, rule, max_epochs=2, accumulate_grad_batches=2).fit(module, batches())
    assert rule.asked == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert [link.end_step for link in module.chain.links] == [3, 7]
    with pytest.raises(UserError, match=r"model\.lr_schedule: expected constant, .* received linear"):
        trainer(tmp_path, AtOddSteps(), max_epochs=2).fit(toy(), batches())


def test_a_schedule_over_the_run_does_not_restart(tmp_path):
    watch = Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    module = toy(schedule_scope="run", warmup_steps=0.25, optimizer=lambda p: SGD(p, lr=1.0))
    trainer(tmp_path, watch, chain={"every_n_train_steps": 6}, max_epochs=2).fit(module, batches())
    expected = [step / 5 if step < 5 else 1 - (step - 5) / 15 for step in range(20)]
    assert watch.seen == pytest.approx(expected)


def test_an_epoch_with_another_accumulation_has_its_own_length(tmp_path):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    watch = Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    module = toy(optimizer=lambda p: SGD(p, lr=1.0))
    scheduler = GradientAccumulationScheduler({0: 1, 1: 5})
    trainer(tmp_path, watch, scheduler, chain={"every_n_epochs": 2}, max_epochs=4).fit(module, batches())
    assert watch.seen[:11] == pytest.approx([1 - step / 12 for step in range(11)])
    assert watch.seen[20] == 1.0
    assert module.link == 1


@pytest.mark.parametrize(("scope", "horizon"), [("link", 8), ("run", 24)])
def test_epochs_of_another_length_count_from_where_they_begin(tmp_path, scope, horizon):
    class Shrinking(Toy):
        def train_dataloader(self):
            return batches(8 if self.trainer.current_epoch < 2 else 4)

    watch, module = rates(), toy(Shrinking, schedule_scope=scope, optimizer=lambda p: SGD(p, lr=0.01))
    arguments = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    trainer(tmp_path, watch, chain={"every_n_epochs": 2}, **arguments).fit(module)
    expected = [1 - (step + horizon - 8) / horizon for step in range(8)]  # of a schedule that ends with the run
    assert [100 * rate for rate in watch.seen[16:]] == pytest.approx(expected)


def test_a_nan_stops_the_run_before_the_step_and_names_it(tmp_path):
    class Poisoned(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step == 13 else loss

    module = Poisoned(target_modules="all-linear", rank=2, seed=0)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, save_last=True)
    run = trainer(tmp_path, checkpoint, chain={"every_n_train_steps": 5}, max_epochs=3, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match=r"loss is nan at step 13 \(epoch 1\), in link 2"):
        run.fit(module, batches())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for name, value in state["state_dict"].items() if name != "cola")


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.cycle((x[0], y[0]) for x, y in batches())


def test_endless_data_wants_a_constant_rate_or_max_steps(tmp_path):
    from torch.utils.data import DataLoader

    loader = DataLoader(Endless(), batch_size=4)
    with pytest.raises(UserError, match="endless data"):
        trainer(tmp_path, chain={"every_n_train_steps": 3}, max_epochs=1).fit(toy(), loader)
    module = toy()
    trainer(tmp_path, chain={"every_n_train_steps": 3}, max_steps=9).fit(module, loader)
    assert module.link == 2


class Streamed(torch.utils.data.IterableDataset):
    """Ten batches, without a length."""

    def __iter__(self):
        return ((x, y) for batch in batches() for x, y in zip(*batch, strict=True))


@pytest.mark.parametrize("chain", [{"every_n_epochs": 1}, {"at_epochs": [1, 2]}])
def test_links_of_epochs_without_a_length_want_a_constant_rate_or_one_schedule(tmp_path, caplog, chain):
    loader = torch.utils.data.DataLoader(Streamed(), batch_size=4)
    with pytest.raises(UserError, match=r"model\.lr_schedule: expected constant, or model\.schedule_scope run"):
        trainer(tmp_path, chain=chain, max_steps=30).fit(toy(), loader)
    with pytest.raises(UserError, match=r"model\.lr_schedule: .* warm-ups in steps"):
        trainer(tmp_path, chain=chain, max_steps=30).fit(toy(schedule_scope="run", knot_warmup_steps=0.5), loader)
    caplog.clear()
    watch, module = rates(), toy(schedule_scope="run", knot_warmup_steps=2, optimizer=lambda p: SGD(p, lr=1.0))
    trainer(tmp_path, watch, chain=chain | {"ranks": [2, 1]}, max_steps=30).fit(module, loader)
    assert [link.end_step for link in module.chain.links] == [10, 20]
    after_knot = {10: 0, 11: 0.5, 20: 0, 21: 0.5}
    assert watch.seen == pytest.approx([(1 - step / 30) * after_knot.get(step, 1) for step in range(30)])
    assert "one link" not in caplog.text


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_other_tools_that_would_break_a_chain_are_refused(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
    from lightning.pytorch.tuner import Tuner

    for callback in (LearningRateFinder(), EMAWeightAveraging()):
        with pytest.raises(UserError, match=rf"trainer\.callbacks: .* {type(callback).__name__}"):
            trainer(tmp_path, callback, chain={}, max_epochs=1).fit(toy(), batches())
    with pytest.raises(UserError, match="LearningRateFinder"):
        Tuner(trainer(tmp_path, chain={}, max_epochs=1)).lr_find(toy(), batches())

    class Manual(Toy):
        automatic_optimization = False

    with pytest.raises(UserError, match="forked or spawned the chain does not return"):
        check_strategy(trainer(tmp_path, strategy="ddp_fork", devices=1).strategy)
    with pytest.raises(UserError, match="automatic optimization"):
        trainer(tmp_path, chain={}, max_epochs=1).fit(Manual(target_modules="all-linear"), batches())


def test_what_a_run_never_reaches_is_a_warning(tmp_path, caplog):
    trainer(tmp_path, chain={"every_n_epochs": 3}, max_epochs=2).fit(toy(), batches())
    assert "ends before its first knot" in caplog.text
    trainer(tmp_path, chain={"every_n_train_steps": 9}, max_epochs=1).fit(toy(), batches())
    assert "the last link has 1 optimizer steps, the others at least 9" in caplog.text


def test_one_log_line_a_link(tmp_path, caplog):
    caplog.set_level("INFO", "cola_lightning")
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3, logger=logger).fit(toy(ValidatedToy), batches(), batches(2))
    lines = [line for line in caplog.messages if line.startswith("link ")]
    assert len(lines) == 3
    assert lines[0].startswith("link 0 finished: steps 0 to 10, rank 2, update norm ")
    assert "val_loss" in lines[0]
    assert lines[2].startswith("link 2 live at the end: steps 20 to 30")
    assert [row["link"] for row in logger_rows(logger) if row.get("link")] == ["0.0", "1.0", "2.0"]


def test_the_last_rank_of_a_short_list_holds_on(tmp_path):
    module = toy(lr_schedule="constant")
    trainer(tmp_path, chain={"every_n_epochs": 1, "ranks": [2, 1]}, max_epochs=4).fit(module, batches())
    assert [link.rank for link in module.full_chain().links] == [2, 1, 1, 1]


def test_where_the_length_is_unknown_the_last_rank_holds_on(tmp_path):
    module = toy(lr_schedule="constant")
    stop = EarlyStopping("train_loss", patience=100, stopping_threshold=1e9, check_on_train_epoch_end=True)
    run = trainer(tmp_path, stop, chain={"every_n_train_steps": 3, "ranks": [2, 1]}, max_epochs=-1)
    run.fit(module, batches())
    assert [link.rank for link in module.chain.links] == [2, 1, 1]
