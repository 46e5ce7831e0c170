"""The tokens of many rows are in a file that is mapped into memory, not in the process' own memory."""

import json
import os
import random

from tests import forked, tiny

N_ROWS, N_WORDS = 5_000, (40, 80)  # of prompt and response
# Own memory for a token, in bytes, after the start that tokenizes and after the one from the cache: lists of Python's numbers
# would need about 75, arrays of ids and labels 8. datasets.map, beside which this was chosen, holds 7 and 0.3.
LIMITS = [20, 4]

PROGRAM = """
import ctypes, gc, json, re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets, pyarrow, transformers

from cola_lightning import TextDataModule

datasets.disable_progress_bars()
tokenizer = transformers.AutoTokenizer.from_pretrained("tokenizer", pad_token="</s>")


def own_bytes():  # without what is mapped from files, and without what was freed
    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    (kib,) = re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def prepared(source):
    data = TextDataModule(source, chat_template=False, max_length=1024, batch_size=8)
    trainer = {"training": False, "world_size": 1, "global_rank": 0, "limit_val_batches": 1.0}
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer, seed=0), **trainer)
    data.prepare_data()
    data.setup("fit")
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in islice(data.train_dataloader(), 100))
    return data, len(data.train), n_tokens / 800 * len(data.train)


few = prepared("few")  # what the libraries make when they are first used
before = own_bytes()
many, n_rows, n_tokens = prepared("many")
print(json.dumps([n_rows, n_tokens, own_bytes() - before]))
"""


def write(folder, n_rows):
    draw, words = random.Random(0), " ".join(tiny.TEXT).split()
    texts = [[" ".join(draw.choices(words, k=k)) for k in N_WORDS] for _ in range(n_rows)]
    rows = [{"prompt": prompt, "response": response} for prompt, response in texts]
    tiny.write_rows(folder, rows, ["train"])
    tiny.write_rows(folder, rows[:10], ["validation", "test"])


def test_the_tokens_of_many_rows_take_no_memory_of_the_process(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "few", 1000)
    write(tmp_path / "many", N_ROWS)
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    starts = [forked.run("-c", PROGRAM, cwd=tmp_path, env=environment, check=True) for _ in LIMITS]
    (first, *_), (second, *_) = found = [json.loads(done.stdout.splitlines()[-1]) for done in starts]
    assert first == second == N_ROWS
    a_token = [n_bytes / n_tokens for _, n_tokens, n_bytes in found]
    assert [number < limit for number, limit in zip(a_token, LIMITS, strict=True)] == [True, True], a_token
