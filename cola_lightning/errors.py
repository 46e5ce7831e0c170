"""The one error type for mistakes of the user's, and how other libraries' messages become one line."""

import re


class UserError(ValueError):
    """A mistake in what the user wrote: one line that names the field, what was expected and what was received.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or was caused by: jsonargparse wraps what a constructor raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause


def one_line(message: str) -> str:
    """A parser's message in one line: the field, what was expected, what was received.

    jsonargparse tells every alternative that it tried, on a line each; the innermost one that failed says what is wrong.
    """
    field = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    innermost = message[message.rfind("Parser key") :]
    if unknown := re.search(r"Option '([^']+)' is not accepted", innermost):
        return f"{field}: expected one of its options, received {unknown[1]!r}, which is none"
    if missing := re.search(r"the following arguments are required: .*", innermost):
        return f"{field}: {missing[0]}" if field else missing[0]
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value.*)?$", innermost, re.MULTILINE)
    expected = re.findall(r"Expected an? (?:<class '([^']+)'>|typing\.(.+?)\. Got)", innermost)
    names = [name for pair in expected for name in pair if name not in ("", "NoneType", "torch.Tensor")]
    if not names and (path := re.search(r"Expected a dot import path string: (.*)", innermost)):
        value, names = path, ["the import path of a class"]
    if not (field and value and names):
        return re.sub(r"\s+", " ", message).strip()
    return f"{field}: expected {' or '.join(dict.fromkeys(names))}, received {value[1]!r}"
