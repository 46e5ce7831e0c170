"""Values on the host, read in place of those on a device."""

import torch

from cola_lightning.hf.host_values import HostValues


def test_values_are_those_of_the_host_until_the_device_has_others():
    values, mine = HostValues(), {"labels": torch.tensor([1, 2]), "prompt": ["a"]}
    moved = {"labels": mine["labels"].clone(), "prompt": ["a"]}
    values.remember(mine, moved)
    assert values.get(moved["labels"]) is mine["labels"]
    assert values.get(mine["labels"].clone()) is not mine["labels"]  # of another tensor
    moved["labels"][0] = 5  # by a hook or a step of the user's own
    assert values.get(moved["labels"]).tolist() == [5, 2]
    values.remember([1, 2], [1, 2])  # a batch of another type
    assert values.get(moved["labels"]).tolist() == [5, 2]
