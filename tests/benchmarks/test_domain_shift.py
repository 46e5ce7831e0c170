"""The example of a module of one's own: a GPT on bytes that is pre-trained on English and adapted to Python."""

import pytest
import torch

from benchmarks import byte_gpt
from benchmarks.byte_gpt import pretrained
from tests.helpers import tiny
from tests.helpers.toy import assert_bit_equal, weights

pytestmark = pytest.mark.docs

SIZES = {"depth": 1, "width": 16, "heads": 2, "context": 8}


def test_the_base_is_trained_once_for_each_recipe_and_corpus_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    first = pretrained(3, **SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(byte_gpt, "_pretrain", lambda *_: pytest.fail("trained again"))
        torch.manual_seed(5)
        assert_bit_equal(weights(pretrained(3, **SIZES)), weights(first))
    pretrained(4, **SIZES)
    pretrained(3, **SIZES | {"width": 32})
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "other", "Another passage, of its own.")))
    pretrained(3, **SIZES)
    assert len(list((tmp_path / "cache").iterdir())) == 4
