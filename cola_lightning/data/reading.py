"""Reads a source: its splits, from files, a folder with a file per split, or the hub."""

import csv
import functools
import glob
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cola_lightning import hub
from cola_lightning.data.rows import Rows
from cola_lightning.errors import UserError, causes, nearest_path, one_line

log = logging.getLogger(__name__)

Splits = Mapping[str, Callable[[], Rows]]  # each is read when it is called
TextUnit = Literal["file", "line", "paragraph"]

# Of datasets, by a file's ending.
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
READERS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "json")
COMPRESSIONS = (".gz", ".zst")
SHARD = re.compile(r"-\d+-of-(\d+)$")  # the end of the name of a file that has a part of a split
WORDS = "train|training|val|valid|validation|dev|development|eval|evaluation|test|testing"
SPLIT = re.compile(rf"(?<![a-z])({WORDS})(?![a-z])")  # in a file's name, which then says its split
PACKAGE = Path(__file__).parent.parent
FILES_READ = 100  # at most, of a folder of pictures: all of them may be many gigabytes


# ---------------------------------------------------------------------- a source and its splits


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # pathlib's fails for a name that begins with ~


def _matches(source: str) -> list[Path]:
    """The files that a source names: one, or those that match a pattern such as ``logs/*.jsonl``."""
    if (path := _path(source)).is_file():
        return [path]
    return [match for match in map(Path, sorted(glob.glob(str(path), recursive=True))) if match.is_file()]


def is_file(source: str) -> bool:
    """Whether a source is a file, or a pattern of files, and so has one split."""
    return bool(_matches(source))


def is_on_hub(source: str) -> bool:
    """Whether a source is the id of a data set on the hub."""
    return not _path(source).exists() and not is_file(source)


def _is_saved(folder: Path) -> bool:
    """Whether ``datasets`` has saved a folder to disk: by ``DatasetDict.save_to_disk``, or by ``Dataset.save_to_disk``."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_splits(
    source: str, subset: str | None = None, revision: str | None = None, text_unit: TextUnit = "paragraph"
) -> Splits:
    """The splits of a source, by the names that it has.

    Args:
        source: a file or a pattern of files (one split, ``train``), a folder with a file per split (``train.csv``,
            ``dev.jsonl``), a folder that ``datasets`` has saved to disk, or the id of a data set on the hub.
        subset: on the hub, the name of a configuration (``sst2`` of ``nyu-mll/glue``).
        revision: on the hub, a branch, tag or commit.
        text_unit: what a row of a ``.txt`` file is: the ``file``, a ``line``, or a ``paragraph`` between empty lines.

    Raises:
        UserError: if there is no such file, folder, data set or subset, or it cannot be read.
        HubError: if the data set is on the hub, which cannot be reached.
    """
    import datasets

    path = _path(source)
    if files := _matches(source):
        return {"train": _reader(files, source, text_unit)}
    if path.is_dir() and not _is_saved(path):
        return {split: _reader(files, f"{source}, {split}", text_unit) for split, files in _files_by_split(path).items()}
    data: Any = datasets.load_from_disk(path) if path.is_dir() else hub_data(source, subset, revision)
    if not isinstance(data, dict):
        data = {"train": data}
    contents = {split: [Path(file["filename"]) for file in rows.cache_files] for split, rows in data.items()}
    return {
        split: functools.partial(Rows, rows, f"{source}, {split}", functools.partial(hashes_of, contents[split]))
        for split, rows in data.items()
    }


def choose_split(splits: Splits, name: str | None, usual_names: Sequence[str], option: str) -> Callable[[], Rows] | None:
    """What reads the split that an option names or, if it is null, the first one of the usual names; None if there is none.

    Raises:
        UserError: for a split that does not exist; it lists those that do.
    """
    if name is not None and name not in splits:
        raise UserError(f"data.{option}: there is no split {name!r}; the splits are {', '.join(splits)}")
    return next((splits[split] for split in ([name] if name else usual_names) if split in splits), None)


def files_identity(source: str) -> dict[str, Any]:
    """Size and hash of a source's files on this machine, as ``{"files": {name: [size, sha256]}}``; empty for the hub.

    Of a folder without files of rows, such as one of pictures: their number, and a hash of their names and sizes.
    """
    path = _path(source)
    if is_on_hub(source):
        return {}
    files = _matches(source) or (sorted(path.rglob("data-*.arrow")) if _is_saved(path) else [])
    if not files and not any(_ending(file.name) for file in path.iterdir() if file.is_file()):
        return {"folder": [sum(file.is_file() for file in paths_inside(path)), folder_hash(path)]}
    files = files or [file for files_of_split in _files_by_split(path).values() for file in files_of_split]
    names, identities = [file.name for file in files], {}
    for file in files:
        name = file.name if names.count(file.name) == 1 else str(file)
        identities[name] = [file.stat().st_size, hash_of_file(file)]
    return {"files": identities}


def folder_hash(folder: Path) -> str:
    """A hash of the names and sizes of the files in a folder, and of what is in some of them."""
    files = [file for file in paths_inside(folder) if file.is_file()]
    return hash_of_some(files, [str(file.relative_to(folder)) for file in files])


def hash_of_some(files: Sequence[Path], names: Sequence[str]) -> str:
    """A hash of the names and sizes of files, and of what is in some of them."""
    known = [(name, file.stat().st_size) for name, file in zip(names, files, strict=True)]
    some = [hash_of_file(file) for file in files[:: len(files) // FILES_READ + 1]]
    return hashlib.sha256(repr([known, some]).encode()).hexdigest()


def hashes_of(files: Sequence[Path]) -> list[str]:
    """The hashes of files, in their order."""
    return [hash_of_file(file) for file in files]


def hashes_of_code() -> list[str]:
    """The hashes of the code that makes examples of a file's rows: what ``datasets`` has cached of other code is of no use."""
    return hashes_of(sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("data/*.py")]))


def hash_of_file(file: Path) -> str:
    """The SHA-256 of a file, which is computed once as long as the file stays as it is."""
    return _hash(file, file.stat().st_size, file.stat().st_mtime_ns)


@functools.cache
def _hash(file: Path, *_: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---------------------------------------------------------------------- files


def paths_inside(folder: Path) -> Iterator[Path]:
    """The paths inside a folder, in order, also those in a linked folder in it, which ``rglob`` leaves out."""
    for entry in sorted(folder.iterdir()):
        yield entry
        yield from sorted(entry.rglob("*"))


def _ending(name: str) -> str | None:
    """The ending of a file's name that has a reader; None if there is none."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((ending for ending in READERS if name.endswith(ending)), None)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder: ``train.csv``, or ``train-00000-of-00002.parquet`` and so on.

    A folder's only file, such as ``metadata.csv`` or ``data.jsonl``, is ``train``, unless its name says another split.
    """
    files, numbers = dict[str, list[Path]](), dict[str, int]()
    for path in sorted(folder.iterdir()):
        if path.is_file() and (ending := _ending(path.name)) is not None:
            name = path.name[: path.name.lower().rindex(ending)].lower()
            files.setdefault(SHARD.sub("", name), []).append(path)
            if shard := SHARD.search(name):
                numbers[SHARD.sub("", name)] = int(shard[1])
    if not files:
        raise UserError(f"data.source: the folder {str(folder)!r} has no file such as train.csv or train.jsonl")
    for split, n in numbers.items():
        if len(files[split]) != n:
            raise UserError(
                f"data.source: {split} in {str(folder)!r} has {n} files by their names, but {len(files[split])} are there"
            )
    (name, *others) = files
    return {"train": files[name]} if not others and SPLIT.search(name) is None else files


def _reader(files: list[Path], place: str, text_unit: TextUnit) -> Callable[[], Rows]:
    return functools.cache(lambda: Rows(_read(files, text_unit), place, lambda: hashes_of(files)))


def _read(files: list[Path], text_unit: TextUnit) -> Any:
    """The rows of files of one kind."""
    import datasets
    from pandas.errors import ParserWarning

    ending = _ending(files[0].name)
    others = [file for file in files if _ending(file.name) != ending]
    if ending is None or others:
        examples = " and ".join(repr(str(file)) for file in [files[0], *others[:1]])
        raise UserError(f"data.source: all files must have the same ending, one of {', '.join(READERS)}, got {examples}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # of cells without a column, which pandas drops
            options = {"sample_by": "document" if text_unit == "file" else text_unit} if ending == ".txt" else {}
            if READERS[ending] == "csv":
                options = _csv_options(files, "\t" if ending == ".tsv" else ",")
            read = getattr(datasets.Dataset, f"from_{READERS[ending]}")  # load_dataset would tell the hub that it is used
            rows = read([glob.escape(str(file)) for file in files], **options)  # datasets takes names for patterns
            if ending == ".txt":
                # Of a lambda, datasets caches by the code, and not by the name.
                rows = rows.map(lambda batch: {"text": [one.strip("\n") for one in batch["text"] if one.strip()]}, batched=True)
            if READERS[ending] == "json":
                rows.data.validate(full=True)  # Arrow does not ask for UTF-8 when it reads
    except (datasets.exceptions.DatasetsError, OSError, EOFError, ValueError, RuntimeError, TypeError, StopIteration) as error:
        *_, innermost = causes(error)
        reason = _reason(files, ending) or one_line(str(innermost)) or "it is empty"
        raise UserError(f"data.source: {str(files[0])!r} cannot be read: {reason}") from error
    return _as_written(rows, files) if READERS[ending] == "json" else rows


def _reason(files: Sequence[Path], ending: str) -> str | None:
    """Why files of text cannot be read, where the readers' own messages do not say it: the first line that is not right."""
    for file in files if READERS[ending] != "parquet" else ():
        number = 0
        try:
            with _lines(file) as lines:
                for line in lines:
                    number += 1
                    if ending in (".jsonl", ".ndjson") and line.strip():
                        json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, EOFError) as error:
            return f"line {number + isinstance(error, UnicodeDecodeError | EOFError)} of {file.name}: {one_line(str(error))}"
        if number < 2 and READERS[ending] == "csv":
            return f"{file.name} has no rows"
    return None


def _as_written(rows: Any, files: Sequence[Path]) -> Any:
    """The rows of JSON files; again, value by value, if Arrow's types would change some: mixed types, numbers and dates."""
    import datasets

    features = {name: _exact_feature(feature) for name, feature in rows.features.items()}
    if features == rows.features and "Json(" not in str(features):
        return rows
    given = {"files": [str(file) for file in files], "features": features, "hashes": (*hashes_of(files), *hashes_of_code())}
    return datasets.Dataset.from_generator(_json_rows, datasets.Features(features), gen_kwargs=given)


def _exact_feature(feature: Any) -> Any:
    """A feature whose values are those of the file: dates are texts; a float may be an integer, which is written without .0."""
    import datasets

    if isinstance(feature, dict):
        return {name: _exact_feature(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_exact_feature(feature.feature))
    dtype = getattr(feature, "dtype", "")
    if dtype.startswith(("date", "time")):
        return datasets.Value("string")
    return datasets.Json() if dtype.startswith("float") else feature


def _json_rows(files: Sequence[str], features: Mapping[str, Any], hashes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of JSON files, each value of a ``Json`` feature as its JSON text. The hashes make ``datasets`` cache them."""
    for file in files:
        with _lines(Path(file)) as opened:
            is_list = next((line for line in opened if line.strip()), "").lstrip().startswith("[")
            opened.seek(0)
            for row in json.load(opened) if is_list else (json.loads(line) for line in opened if line.strip()):
                row = row if isinstance(row, dict) else {"text": row}
                yield {name: _encoded(row.get(name), feature) for name, feature in features.items()}


def _encoded(value: Any, feature: Any) -> Any:
    """A value for ``datasets``, which keeps a text of a ``Json`` feature only if it is JSON. NaN is no value."""
    import datasets

    if value is None or value != value:
        return None
    if isinstance(feature, datasets.Json):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(feature, datasets.List):
        return [_encoded(part, feature.feature) for part in value]
    return {name: _encoded(value.get(name), part) for name, part in feature.items()} if isinstance(feature, dict) else value


def _csv_options(files: Sequence[Path], sep: str) -> dict[str, Any]:
    """All values are text, not numbers, dates or "NA"; an empty cell is null. In a TSV, a quote may be part of the text."""
    import datasets

    wrong = next(filter(None, (_wrong_quote(file, sep) for file in files)), None)
    has_quotes = wrong is None or sep == ","
    with _lines(files[0]) as lines:
        names = next(csv.reader(lines, delimiter=sep, quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE))
    if wrong is not None and has_quotes:
        log.warning("data.source: %s. Rows up to the next quote are read as one", wrong)
    if len({*names}) < len(names):  # pandas renames them
        raise ValueError(f"columns of the same name, {', '.join(names)}")
    # A column without a name, as that of the index that pandas writes, gets the name that pandas gives it.
    names = [name or f"Unnamed: {k}" for k, name in enumerate(names)]
    features = datasets.Features({name: datasets.Value("string") for name in names})
    options = {"sep": sep, "features": features, "index_col": False, "encoding": "utf-8-sig"}
    options |= {} if has_quotes else {"quoting": csv.QUOTE_NONE}
    return options | {"keep_default_na": False, "na_values": [""]}


def _lines(file: Path) -> Any:
    """A file of text, opened, without its compression and mark of byte order."""
    import fsspec

    return fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="")


def _wrong_quote(file: Path, sep: str) -> str | None:
    """Where a cell begins with a double quote that does not enclose it; None if all do."""
    csv.field_size_limit(sys.maxsize)
    with _lines(file) as lines:
        reader, n_lines = csv.reader(lines, delimiter=sep, strict=True), 0
        try:
            for row in reader:
                if sep == "\t" and any(sep in cell for cell in row):
                    return f"{file}, line {n_lines + 1}: a double quote joins cells"
                n_lines = reader.line_num
        except csv.Error:
            return f"{file}, line {n_lines + 1}: a cell begins with a double quote, but does not end with one"
    return None


# ---------------------------------------------------------------------- the hub


def hub_data(source: str, subset: str | None, revision: str | None) -> Any:
    """The splits of a data set on the hub, as ``datasets`` has them; see :func:`load_splits`."""
    import datasets

    near = nearest_path(source)
    if _ending(source) is not None or not hub.is_repo_id(source):
        kinds = "a file, a folder or the name of a data set on the hub (owner/name)"
        raise UserError(f"data.source: {source!r} is not {kinds}{near}")
    try:
        with hub.needed_for(f"data.source: {source!r}"):
            return datasets.load_dataset(source, subset, revision=revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.source, data.subset: {source!r} cannot be loaded: {one_line(str(error))}{near}") from error
