"""A link that gets no gradient is named, once, before time is lost."""

import pytest
from torch import nn
from torch.nn import functional as F

from tests.toy import Toy, batches, toy, trainer


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


class SkippingToy(NetToy):
    """Has no loss for its first batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


def warnings_of_a_fit(folder, module, caplog, **options):
    caplog.clear()
    trainer(folder, chain={}, **{"max_steps": 3} | options).fit(module, batches())
    return [message for message in caplog.messages if "got no gradient" in message]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (NetToy, {"accumulate_grad_batches": 2}, "1 of 4 .*(read)"),  # both experts are taken in the first step
        (NetToy, {"max_steps": 1}, "2 of 4 .*(read, experts"),
        (SkippingToy, {}, "2 of 4 .*(read, experts"),  # a step without a loss is no first step
    ],
    ids=["both experts", "one expert", "a step without a loss"],
)
def test_a_layer_that_is_not_called_is_named_once_a_fit(tmp_path, caplog, cls, options, named):
    module = toy(cls)
    for _ in range(2):
        (message,) = warnings_of_a_fit(tmp_path, module, caplog, **options)
        count, _, names = named.partition(" .*")
        assert message.startswith(f"model.target_modules: {count} ")
        assert names in message


def test_where_all_is_trained_or_frozen_by_the_user_nothing_is_named(tmp_path, caplog):
    module = toy(NetToy)
    module.model.read.requires_grad_(False)
    assert warnings_of_a_fit(tmp_path, module, caplog, accumulate_grad_batches=2) == []
    for how in ({"dropout": 0.1}, {"target_modules": None}):
        assert warnings_of_a_fit(tmp_path, toy(**how), caplog) == []
