"""Pictures with labels: data for image classifiers."""

import functools
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from cola_lightning.constants import IGNORE_INDEX
from cola_lightning.data.base import from_module
from cola_lightning.data.classification import LABELS, LabelledDataModule
from cola_lightning.data.labels import ClassReader, sorted_labels
from cola_lightning.data.preprocessing import Preprocessor, Size
from cola_lightning.data.reading import Splits, folder_hash, hash_of_some, paths_inside
from cola_lightning.data.report import RowReport
from cola_lightning.data.rows import Row, Rows
from cola_lightning.data.source import VALIDATION_SPLITS, Source
from cola_lightning.errors import UnusableRow, UserError

# Columns with the picture or its path, by the first that a data set has.
IMAGES = ["image", "img", "image_path", "file_name", "filename", "path", "file"]
ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".gif"}
ENDINGS |= {".tif", ".tiff", ".ppm", ".pgm"}
# Of pillow's formats. Others run programs: Ghostscript for EPS, whatever the file's name is.
FORMATS = ("JPEG", "JPEG2000", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "ICO")
SPLIT_NAMES = {"training": "train", "testing": "test"}  # of folders, as people call them
ROWS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # a folder with such a file has its rows there
RATIOS = 3 / 4, 4 / 3  # of a random crop's sides


@dataclass(frozen=True)
class Pictures(Preprocessor):
    """Pictures with their labels. An example has the label alone; the picture is read from its row, and decoded, for a batch.

    Attributes:
        image_processor: makes pixels of pictures.
        column: that with the picture, as it is stored.
        label: reads a row's label.
    """

    image_processor: Any = field(repr=False)
    column: str
    label: ClassReader

    features = {"labels": "int64"}  # noqa: RUF012

    @override
    def read(self, row: Row) -> dict[str, Any]:
        index = self.label(row)
        if not _is_picture(row[self.column]):
            raise row.refused(self.column, "a picture")
        _opened(row[self.column], is_whole=False)
        return {"labels": index}

    @override
    def encode(self, items: Sequence[dict[str, Any]], notes: set[str]) -> list[list[dict[str, Any]]]:
        return [[example] for example in items]

    @override
    def size(self, example: dict[str, Any]) -> Size:
        return Size(0)

    @override
    def identity(self, rows: Rows) -> str | None:
        import PIL

        files = hashlib.sha256(repr([_facts(path) for path in _paths(rows, self.column)]).encode()).hexdigest()
        return f"{super().identity(rows)} {PIL.__version__} {FORMATS} {files}"

    @override
    def completed(self, examples: Any, rows: Rows, report: RowReport) -> Any:
        usable = np.delete(rows.numbers, [*report.unusable])
        labels = np.full(len(rows.split), IGNORE_INDEX)
        labels[usable] = examples.with_format("numpy")["labels"][:]
        pictures = rows.split.select_columns([self.column]).rename_columns({self.column: "image"})
        # To selected rows, datasets adds no column without a copy of all pictures.
        return pictures.add_column("labels", labels).select(usable).with_transform(_decoded)

    @override
    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = self.image_processor([row["image"] for row in examples], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in examples])}


class ImageDataModule(LabelledDataModule):
    """Labelled pictures for an image classifier.

    A picture gets its size, mean and standard deviation by the image processor of the trained module. Workers decode the
    pictures of a batch when they make it, so there are never more in memory. Before training, each picture is decoded once at
    a small size, in ``num_proc`` processes: one that cannot be read is skipped and counted. The result is cached.

    Labels are names or whole numbers, as for ``TextClassificationDataModule``; of a folder, they are the names of its folders.

    Args:
        source: A folder with a folder of pictures for each class (or with folders ``train``, ``validation`` and ``test`` of
            this kind), a file with a column of paths (relative to the file) and one of labels, a Parquet file or the id of a
            data set on the hub with pictures, or several: see ``SourceDataModule``. The parts of a folder or file have the same
            share of each label. ``predict`` also takes a folder of pictures alone.
        subset: Name of a configuration of a data set on the hub.
        image_field: Column with the picture or its path. ``null`` finds it by its name: ``image``, ``img``, ``image_path``,
            ``file_name`` and so on.
        random_crop: A random crop of a training picture has at least this share of its area, and is then resized. 1 does not
            crop. Crops and flips depend only on the seed, the epoch and the row.
        random_flip: Mirror half of the training pictures, drawn at random. Use ``false`` for digits, text, or left and right
            hands.
        **labelled: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Attributes:
        image_processor: the trained module's. Without a Trainer, or for a module that has none, set it before ``setup``.

    Raises:
        UserError: for invalid files, rows and sizes.
    """

    image_processor: Any = from_module("image_processor")

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        image_field: str | None = None,
        random_crop: float = 0.25,
        random_flip: bool = True,
        **labelled: Any,
    ) -> None:
        super().__init__(source, subset, **labelled)
        if not 0 < random_crop <= 1:
            raise UserError(f"data.random_crop must be a share of the area, above 0 and at most 1, got {random_crop}")
        self.image_field, self.random_crop, self.random_flip = image_field, random_crop, random_flip

    @override
    def find_inputs(self, columns: Sequence[str]) -> list[str]:
        name = self.image_field or next((name for name in IMAGES if name in columns), None)
        if name is None or name not in columns:
            raise UserError(f"data.image_field: name one of the columns {', '.join(columns)}{f', got {name}' if name else ''}")
        return [name]

    # ------------------------------------------------------------------ sources

    @override
    def identity_of(self, source: Source) -> dict[str, Any]:
        """Also a hash of the pictures that a table names."""
        known = super().identity_of(source)
        if "files" not in known:
            return known
        splits = [read() for read in self.load(source).values()]
        paths = [path for rows in splits for path in _paths(rows, *self.find_inputs(rows.columns))]
        files = [Path(path) for path in paths if path and os.path.isfile(path)]
        return known | {"pictures": hash_of_some(files, [file.name for file in files])}

    @override
    def load(self, source: Source) -> Splits:
        names = {self.train_split, self.val_split, self.test_split, *VALIDATION_SPLITS, "test"}
        folders = _folders_by_split(source.source, self.train_split, names)
        if not folders:
            return {name: functools.partial(self._stored, source, read) for name, read in super().load(source).items()}
        classes = sorted_labels({label for _, label in _pictures(folders.values()) if label is not None})
        return {split: _listing(folder, classes, f"{source.source}, {split}") for split, folder in folders.items()}

    def _stored(self, source: Source, read: Callable[[], Rows]) -> Rows:
        """Rows with pictures as they are stored, which are not decoded; also of a column of paths."""
        import datasets

        rows, stored = read(), datasets.Image(decode=False)
        data, (image,) = rows.data, self.find_inputs(rows.columns)
        place = Path(os.path.expanduser(source.source))
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, stored)
            elif name == image and getattr(feature, "dtype", None) in ("string", "large_string"):
                folder = place if place.is_dir() else place.parent
                paths = [None if path is None else str((folder / path).absolute()) for path in data[image][:]]
                data = data.remove_columns(image).add_column(image, paths, feature=datasets.Value("string"))
                data = data.cast_column(image, stored)
        return Rows(data, rows.place, rows.contents)

    @override
    def fields_of(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The data's own fields of the rows that predict reads; of a picture, its path."""
        rows = super().fields_of(indices)
        return [{name: value["path"] if _is_picture(value) else value for name, value in row.items()} for row in rows]

    # ------------------------------------------------------------------ rows

    @override
    def preprocessor_of(self, rows: Rows, part: str) -> "Pictures":
        (image,), label = self._find_columns(rows)
        return Pictures(self.image_processor, image, self.class_reader(rows, label))

    def augment(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        """A training row with its picture cropped and flipped at random, by the seed."""
        area, ratio, left, top, flip = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
        picture = row["image"]
        if self.random_crop < 1:
            area = (self.random_crop + (1 - self.random_crop) * area) * picture.width * picture.height
            low, high = map(math.log, RATIOS)
            ratio = math.exp(low + (high - low) * ratio)
            sizes = math.sqrt(area * ratio), math.sqrt(area / ratio)
            width, height = (max(1, min(whole, round(size))) for whole, size in zip(picture.size, sizes, strict=True))
            x, y = round(left * (picture.width - width)), round(top * (picture.height - height))
            picture = picture.crop((x, y, x + width, y + height))
        if self.random_flip and flip < 0.5:
            from PIL import ImageOps

            picture = ImageOps.mirror(picture)
        return {**row, "image": picture}


# ---------------------------------------------------------------------- pictures in folders and rows


def _folders_by_split(source: str, train_split: str, names: set[str | None]) -> dict[str, Path]:
    """The folder of each split of a folder with pictures; empty for another source.

    ``datasets`` has ``load_dataset("imagefolder")``: it also finds splits in the names of files, such as ``cat_test.jpg``, and
    a class is then the last folder on the path, not the first one.

    Args:
        source: as the user has named it.
        train_split: the split of a folder that has no folders of splits.
        names: the splits' names.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir() or any(path.suffix.lower() in ROWS for path in folder.iterdir()):
        return {}
    if next(_pictures([folder]), None) is None:
        return {}
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    by_name = {SPLIT_NAMES.get(path.name.lower(), path.name.lower()): path for path in folders}
    by_name |= {path.name: path for path in folders if path.name in names}
    splits = {name: path for name, path in by_name.items() if name in names}
    has_classes = train_split in splits and any(path.is_dir() for path in splits[train_split].iterdir())
    return splits if has_classes or (splits and len(splits) == len(folders)) else {train_split: folder}


def _pictures(folders: Iterable[Path]) -> Iterator[tuple[Path, str | None]]:
    """The pictures in folders, in order, each with its class: the first folder on its path; None: it has none."""
    for folder in folders:
        for path in paths_inside(folder):
            parts = path.relative_to(folder).parts
            if path.suffix.lower() in ENDINGS and not any(part.startswith(".") for part in parts):
                yield path, _as_text(parts[0]) if len(parts) > 1 else None


def _as_text(path: Path | str) -> str:
    """A path as UTF-8, which Arrow needs; one that is not becomes another path, at which there is no file."""
    return os.fsencode(path).decode(errors="replace")


def _listing(folder: Path, classes: list[str], place: str) -> Callable[[], Rows]:
    """What reads the rows of a folder of pictures: their paths and, if there are any, their classes."""

    @functools.cache
    def read() -> Rows:
        import datasets

        columns: dict[str, Any] = {"image": datasets.Image(decode=False)}
        columns |= {LABELS[0]: datasets.ClassLabel(names=classes)} if classes else {}
        listed = [(_as_text(path.absolute()), label) for path, label in _pictures([folder])]
        # In a file, and not in memory, so that what is made of it is cached.
        data = datasets.Dataset.from_generator(_rows, datasets.Features(columns), gen_kwargs={"listed": listed})
        return Rows(data, place, lambda: [folder_hash(folder)])

    return read


def _rows(listed: list[tuple[str, str | None]]) -> Iterator[dict[str, Any]]:
    for path, label in listed:
        yield {"image": path, LABELS[0]: label}


def _is_picture(value: Any) -> bool:
    """Whether a row's value is a picture as ``datasets`` stores it."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _paths(rows: Rows, column: str) -> list[str | None]:
    """The path of each row's picture."""
    paths: list[str | None] = rows.data.select_columns([column]).flatten()[f"{column}.path"][:]
    return paths


def _facts(path: str | None) -> tuple[Any, ...]:
    """A path with the size and time of its file, if there is one here."""
    if not os.path.isfile(path or ""):
        return (path,)
    stat = os.stat(path or "")
    return path, stat.st_size, stat.st_mtime_ns


def _decoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows with their pictures decoded."""
    return rows | {"image": [_opened(value) for value in rows["image"]]} if "image" in rows else rows


def _opened(value: dict[str, Any], *, is_whole: bool = True) -> Any:
    """A stored picture as 8-bit RGB, the right way up.

    What is transparent becomes white. The values of a picture of more than 8 bits are scaled: its smallest becomes black and
    its largest white.

    Args:
        value: the picture as ``datasets`` stores it.
        is_whole: whether to decode it at its size; ``False``: JPEG at an eighth of it, to see whether it can be read.

    Raises:
        UnusableRow: if it cannot be decoded.
    """
    from PIL import Image, ImageOps

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # HEIF needs a plugin
    if value["bytes"] is None and not os.path.isfile(value["path"]):
        raise UnusableRow("there is no such file")
    try:
        with Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]), formats=formats) as stored:
            if not is_whole:
                stored.draft("RGB", (1, 1))
            picture: Any = ImageOps.exif_transpose(stored)
        if picture.mode.startswith(("I", "F")):
            values = np.asarray(picture, dtype=np.float64)
            low, high = values.min(), values.max()
            if not np.isfinite(high - low):
                raise UnusableRow("the picture has values that are not finite")
            picture = Image.fromarray(((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))
        if "transparency" in picture.info or not {"A", "a"}.isdisjoint(picture.getbands()):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except UnusableRow:
        raise
    except Exception as error:  # of damaged files, decoders raise many kinds
        raise UnusableRow(f"the picture cannot be read ({type(error).__name__})") from error
