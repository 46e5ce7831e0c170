"""The exceptions for user errors, other failures and signals, and one-line versions of other libraries' messages."""

import difflib
import itertools
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

LIBRARIES = [Path(path).resolve() for path in (Path(__file__).parent, sysconfig.get_path("stdlib"))]
EXTRAS = {"peft": "peft", "bitsandbytes": "nf4", "matplotlib": "plot", "PIL": "images"}  # in pyproject.toml, by package
# What is looked for in jsonargparse's messages, which other versions of it may word otherwise: a test provokes each of them.
JSONARGPARSE = {
    "missing file": re.compile(r"File does not exist: '(.+)'"),
    "unknown option": re.compile(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.]+)"),
    "key": re.compile(r'Parser key "([^"]+)":'),
    "class": re.compile(r"Parser key \"(model|data)\":.*?class_path '([\w.]+)'", re.DOTALL),
    "expected value": re.compile(r"Expected an? ([^;]+)(?:\. Got|; Given) value: ([^;]*)"),
    "names": re.compile(r"Literal\[([^]]+)\]"),
    "type": re.compile(r"<class '([^']+)'>|typing\.|\. Got value: Namespace\(.*"),
    # Lines that say nothing about the mistake.
    "tried": re.compile(
        r"\s*(- )?(Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but"
        r"|Given value type:|Given value: (NestedArg\(|Namespace\(|\{))"
    ),
}


class UserError(ValueError):
    """A mistake in what the user wrote: one line that names the option, what is wrong and what to do.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """


class UnusableRow(UserError):
    """The reason why one row of a data set cannot be used, such as an empty response. Other rows can: this one is skipped."""


class OutsideError(Exception):
    """A failure outside this program, which is not a mistake of the user's; one line is enough to report it.

    The command line prints it as ``error: ...``, without a traceback, and exits with status 1.
    """


class HubError(OutsideError):
    """The Hugging Face hub is needed and cannot be reached."""


class ExportError(OutsideError):
    """An export does not give the expected logits; it is not retained."""


class DiskError(OutsideError):
    """A file cannot be written, for example because the disk is full."""


class NonFiniteError(RuntimeError):
    """The training loss or a weight became NaN or infinite; nothing of it was written."""


class Interruption(SystemExit):
    """A signal asked the run to stop: exit status 130 or 143. After a KeyboardInterrupt Lightning ignores a second Ctrl-C."""


def check_name(option: str, value: object, names: Iterable[str]) -> None:
    """Refuses a value of an option that is none of the option's names.

    Raises:
        UserError: which lists the names.
    """
    if value not in (known := list(names)):
        raise UserError(f"{option}: must be {' or '.join(known)}, got {value!r}")


def nearest(word: str, names: Iterable[str], full_name: Callable[[str], str] = str) -> str:
    """The names that are most similar to an unknown word, as the end of a message; empty if no name is similar.

    Args:
        word: what the user typed.
        names: the names that exist.
        full_name: how the message shows a name, such as ``model.rank`` for ``rank``.

    Example:
        >>> nearest("SST", ["SST2", "BoolQ"])
        '; the nearest that exist: SST2'
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    return f"; the nearest that exist: {', '.join(full_name(by_lower[name]) for name in near)}" if near else ""


def nearest_path(path: str | Path) -> str:
    """What is most similar to a mistyped file, or to its first folder that does not exist, as the end of a message."""
    path = Path(os.path.expanduser(path))
    while not path.parent.is_dir():
        path = path.parent
    names = [] if path.exists() else os.listdir(path.parent)
    return nearest(path.name, names, lambda name: str(path.parent / name))


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
    """A library's message in one line; of jsonargparse's, which lists all that it tried, the innermost paragraph.

    Example:
        >>> one_line('''Parser key "model":
        ...   Problem with given class_path 'COLACausalLM':
        ...     Parser key "rank":
        ...       Expected a <class 'int'>. Got value: two
        ...   Expected a <class 'NoneType'>''')
        "model.rank: must be int, got 'two'"
    """
    fields = JSONARGPARSE["key"].findall(message)
    lines = [line for line in JSONARGPARSE["key"].split(message)[-1].splitlines() if line.strip()]
    if not (fields and lines):
        return " ".join(message.split())
    indent = len(lines[0]) - len(lines[0].lstrip())
    paragraph = [*itertools.takewhile(lambda line: not line[:indent].strip(), lines)]
    paragraph.sort(key=lambda line: "Got value" not in line)  # else by the order in which a union's types were tried
    lines = [line.strip().removeprefix("- ") for line in paragraph if not JSONARGPARSE["tried"].match(line)]
    message = "; ".join(lines).replace(":; ", ": ")
    message = JSONARGPARSE["type"].sub(r"\1", message)
    message = JSONARGPARSE["names"].sub(r"one of \1", message)
    message = JSONARGPARSE["expected value"].sub(r"must be \1, got '\2'", message)
    return f"{'.'.join(fields)}: {message}"


def refusal(error: BaseException) -> tuple[str, int] | None:
    """The message of an error in one line and the exit status; None for what is reported by its traceback.

    That is what fails in the user's own code, and what neither this package, jsonargparse nor Lightning refuses.
    """
    for cause in causes(error):  # jsonargparse wraps a constructor's exceptions
        if isinstance(cause, UserError | OutsideError):
            return str(cause), 1 if isinstance(cause, OutsideError) else 2
        if isinstance(cause, ModuleNotFoundError) and cause.name in EXTRAS:
            return f"the package {cause.name} is not installed. It comes with pip install '.[{EXTRAS[cause.name]}]'", 2
        if passes_through_own_code(cause):
            return None
    from jsonargparse import ArgumentError

    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) and error.filename is not None:
        return f"cola: cannot use {str(error.filename)!r}: {error.strerror}", 2
    if isinstance(error, ArgumentError):
        return one_line(str(error)) + "".join(getattr(error, "__notes__", [])), 2
    return next(((one_line(str(cause)), 2) for cause in causes(error) if _is_refused_by_lightning(cause)), None)


def _is_refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raises an error, for arguments (a val_check_interval above the number of batches, say).

    What merely fails in its code, such as the call of a hook with other arguments, is a bug.
    """
    frames, lightning = traceback.extract_tb(error.__traceback__), sys.modules.get("lightning")
    # An exception that another process has passed on has no frames.
    if lightning is None or not frames or not Path(frames[-1].filename).is_relative_to(Path(str(lightning.__file__)).parent):
        return False
    if not (frames[-1].line or "").startswith("raise "):
        return False
    kinds = TypeError | ValueError | RuntimeError | ImportError
    return isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"
