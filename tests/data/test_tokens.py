"""Where a prompt's tokens end in a text that continues it: as if both were tokenized, whatever the tokenizer does there."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cola_lightning.data.render import n_common, tokenize, tokenize_continued
from cola_lightning.pretrained import Pretrained
from tests.helpers import tiny

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{k:02X}>" for k in range(256)]
TEXT = ["It is the old town, isn't it? Yes!\n\nNo, it is the old bridge.\n It was 2024.\tNo... it's"] * 20
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What tokenizers treat in their own ways at the end of a text, or join to what follows.
PIECES = list("a?' \n\té\u0301\u200b\u00a0\u0600▁Ġﬁİषﷺ😀")
PIECES += ["It", "'s", "  ", "\n\n", "\r\n", "e\u0301", "日本", "!?", "12", "2024", "don't", " the", "old town", "क्"]
PIECES += ["<s>", "</s>", "<sep>"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"]), max_size=8).map("".join)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


def bpe(pre_tokenizer, normalizer=None, post=None, added=(), **options):
    own = Tokenizer(models.BPE(**options))
    own.pre_tokenizer, own.normalizer = pre_tokenizer, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    own.train_from_iterator(TEXT, trainer)
    own.add_tokens(list(added))
    own.post_processor = post
    return own


def wrapped(own, appended=""):
    """With a beginning of sentence, and an end for those that append it."""
    ids = [(token, own.token_to_id(token)) for token in ("<s>", "</s>")]
    own.post_processor = processors.TemplateProcessing(single=f"<s> $A{appended}", special_tokens=ids)
    return own


def unigram():
    """T5's."""
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [normalizers.NFKC(), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    own.normalizer = normalizers.Sequence(steps)
    own.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=320, special_tokens=[*SPECIAL, *BYTES], unk_token="<unk>"))
    vocabulary = [tuple(entry) for entry in json.loads(own.to_str())["model"]["vocab"]]
    own.model = models.Unigram(vocabulary, 0, byte_fallback=True)
    return wrapped(own, " </s>")


def sentencepiece_bpe():
    own = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    own.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=450, special_tokens=[*SPECIAL, *BYTES]))
    return wrapped(own)


ADDED = [AddedToken("<sep>"), AddedToken("old town", lstrip=True, rstrip=True), AddedToken("It", single_word=True)]
TRIMMED = processors.ByteLevel(trim_offsets=True)
TOKENIZERS = {
    "byte-level BPE, trimmed offsets": lambda: bpe(byte_level(add_prefix_space=True), post=TRIMMED),
    "byte-level BPE, added tokens": lambda: bpe(byte_level(), added=ADDED),
    "byte-level BPE, Llama 3": lambda: wrapped(bpe(split(LLAMA3), normalizers.NFC(), ignore_merges=True)),
    "BPE without words": sentencepiece_bpe,
    "Unigram, T5": unigram,
}


@pytest.fixture(scope="module", params=[*TOKENIZERS, pytest.param("SmolLM2", marks=[tiny.needs_smollm2, pytest.mark.slow])])
def tokenizer(request):
    if request.param == "SmolLM2":
        return Pretrained(tiny.SMOLLM2["model_name"], gguf_file=tiny.SMOLLM2["gguf_file"]).tokenizer()
    names = dict(zip(["unk_token", "bos_token", "eos_token", "pad_token"], SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[request.param](), **names)


def continued(own, prompt, text, **options):
    """What a prompt and a text share, from the tokens of both."""
    (before,), (ids,) = (tokenize(own, [some], **options) for some in (prompt, text))
    return ids, n_common(before, ids), before == ids[: len(before)]


@settings(max_examples=30)
@given(
    prompts=st.lists(TEXTS, min_size=1, max_size=4),
    responses=st.lists(TEXTS, min_size=4, max_size=4),
    between=st.sampled_from(["", " ", "\n", "a\n", "?\n", "<s>\n", "</s>\n\n"]),
    is_whole=st.booleans(),
)
def test_a_prompts_tokens_end_where_both_tokenized_say(tokenizer, prompts, responses, between, is_whole):
    prompts = [prompt + between for prompt in prompts]
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=False)]
    prompts = [prompt.rstrip(" ") for prompt in prompts]
    found = tokenize_continued(tokenizer, prompts, texts, is_whole=is_whole)
    assert found == [continued(tokenizer, *one, is_whole=is_whole) for one in zip(prompts, texts, strict=True)]


def test_a_text_that_does_not_begin_with_its_prompt_shares_its_first_tokens():
    own = tiny.tokenizer()
    assert tokenize_continued(own, ["It was not"], ["It was old"]) == [continued(own, "It was not", "It was old")]
