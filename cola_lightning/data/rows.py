"""Rows of a data set, from the Hugging Face hub or from a folder of JSONL files; each knows where it stands."""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from cola_lightning import hub
from cola_lightning.errors import HubError, UnusableRow, UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

PERCENT_LEFT_OUT = 1  # of the rows of a part, at most


class Row(dict[str, Any]):
    """A row's fields by name. A field that is asked for and is not there, or holds something else, is the user's mistake.

    One that is empty in this row makes it an :class:`~cola_lightning.errors.UnusableRow`.

    Attributes:
        place: file and line, or data set and number.

    Example:
        >>> Row({"text": "Fine."}, "train.jsonl, line 1").text("text")
        'Fine.'
    """

    def __init__(self, fields: dict[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place

    def __missing__(self, field: str) -> Any:
        raise UserError(f"{self.place}: expected the field {field!r}, received {', '.join(map(repr, self)) or 'no field'}")

    def text(self, field: str) -> str:
        """A field that holds text."""
        if not isinstance(value := self[field], str):
            kind = UnusableRow if value is None else UserError
            raise kind(f"{self.place}: expected text in the field {field!r}, received {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            message = f"{self.place}: expected text in the field {field!r}, received half a character, {value!r}"
            raise UnusableRow(message) from error
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that holds a list of texts, one at least."""
        values = self[field]
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            kind = UnusableRow if values is None or values == [] else UserError
            raise kind(f"{self.place}: expected a list of texts in the field {field!r}, received {values!r}")
        return tuple(Row({field: value}, self.place).text(field) for value in values)

    def inner(self, field: str) -> "Row":
        """A field that holds fields of its own."""
        if not isinstance(value := self[field], dict):
            raise UserError(f"{self.place}: expected an object in the field {field!r}, received {value!r}")
        return Row(value, self.place)

    def messages(self, field: str) -> list[dict[str, str]]:
        """A field that holds a conversation: turns of a ``role`` and its ``content``."""
        turns = self[field]
        if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"{self.place}: expected a list of turns with role and content in {field!r}, received {turns!r}")
        inner = [Row(turn, self.place) for turn in turns]
        return [{"role": turn.text("role"), "content": turn.text("content")} for turn in inner]

    def label(self, field: str, n_labels: int) -> int:
        """A field that holds a label from 0 to ``n_labels - 1``; true is 1. Null, or -1, is a row without a label."""
        value = self[field]
        if not isinstance(value, int) or not 0 <= value < n_labels:
            kind = UnusableRow if value in (None, -1) else UserError
            raise kind(f"{self.place}: expected a label from 0 to {n_labels - 1} in the field {field!r}, received {value!r}")
        return int(value)


def read_rows(source: str, split: str, subset: str | None = None) -> list[Row]:
    """All rows of a split.

    Args:
        source: a folder that holds ``{split}.jsonl``, one JSON object a line in UTF-8, or the id of a data set on the hub.
        split: ``train``, ``validation``, ``test``.
        subset: on the hub, the name of a configuration (``sst2`` of ``nyu-mll/glue``).

    Raises:
        UserError: if there is no such folder, file or data set, or a line that is no JSON object.
        HubError: if the data set is on the hub, and the hub cannot be reached.
    """
    if (folder := _folder(source)) is not None:
        return list(_read_jsonl(folder / f"{split}.jsonl"))
    rows = _load_from_hub(source, split, subset)
    return [Row(dict(fields), f"{source}, {split}, row {number}") for number, fields in enumerate(rows, start=1)]


def has_split(source: str, split: str) -> bool:
    """Whether a folder holds a split; a data set on the hub is taken to."""
    folder = _folder(source)
    return folder is None or (folder / f"{split}.jsonl").is_file()


def fill_cache(source: str, subset: str | None, splits: Collection[str]) -> None:
    """Lets one process download a data set from the hub before all read it; a folder needs nothing."""
    if _folder(source) is None:
        for split in sorted(splits):
            _load_from_hub(source, split, subset)


def check_subset(source: str | None, subset: str | None) -> None:
    """Refuses a subset where nothing on the hub is named that could have it."""
    if subset is not None and (source is None or _folder(source) is not None):
        raise UserError(f"data.subset: expected null where data.source is {source or 'null'}, received {subset!r}")


def _folder(source: str) -> Path | None:
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else None


def _read_jsonl(path: Path) -> Iterator[Row]:
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in path.parent.glob("*.jsonl"))) or "no JSONL file"
        raise UserError(f"data.source: expected {path.name!r} in {path.parent}, received {there}")
    n_rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: expected UTF-8, received the byte 0x{line[error.start]:02x}") from error
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{place}: expected one JSON object, received {_start_of(line)!r} ({reason})") from error
            if not isinstance(fields, dict):
                raise UserError(f"{place}: expected one JSON object, received {_start_of(line)!r}")
            n_rows += 1
            yield Row(fields, place)
    if not n_rows:
        raise UserError(f"{path}: expected one JSON object a line, received an empty file")


def _start_of(line: bytes) -> str:
    text = line.decode("utf-8").rstrip("\r\n")
    return text if len(text) <= 40 else f"{text[:37]}..."


def _load_from_hub(source: str, split: str, subset: str | None) -> Any:
    if Path(source).is_file() or not hub.is_repo_id(source):
        raise UserError(
            f"data.source: expected a folder that exists, or the id of a data set on the hub (owner/name), received {source!r}"
        )
    import datasets

    try:
        with hub.offline_if_unreachable() as is_offline:
            return datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # what it raises for ids, subsets and splits that are not there
        if is_offline:
            raise HubError(
                f"data.source: {source!r} is not in the local cache, and the Hugging Face hub cannot be reached: a folder of "
                "JSONL files works without it"
            ) from error
        raise UserError(
            f"data.source: expected a data set with the split {split!r}, received {source!r}: {one_line(str(error))}"
        ) from error


class LeftOut:
    """The rows of a part that cannot be used: left out with a warning where they are few.

    Example:
        >>> left_out = LeftOut()
        >>> with left_out.if_unusable():
        ...     text = Row({"text": None}, "train.jsonl, line 7").text("text")
        >>> left_out.errors
        [UnusableRow("train.jsonl, line 7: expected text in the field 'text', received None")]
    """

    def __init__(self) -> None:
        self.errors: list[UnusableRow] = []

    @contextmanager
    def if_unusable(self) -> Iterator[None]:
        """Takes note of a row that turns out to be unusable inside the block, and goes on behind it."""
        try:
            yield
        except UnusableRow as error:
            self.errors.append(error)

    def check(self, n_rows: int) -> None:
        """Warns of what is left out.

        Args:
            n_rows: of the part, these among them.

        Raises:
            UserError: if it is more than one in a hundred.
        """
        n_left_out = len(self.errors)
        if not n_left_out:
            return
        if 100 * n_left_out > PERCENT_LEFT_OUT * n_rows:
            raise UserError(
                f"{self.errors[0]} ({n_left_out} of {n_rows} rows cannot be used; up to {PERCENT_LEFT_OUT} % would be left out)"
            )
        log.warning("%d of %d rows cannot be used, and are left out; the first: %s", n_left_out, n_rows, self.errors[0])


def draw(rows: Sequence[T], sizes: Sequence[int], seed: int, what: str) -> list[list[T]]:
    """Disjoint parts of the rows, drawn together by one seeded permutation.

    Args:
        rows: what is drawn from, in its order.
        sizes: of the parts.
        seed: of the permutation.
        what: names the rows in the message.

    Raises:
        UserError: if there are fewer rows than the parts need.
    """
    if sum(sizes) > len(rows):
        wanted = " + ".join(map(str, sizes)) + (f" = {sum(sizes)}" if len(sizes) > 1 else "")
        raise UserError(f"{what}: expected at least {wanted} rows, received {len(rows)}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [[rows[i] for i in order[start : start + size]] for start, size in zip(starts, sizes, strict=True)]
