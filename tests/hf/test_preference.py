"""Preference tuning: losses of the papers and of TRL, and a reference that is the chain without its last links."""

import functools

import datasets
import peft
import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cola_lightning import COLAPreferenceLM, EpochDataModule, UserError
from cola_lightning.hf import chunked_loss
from tests.helpers import tiny
from tests.helpers.tiny import pair_batch, random_pairs
from tests.helpers.toy import saved, trainer

LOG_2 = torch.tensor(0.0).sigmoid().log().neg().item()


class Pairs(EpochDataModule):
    """Twelve pairs to train on, and four for validation."""

    def setup(self, stage):
        self.train, self.val = random_pairs(12), random_pairs(4, seed=1)
        self.test = self.val

    def collate(self, rows):
        return pair_batch(rows)


preference_lm = functools.partial(tiny.causal_lm, cls=COLAPreferenceLM)


@pytest.fixture
def module(tmp_path):
    return tiny.with_live_link(preference_lm(tmp_path))


def log_probabilities(model, rows):
    """Of each response, by a plain forward pass of each: sums and lengths, the chosen ones first."""
    sums, sizes = [], []
    for place in (1, 2):
        for row in rows:
            ids = torch.tensor([row[0] + row[place]])
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(logs.gather(1, ids[0, 1:, None])[-len(row[place]) :].sum())
            sizes.append(len(row[place]))
    return torch.stack(sums), torch.tensor(sizes)


def by_hand(loss, chosen, rejected, sizes, references, beta, smoothing, gamma):
    """The papers' formulas, each in its own words."""
    if loss == "sigmoid":
        margin = beta * ((chosen - references[0]) - (rejected - references[1]))
        return (-(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))).mean()
    means = chosen / sizes[0], rejected / sizes[1]
    if loss == "ipo":
        margin = (means[0] - references[0] / sizes[0]) - (means[1] - references[1] / sizes[1])
        return ((margin - 1 / (2 * beta)) ** 2).mean()
    if loss == "simpo":
        margin = beta * means[0] - beta * means[1] - gamma
        return (-(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))).mean()
    odds = [mean.exp() / (1 - mean.exp()) for mean in means]
    return (-beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))).mean() - chosen.sum() / sizes[0].sum()


SAVED_HEAD = {"modules_to_save": ["lm_head"], "changes": {"tie_word_embeddings": False}}


@pytest.mark.parametrize(
    ("loss", "smoothing", "options"), [("sigmoid", 0.1, SAVED_HEAD), ("ipo", 0, {}), ("simpo", 0.1, {}), ("orpo", 0, {})]
)
def test_losses_and_gradients_are_the_papers_formulas_also_in_chunks(tmp_path, loss, smoothing, options, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK", 4 * 400 * 3)  # three tokens
    options = {"beta": 0.3, "label_smoothing": smoothing, "simpo_gamma": 0.7} | options
    module = tiny.with_live_link(preference_lm(tmp_path, loss=loss, **options))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    rows = random_pairs()
    with torch.no_grad():
        references, _ = log_probabilities(base, rows)
        module.model.lm_head.weight.mul_(1.1 if module.model.lm_head.weight.requires_grad else 1)
    for module.chunked_loss in (False, True):
        sums, sizes = log_probabilities(module.model, rows)
        expected = by_hand(loss, *sums.split(4), sizes.split(4), references.split(4), 0.3, smoothing, 0.7)
        output = module.step(pair_batch(rows))
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert output.size == 4
        tiny.assert_same_gradients(module, output.loss, expected)
    module.sft_weight = 0.5
    of_chosen = -sums[:4].sum() / sizes[:4].sum()
    assert module.step(pair_batch(rows)).loss.item() == pytest.approx((expected + 0.5 * of_chosen).item(), rel=1e-5)


def test_what_is_logged_has_trls_names_and_meanings(module):
    rows = random_pairs()
    logged = module.step(pair_batch(rows)).logged
    sums, _ = log_probabilities(module.model, rows)
    references, _ = log_probabilities(module.merged_model(0), rows)
    chosen, rejected = (0.1 * (sums - references)).split(4)
    assert torch.allclose(logged["rewards/chosen"], chosen, atol=1e-5)
    assert torch.allclose(logged["rewards/rejected"], rejected, atol=1e-5)
    assert torch.allclose(logged["rewards/margins"], chosen - rejected, atol=1e-5)
    assert logged["rewards/accuracies"].tolist() == (chosen > rejected).float().tolist()
    assert torch.allclose(torch.cat([logged["logps/chosen"], logged["logps/rejected"]]), sums, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's own default, gradient_checkpointing
@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("ipo", marks=pytest.mark.slow)])
def test_steps_have_the_losses_and_gradients_of_trls_trainer(tmp_path, loss):
    import trl

    module = tiny.with_live_link(preference_lm(tmp_path, loss=loss))
    folder = str(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    theirs = trl.DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.DPOConfig(str(tmp_path / "trl"), loss_type=[loss], beta=0.1, report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, lora_alpha=4, target_modules=tiny.targets("llama"), task_type="CAUSAL_LM"),
    )
    mine = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in theirs.model.named_parameters()
        if p.requires_grad
    }
    assert parameters.keys() == mine.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(mine[name])
    optimizers = [torch.optim.AdamW([*values.values()], lr=1e-2) for values in (mine, parameters)]
    for step in range(4):
        losses = module.step(pair_batch(random_pairs())).loss, theirs.compute_loss(theirs.model, right_padded(random_pairs()))
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5, rel=1e-6)
        for loss_of_one in losses:
            loss_of_one.backward()
        for name, p in parameters.items():
            assert torch.allclose(mine[name].grad, p.grad, atol=1e-5), (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def right_padded(rows):
    """A batch as TRL's collator makes it."""
    both = [(row[0], row[place]) for place in (1, 2) for row in rows]
    ids = [torch.tensor(prompt + response) for prompt, response in both]
    completions = [torch.tensor([0] * len(prompt) + [1] * len(response)) for prompt, response in both]
    batch = {"input_ids": pad_sequence(ids, True, 1), "completion_mask": pad_sequence(completions, True)}
    return batch | {"attention_mask": pad_sequence([torch.ones_like(one) for one in ids], True)}


# ---------------------------------------------------------------------- the reference


def fit(module, folder, *callbacks, **options):
    run = trainer(folder, *callbacks, max_steps=2, **options)
    run.fit(module, Pairs(batch_size=2))
    return run


# How finished links are kept, the reference, the knot, and whether it moves the reference.
KNOTS = [
    ("merge", "link", "cola", True),
    ("stack", "link", "cola", True),
    ("merge", "link", "record", True),
    ("stack", "link", "record", True),
    ("merge", "start", "cola", False),
    ("stack", 0, "cola", False),
]


@pytest.mark.parametrize(("finished_links", "reference", "knot", "moves"), KNOTS)
def test_the_first_loss_is_log_2_and_after_a_knot_again_if_the_reference_moves(
    tmp_path, finished_links, reference, knot, moves
):
    module = preference_lm(tmp_path, reference=reference, finished_links=finished_links, dropout=0.3)
    module.configure_model()
    batch = pair_batch(random_pairs())
    assert module.step(batch).loss.item() == LOG_2 == F.softplus(torch.tensor(0.0)).item()
    tiny.with_live_link(module)
    assert module.step(batch).loss.item() != pytest.approx(LOG_2, abs=1e-3)
    values = [value.clone() for _, value in module.named_trained_parameters()]
    module.adapted.tie_knot(knot=knot)
    if knot == "record":  # the model goes on as it is
        assert all(torch.equal(now, then) for (_, now), then in zip(module.named_trained_parameters(), values, strict=True))
        module.eval()
    assert (module.step(batch).loss.item() == pytest.approx(LOG_2, abs=1e-6)) is moves
    if knot == "record":  # and the reference does not
        for layer in module.adapted.layers.values():
            layer.lora_B.data.neg_()
        assert module.step(batch).loss.item() != pytest.approx(LOG_2, abs=1e-3)
    if not moves:
        with torch.no_grad():
            references, _ = log_probabilities(module.merged_model(0), random_pairs())
        sums, _ = log_probabilities(module.eval().model, random_pairs())
        margins = 0.1 * ((sums - references)[:4] - (sums - references)[4:])
        assert module.step(batch).loss.item() == pytest.approx(-F.logsigmoid(margins).mean().item(), abs=1e-6)


@pytest.mark.parametrize(("reference", "options"), [("start", {}), ("sft", {"finished_links": "stack"}), (1, SAVED_HEAD)])
def test_the_reference_is_the_model_after_the_links_of_the_first_chain_however_they_are_named_and_kept(
    tmp_path, reference, options
):
    first = tiny.with_live_link(preference_lm(tmp_path, **options))
    first.run.current.name = "sft"
    first.full_chain().save(tmp_path / "chain")
    module = preference_lm(tmp_path, init_chain=str(tmp_path / "chain"), reference=reference, **options)
    module.configure_model()
    assert module.n_finished == 1
    assert module.step(pair_batch(random_pairs())).loss.item() == LOG_2
    run = fit(module, tmp_path)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = COLAPreferenceLM.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.n_finished == 1
    assert again.step(pair_batch(random_pairs())).loss.item() != LOG_2
    with again.at(again.reference_links) as model:
        mine = tiny.logits(model)
    assert (mine - tiny.logits(first.merged_model())).abs().max() < 1e-5 < (mine - tiny.logits(again.model)).abs().max()


def test_a_loaded_model_is_the_start_of_the_next_run(tmp_path):
    """As with init_chain: its current link is finished, and a new one begins."""
    sft = tiny.with_live_link(tiny.causal_lm(tmp_path))
    sft.run.current.name = "sft"
    sft.run.note_step()
    module = COLAPreferenceLM.load_from_checkpoint(saved(sft, tmp_path))
    first = first_losses(module, tmp_path, chain={"name": "dpo"})
    assert first[0] == pytest.approx(LOG_2, abs=1e-6) != pytest.approx(first[1], abs=1e-6)
    assert [link.name for link in module.full_chain().links] == ["sft", "dpo"]
    assert module.reference_links == 1
    first = first_losses(module, tmp_path, chain={"name": "more"})  # another Trainer: a run of its own
    assert first[0] == pytest.approx(LOG_2, abs=1e-6)
    assert [link.name for link in module.full_chain().links] == ["sft", "dpo", "more"]


def first_losses(module, folder, **options):
    losses = []
    watch = LambdaCallback(on_before_backward=lambda run, module, loss: losses.append(loss.item()))
    fit(module, folder, watch, **options)
    return losses


def test_a_reference_that_is_trained_or_not_there_is_refused(tmp_path):
    for reference, message in [
        (1, r"model\.reference: .* is being trained"),  # whose loss would be log 2 in every step
        ("dpo", r"model\.reference: .* is being trained"),
        (3, "links: must be between 0 and 1"),
        ("sfd", "no stage or link 'sfd'"),
    ]:
        with pytest.raises(UserError, match=message):
            fit(preference_lm(tmp_path, reference=reference), tmp_path, chain={"name": "dpo"})


def test_a_run_logs_rewards_and_learns(tmp_path):
    module = preference_lm(tmp_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Pairs(batch_size=2))
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert names | {f"val_{name}" for name in names} | {"train_loss", "val_loss"} <= set(run.callback_metrics)
    assert run.callback_metrics["rewards/margins"] > 0.001


def test_values_that_no_run_can_have_are_refused(tmp_path):
    for options, message in [
        ({"loss": "kto"}, "model.loss: must be sigmoid or ipo or simpo or orpo, got 'kto'"),
        ({"beta": 0}, "model.beta: must be above 0, got 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: must be 0 unless the loss is sigmoid or simpo"),
        ({"sft_weight": -1}, "model.sft_weight: must be at least 0, got -1"),
        ({"reference": -1}, "model.reference: must be start, link, a number of links, or a stage, got -1"),
        ({"target_modules": None}, "model.target_modules: sigmoid needs links"),
    ]:
        with pytest.raises(UserError, match=message):
            preference_lm(tmp_path, **options)


def test_rows_that_are_no_pairs_are_refused(module):
    batch = pair_batch(random_pairs())
    del batch["n_pairs"]
    with pytest.raises(UserError, match="pairs of a chosen and a rejected response"):
        module.step(batch)


def test_a_run_without_a_reference_trains_every_parameter(tmp_path):
    module = preference_lm(tmp_path, loss="simpo", target_modules=None)
    assert isinstance(fit(module, tmp_path), Trainer)
