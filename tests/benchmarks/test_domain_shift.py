"""The example of a module of one's own: a GPT on bytes that is pre-trained on English and adapted to Python."""

import pytest
import torch

from benchmarks import byte_gpt
from benchmarks.byte_gpt import COLAByteGPT, PythonSourceDataModule, pretrained
from cola_lightning import COLAModule
from tests.helpers import tiny
from tests.helpers.toy import assert_bit_equal, trainer, weights

pytestmark = pytest.mark.docs

SIZES = {"depth": 1, "width": 16, "heads": 2, "context": 8}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """English of a few sentences, and an empty cache folder."""
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_base_is_trained_once_for_each_recipe_and_corpus_and_then_read(cache, tmp_path, monkeypatch):
    first = pretrained(3, **SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(byte_gpt, "_pretrain", lambda *_: pytest.fail("trained again"))
        torch.manual_seed(5)
        assert_bit_equal(weights(pretrained(3, **SIZES)), weights(first))
    pretrained(4, **SIZES)
    pretrained(3, **SIZES | {"width": 32})
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "other", "Another passage, of its own.")))
    pretrained(3, **SIZES)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.usefixtures("cache")
def test_a_chain_of_the_example_trains_and_is_loaded_again(tmp_path):
    module = COLAByteGPT(**SIZES, pretrain_steps=2, target_modules=["qkv", "up"], rank=1, seed=0)
    data = PythonSourceDataModule(context=8, batch_size=4, eval_size=16)
    run = trainer(tmp_path, chain={"every_n_train_steps": 2}, max_epochs=1, limit_train_batches=8)
    run.fit(module, data)
    assert module.n_finished == 3
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = COLAModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert run.test(again, data, verbose=False) == run.test(module, data, verbose=False)
