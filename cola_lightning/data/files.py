"""Files of rows: CSV, TSV, JSON Lines, JSON and Parquet; each row records its file and line.

CSV and JSON are read by the standard library, not by ``datasets``, which parses ``NA`` and ``null`` as missing, a text that is
a date as a date and ``007`` as 7, shifts or drops the cells of a row that has too many, and has no line numbers. All values of
a CSV file are text.
"""

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from cola_lightning.data.row import Row
from cola_lightning.errors import UserError, one_line, shortened_text

LONGEST_CELL = 2**31 - 1  # characters; the standard library's own limit is 131,072

Rows = Generator[tuple[str, Any], None, None]  # each row's line in its file, and its fields


def iterate_file(path: Path) -> Iterator[Row]:
    """The rows of a file, read lazily.

    Args:
        path: a file that ends in one of :data:`ENDINGS`; all but Parquet may be compressed by gzip, and then also end in
            ``.gz``.

    Raises:
        UserError: for another ending, a file without rows, and a line that cannot be read.
    """
    if (ending := ending_of(path.name)) is None:
        raise UserError(f"data.source: expected a file that ends in {', '.join(ENDINGS)}, received {str(path)!r}")
    if ending == ".parquet":
        yield from _iterate_parquet(path)
        return
    is_empty = True
    with closing(READERS[ending](path)) as rows:  # closes the file if a row is refused
        for place, fields in rows:
            if not isinstance(fields, dict):
                raise UserError(f"{path}, {place}: expected one JSON object, received {shortened_text(json.dumps(fields))!r}")
            is_empty = False
            yield Row(fields, f"{path}, {place}", has_null=ending not in (".csv", ".tsv"))
    if is_empty:
        received = "an empty file" if path.stat().st_size == 0 else "none"
        raise UserError(f"{path}: expected {EXPECTED[ending]}, received {received}")


def ending_of(name: str) -> str | None:
    """The ending of a file's name that selects its reader, without ``.gz``; None for an unknown one.

    Example:
        >>> ending_of("train.CSV"), ending_of("my.rows.jsonl.gz"), ending_of("rows.xlsx")
        ('.csv', '.jsonl', None)
    """
    name = name.lower()
    ending = next((ending for ending in ENDINGS if name.removesuffix(".gz").endswith(ending)), None)
    return None if ending == ".parquet" and name.endswith(".gz") else ending


# ---------------------------------------------------------------------- lines of text


def _lines(path: Path) -> Generator[str, None, None]:
    """The lines of a file in UTF-8, with line ends."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}, line {number}: expected UTF-8, received the byte 0x{byte:02x}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a gzip file, received another or a damaged one ({error})") from error
    except OSError as error:
        raise UserError(f"data.source: expected a file that can be read, received {str(path)!r}: {error.strerror}") from error


# ---------------------------------------------------------------------- CSV and TSV


def _read_csv(path: Path, delimiter: str = ",") -> Rows:
    before, lines = csv.field_size_limit(LONGEST_CELL), _lines(path)
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        columns = next(reader, [])
        _check_columns(path, columns, delimiter)
        while True:
            line = reader.line_num + 1
            if (cells := next(reader, None)) is None:
                return
            if delimiter == "\t" and any("\n" in cell and "\t" in cell for cell in cells):
                raise UserError(
                    f"{path}, line {line}: expected cells without tabs, received one of several lines with tabs: a double "
                    'quote at the beginning of a cell begins a text in quotes, so write it so: """word"" and the rest"'
                )
            if cells and len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {line}: expected {len(columns)} columns, as in the first line, received {len(cells)}; a "
                    f"text that contains {delimiter!r} needs double quotes"
                )
            if cells:
                yield f"line {line}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: expected cells in double quotes, or without any, received others ({error})"
        ) from error
    finally:
        lines.close()
        csv.field_size_limit(before)


def _read_tsv(path: Path) -> Rows:
    return _read_csv(path, "\t")


def _check_columns(path: Path, columns: list[str], delimiter: str) -> None:
    """Refuses a first line without unique column names."""
    if not columns:
        received = "an empty file" if path.stat().st_size == 0 else "an empty line"
        raise UserError(f"{path}: expected column names in the first line, received {received}")
    if twice := [name for k, name in enumerate(columns) if name in columns[:k]]:
        raise UserError(f"{path}, line 1: expected unique column names, received {twice[0]!r} twice")
    if len(columns) == 1 and (others := [mark for mark in ",;\t|" if mark in columns[0] and mark != delimiter]):
        raise UserError(
            f"{path}, line 1: expected columns separated by {delimiter!r} (.csv: by commas, .tsv: by tabs), received by "
            f"{others[0]!r}: {shortened_text(columns[0])!r}"
        )


# ---------------------------------------------------------------------- JSON


def _read_json_lines(path: Path) -> Rows:
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason, start = getattr(error, "msg", _limit(error)), shortened_text(line.rstrip("\r\n"))
                raise UserError(f"{path}, line {number}: expected one JSON object, received {start!r} ({reason})") from error


def _read_json(path: Path) -> Rows:
    """A list of objects, alone or as the only such list in an object; or JSON Lines, which often have this ending."""
    text = "".join(_lines(path))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # after a first object
            yield from _read_json_lines(path)
            return
        raise UserError(f"{path}, line {error.lineno}: expected JSON, received something else ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a list of objects, received one {_limit(error)}") from error
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if len(lists) != 1:
            fields = ", ".join(map(repr, value)) or "no field"
            raise UserError(f"{path}: expected a list of objects, alone or in an object, received an object with {fields}")
        (value,) = lists
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, received {shortened_text(json.dumps(value))!r}")
    for number, fields in enumerate(value, start=1):
        yield f"row {number}", fields


def _limit(error: Exception) -> str:
    """The limit of Python's parser that valid JSON exceeds."""
    return "nested too deeply" if isinstance(error, RecursionError) else "with a number of too many digits"


# ---------------------------------------------------------------------- Parquet


def _iterate_parquet(path: Path) -> Iterator[Row]:
    import datasets
    from pyarrow import parquet

    try:
        if n_rows := parquet.read_metadata(path).num_rows:  # datasets reads no file without rows
            # streaming: does not copy the file to a cache
            data = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
            names = class_names(data)
            for number, fields in enumerate(data, start=1):
                yield Row(fields, f"{path}, row {number}", names)
    except Exception as error:  # pyarrow may raise anything for damaged bytes
        raise UserError(
            f"{path}: expected a Parquet file, received another or a damaged one ({one_line(str(error))})"
        ) from error
    if not n_rows:
        raise UserError(f"{path}: expected rows, received none")


def class_names(data: Any) -> dict[str, list[str]]:
    """The class names of each ``ClassLabel`` field (which holds class indices) of a data set of ``datasets``."""
    features = getattr(data, "features", None) or {}
    return {field: list(kind.names) for field, kind in features.items() if hasattr(kind, "names")}


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
}
ENDINGS = (*READERS, ".parquet")
EXPECTED = dict.fromkeys(READERS, "one JSON object per line") | {".json": "a list of objects"}
EXPECTED |= dict.fromkeys((".csv", ".tsv"), "rows below the first line")
