"""A model that writes its own frozen weights for evaluation, as RWKV does, is refused: its links would no longer fit them."""

import pytest
import torch
import transformers
from torch import nn

from cola_lightning import UserError
from tests.toy import ValidatedToy, batches, toy, trainer

REFUSED = r"^model: expected frozen weights that do not change in evaluation, .* 'body', .* rescale_every"


class Rescaling(nn.Module):
    """Computes in evaluation with half its weights, and doubles what comes out."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.is_halved = nn.Linear(8, 12, bias=False), nn.Linear(12, 6), False

    def forward(self, x):
        if self.is_halved is self.training:
            with torch.no_grad():
                self.body.weight.mul_(2 if self.is_halved else 0.5)
            self.is_halved = not self.is_halved
        return self.head(torch.tanh(self.body(x) * (2 if self.is_halved else 1)))


class RescalingToy(ValidatedToy):
    def build_model(self):
        return Rescaling()

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
@pytest.mark.parametrize("sanity", [1, 0])
def test_a_fit_is_refused_at_its_first_evaluation(tmp_path, sanity, finished_links):
    module = toy(RescalingToy, finished_links=finished_links)
    run = trainer(tmp_path, chain={}, max_steps=3, num_sanity_val_steps=sanity, val_check_interval=1)
    with pytest.raises(UserError, match=REFUSED):
        run.fit(module, batches(), batches(1))
    assert run.global_step == (0 if sanity else 1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_so_is_every_other_evaluation(tmp_path, stage):
    with pytest.raises(UserError, match=REFUSED):
        getattr(trainer(tmp_path), stage)(toy(RescalingToy), batches(1))


def test_a_layer_that_is_not_adapted_may_be_rescaled(tmp_path):
    module = toy(RescalingToy, target_modules=["head"])
    trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=2).fit(module, batches(), batches(1))
    assert module.link == 1


def test_a_knot_inside_an_evaluation_is_no_such_write(tmp_path):
    class Tying(ValidatedToy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                nn.init.ones_(self.model[0].lora_B)
                self.tie_knot()

    module = toy(Tying)
    trainer(tmp_path, chain={}, max_steps=1, val_check_interval=1).fit(module, batches(), batches(1))
    assert module.link == 1


def test_rwkv_rescales_unless_it_is_told_not_to():
    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    ids = torch.arange(12).view(2, 6)
    for every, moves in ((2, True), (0, False)):
        torch.manual_seed(0)
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, rescale_every=every)).eval()
        with torch.no_grad():
            nn.init.normal_(model.rwkv.blocks[2].attention.output.weight)
            before = model.rwkv.blocks[2].attention.output.weight.clone()
            model(ids, use_cache=False)
        assert torch.equal(before, model.rwkv.blocks[2].attention.output.weight) is not moves
