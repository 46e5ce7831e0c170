"""The error type for mistakes of the user's, those for other failures, and one-line versions of other libraries' messages."""

import ast
import contextlib
import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LIBRARIES = [Path(path).resolve() for path in (Path(__file__).parent, sysconfig.get_path("stdlib"))]


class UserError(ValueError):
    """A mistake in what the user wrote: one line that names the field, what was expected and what was received.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """


class UnusableRow(UserError):
    """A row of a data set that cannot be used, while others can: a text that is missing, an option that comes twice."""


class OutsideError(Exception):
    """A failure outside this program, which is not a mistake of the user's; one line is enough to report it.

    The command line prints it as ``error: ...``, without a traceback, and exits with status 1.
    """


class HubError(OutsideError):
    """The Hugging Face hub is needed and does not answer."""


class ExportError(OutsideError):
    """An export does not give the expected logits; it is not retained."""


class DiskError(OutsideError):
    """A file cannot be written: the disk is full, say."""


class StorageError(OutsideError):
    """A study's database no longer answers."""


class NonFiniteError(RuntimeError):
    """The training loss or a weight became NaN or infinite; nothing of it was written."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The names most similar to a word that is none of them, as the end of a message; the first three if none is near.

    Example:
        >>> nearest("SST", ["SST2", "BoolQ"])
        '; the nearest that exist: SST2'
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6) or list(by_lower)[:3]
    return f"; the nearest that exist: {', '.join(by_lower[name] for name in near)}" if near else ""


def shortened_text(text: str, length: int = 40) -> str:
    """The beginning of a long text, for messages.

    Example:
        >>> shortened_text("a long text", 8)
        'a lon...'
    """
    return text if len(text) <= length else f"{text[: length - 3]}..."


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from or while handling, and so on: what Python prints of it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def passes_through_own_code(error: BaseException) -> bool:
    """Whether an exception was raised in or through a file that is neither this package's nor a library's: a user's."""
    files = {Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(file.is_file() and not _is_of_a_library(file) for file in files)  # <frozen importlib...> and x.pyx are none


def _is_of_a_library(path: Path) -> bool:
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return is_installed or any(path.resolve().is_relative_to(folder) for folder in LIBRARIES)


def one_line(message: str) -> str:
    """A parser's message in one line: the field, what was expected, what was received.

    jsonargparse lists every alternative that it tried, on a line each; the innermost one that failed says what is wrong.
    """
    fields = re.findall(r'Parser key "([^"]+)"', message)
    field, outermost = ".".join(fields), message.rpartition("Given value: ")[2].strip()
    with contextlib.suppress(ValueError, SyntaxError, TypeError):  # no plain value
        if fields and (beside := _beside_class_path(ast.literal_eval(outermost), fields[0])):
            return beside
    innermost = message[message.rfind("Parser key") :]
    if unknown := re.search(r"Option '([^']+)' is not accepted", innermost):
        return f"{field}: expected one of its options, received {unknown[1]!r}, which is none"
    if missing := re.search(r"the following arguments are required: .*", innermost):
        return f"{field}: {missing[0]}" if field else missing[0]
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value.*)?$", innermost, re.MULTILINE)
    received = value[1] if value else ""
    if parent := re.search(r"does not correspond to a subclass of (\w+)", innermost):
        return f"{field}: expected the import path of a subclass of {parent[1]}, received {received!r}"
    if reason := re.search(r"class_path '([^']+)':\s+((?:No module named|module) .*)", innermost):
        return f"{field}: expected the import path of a class, received {reason[1]!r} ({reason[2]})"
    expected = re.findall(r"Expected an? (?:<class '([^']+)'>|typing\.(Literal\[.+?\])(?:\.|\s))", innermost)
    names = [name for pair in expected for name in pair if name not in ("", "NoneType", "torch.Tensor")]
    path = re.search(r"Expected a (?:dot import path string: |path but )(\S+)", innermost)
    if path and not set(names) & {"int", "float", "str"}:
        received, names = path[1], ["the import path of a class"]
        if "\n" in outermost:  # jsonargparse takes the name of a file for its text
            return f"{field}: expected {names[0]}, received a file that begins with {received!r}"
    if not (field and received and names):
        return re.sub(r"\s+", " ", message).strip()
    is_unquoted = names[0] == "str" and re.fullmatch(r"True|False|-?[\d.]+", received)  # in YAML
    hint = "; in quotes, yes, no and numbers are text" if is_unquoted else ""
    return f"{field}: expected {' or '.join(dict.fromkeys(names))}, received {received!r}{hint}"


def _beside_class_path(value: Any, field: str) -> str | None:
    """The message about an option of a class that stands beside its ``class_path``, at any depth; None if there is none."""
    if not isinstance(value, dict):
        return None
    for name, part in value.items():
        if "class_path" in value and name not in ("class_path", "init_args", "dict_kwargs"):
            return f"{field}: expected {name!r} inside init_args, received it beside class_path"
        if message := _beside_class_path(part, field if name == "init_args" else f"{field}.{name}"):
            return message
    return None
