"""One decay over the run, with a short warm-up after every knot: ReLoRA's jagged rate."""

import pytest
from torch.optim import SGD, AdamW

from tests.test_chain_of_lora import Watch
from tests.test_resume import ARGUMENTS, FEW, Normed, fit, last
from tests.toy import assert_bit_equal, batches, toy, trainer, weights


def rates(tmp_path, chain, **arguments):
    watch = Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    module = toy(**{"schedule_scope": "run", "optimizer": lambda p: SGD(p, lr=1.0)} | arguments)
    trainer(tmp_path, watch, chain=chain, max_epochs=2).fit(module, batches())
    return watch.seen


@pytest.mark.parametrize("given", [3, 0.5])  # half of six steps
def test_the_rate_rises_again_after_each_knot_onto_the_schedule_of_the_run(tmp_path, given):
    seen = rates(tmp_path, {"every_n_train_steps": 6}, warmup_steps=5, knot_warmup_steps=given)
    run = [step / 5 if step < 5 else 1 - (step - 5) / 15 for step in range(20)]
    rise = 2 if given == 3 else 1  # the last link has two steps
    assert seen[:18] == pytest.approx([run[k] * (min(1, k % 6 / 3) if k >= 6 else 1) for k in range(18)])
    assert seen[18:] == pytest.approx([0, run[19] / rise])


def test_links_of_other_lengths_warm_up_over_a_share_of_their_own(tmp_path):
    seen = rates(tmp_path, {"at_steps": [4, 14]}, lr_schedule="constant", knot_warmup_steps=0.2)
    assert seen == pytest.approx([1] * 4 + [0, 0.5] + [1] * 8 + [0, 0.5] + [1] * 4)


def test_links_with_a_schedule_each_warm_up_after_knots_alone(tmp_path):
    seen = rates(tmp_path, {"every_n_train_steps": 10}, schedule_scope="link", knot_warmup_steps=4)
    assert seen == pytest.approx([1 - k / 10 for k in range(10)] + [(1 - k / 10) * min(1, k / 4) for k in range(10)])


def test_no_warm_up_after_knots_is_the_schedule_as_it_was(tmp_path):
    chain, arguments = {"every_n_train_steps": 6}, {"warmup_steps": 5, "lr_schedule": "cosine"}
    assert rates(tmp_path, chain, **arguments) == rates(tmp_path, {}, **arguments)
    assert rates(tmp_path, {}, **arguments, knot_warmup_steps=4) == rates(tmp_path, {}, **arguments)


def test_a_run_that_was_stopped_goes_on_with_the_same_rates(tmp_path):
    def module():
        arguments = ARGUMENTS | {"schedule_scope": "run", "warmup_steps": 2, "knot_warmup_steps": 3}
        return toy(Normed, **arguments, optimizer=lambda p: AdamW(p, lr=1e-2))

    whole, expected, _ = fit(tmp_path / "whole", module=module())
    for stop in FEW:
        folder = tmp_path / f"{stop}"
        _, before, _ = fit(folder, stop, module=module())
        resumed, after, _ = fit(folder / "resumed", ckpt_path=last(folder), module=module())
        assert_bit_equal(weights(resumed), weights(whole))
        assert before.rates | after.rates == expected.rates, stop
