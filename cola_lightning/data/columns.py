"""What a row of text is, found by the names of its columns: a conversation, a prompt with its response, or a text."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cola_lightning.errors import UserError

Kind = Literal["messages", "prompt", "text"]
Columns = dict[str, str]  # the name of the column in each slot

SLOTS = ("messages", "tools", "prompt", "input", "response", "system", "text")
PAIR_SLOTS = ("prompt", "input", "chosen", "rejected", "system", "tools")
CONVERSATIONS = ("messages", "conversations", "conversation")
# Columns with what is asked, the first one that a data set has, and columns that may answer them.
ANSWERS = {
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "solution", "output"),
    "query": ("response", "answer", "answers", "output"),
    "problem": ("solution", "answer", "response"),
    "input": ("output", "response"),
    "inputs": ("targets",),
    "dialogue": ("summary",),
    "article": ("highlights", "summary"),
    "document": ("summary",),
}
INPUTS = ("input", "context")  # of an instruction
SYSTEMS = ("system", "system_prompt")
# Columns of preference pairs: with the rejected answer, and with the preferred one.
PREFERRED = {"rejected": "chosen", "dispreferred": "preferred", "worse": "better"}
PREFERRED |= {"rejected_response": "chosen_response", "response_rejected": "response_chosen", "bad": "good"}
NAME_THEM = "Name them: --data.columns '{prompt: COLUMN, response: COLUMN}', or messages, or, of pairs, chosen and rejected"
UNPAIRED = ("label", "kto_tag")  # columns that say, as true or false, whether a response is good


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        kind: a conversation, a prompt with its response, or a text.
        columns: the column in each slot.
    """

    kind: Kind
    columns: Columns

    def __str__(self) -> str:
        """Which columns are used, for the log."""
        answers, others = ("response", "completion", "chosen", "rejected"), ("system", "tools")
        inputs = [name for slot, name in self.columns.items() if slot not in (*answers, *others)]
        answer = " over ".join(self.columns[slot] for slot in answers if slot in self.columns)
        text = " -> ".join(filter(None, [", ".join(inputs), answer]))
        return text + "".join(f", {slot}: {self.columns[slot]}" for slot in others if slot in self.columns)


def find_columns(
    names: Sequence[str], lists: Collection[str], chosen: Mapping[str, str] | None, *, has_response: bool = True
) -> Reading:
    """Finds how a data set's rows are read, by the names of its columns.

    Args:
        names: the data set's columns.
        lists: those that hold lists.
        chosen: ``data.columns``: the column in each slot; None: found by their names.
        has_response: whether a prompt needs a column with its response.

    Raises:
        UserError: if nothing fits, or two columns could hold the response, which would train different things.

    Example:
        >>> find_columns(["instruction", "input", "output", "text"], [], None).columns
        {'prompt': 'instruction', 'input': 'input', 'response': 'output'}
    """
    if chosen is not None:
        return _chosen_columns(names, lists, chosen, has_response=has_response)
    if not has_response:  # the same columns as in training, if there are those
        with contextlib.suppress(UserError):
            return find_columns(names, lists, None)
    extra = _extra(names)
    if has_response and "conversations" in lists and _preferred_and_rejected(names):  # LLaMA-Factory: they end with the user
        raise _nothing_fits(names)
    conversations = [{"messages": name} for name in CONVERSATIONS if name in lists]
    if {"prompt", "completion"} <= {*lists}:
        conversations.append({"prompt": "prompt", "completion": "completion"})
    if len(conversations) > 1:
        raise _ambiguous(" with ".join(columns.values()) for columns in conversations)
    if conversations:
        return Reading("messages", conversations[0] | extra)
    texts = [name for name in names if name not in lists]
    answers = {prompt: [name for name in usual if name in texts] for prompt, usual in ANSWERS.items() if prompt in texts}
    answered = [prompt for prompt, responses in answers.items() if responses]
    # Each with the prompt whose answer it is called most often, the first of several: later entries replace earlier ones.
    pairs = [(ANSWERS[prompt].index(name), prompt, name) for prompt in reversed(answered) for name in answers[prompt]]
    responses = {name: prompt for _, prompt, name in sorted(pairs, key=lambda pair: -pair[0])}
    if len(responses) > 1:
        raise _ambiguous(responses)
    prompts = [*responses.values(), *answers][:1]
    inputs = [name for name in INPUTS if name in texts and "instruction" in prompts]
    used = dict(zip(("prompt", "input"), [*prompts, *inputs], strict=False))
    if answered or (answers and not has_response):
        if responses:
            (used["response"],) = responses
        return Reading("prompt", used | extra)
    if "text" in texts and "role" not in names:  # each row of a tree of messages is a turn
        return Reading("text", {"text": "text"})
    raise _nothing_fits(names)


def _extra(names: Sequence[str]) -> Columns:
    """The columns with the system prompt and the tools, if there are any."""
    optional = {"tools": ("tools",), "system": SYSTEMS}
    return {slot: name for slot, usual in optional.items() if (name := next((n for n in usual if n in names), None))}


def _preferred_and_rejected(names: Sequence[str]) -> tuple[str, str] | None:
    """The columns with the preferred and with the rejected response, if there are both."""
    by_lower = {name.lower(): name for name in names}
    pairs = [(by_lower[good], by_lower[bad]) for bad, good in PREFERRED.items() if {good, bad} <= by_lower.keys()]
    return next(iter(pairs), None)


def _nothing_fits(names: Sequence[str], what: str = "conversation, no prompt with a response and no text") -> UserError:
    return UserError(
        f"data.columns: found no {what} among the columns {', '.join(names)}. {NAME_THEM}. Pairs need COLAPreferenceLM with "
        "PreferenceDataModule, and texts with labels --model COLASequenceClassifier or --data TemplateDataModule"
    )


def _ambiguous(names: Iterable[str]) -> UserError:
    return UserError(f"data.columns: two columns fit, {' and '.join(names)}, and each would train something else. {NAME_THEM}")


def _check_named(names: Sequence[str], chosen: Mapping[str, str], slots: Sequence[str]) -> None:
    if unknown := [slot for slot in chosen if slot not in slots]:
        raise UserError(f"data.columns: {unknown[0]!r} is not one of {', '.join(slots)}")
    if missing := [name for name in chosen.values() if name not in names]:
        raise UserError(f"data.columns: the data has no column {missing[0]!r}; its columns are {', '.join(names)}")


def _chosen_columns(names: Sequence[str], lists: Collection[str], chosen: Mapping[str, str], *, has_response: bool) -> Reading:
    _check_named(names, chosen, SLOTS)
    kinds = [kind for kind in get_args(Kind) if kind in chosen]
    if len(kinds) != 1 or (kinds == ["prompt"] and has_response and "response" not in chosen):
        raise UserError(f"data.columns: name messages, prompt and response, or text; got {', '.join(chosen) or 'none'}")
    if "response" in chosen and chosen.get("prompt") in lists:  # turns, and the turns that follow them
        return Reading("messages", {"completion" if slot == "response" else slot: name for slot, name in chosen.items()})
    return Reading(kinds[0], dict(chosen))


# ---------------------------------------------------------------------- preferences


def find_pairs(names: Sequence[str], lists: Collection[str], chosen: Mapping[str, str] | None) -> Reading:
    """Finds how the rows of a data set are read as preference pairs: the slots are ``chosen``, ``rejected`` and ``prompt``.

    Without a column for the prompt, both responses include it: as turns or, in rows of kind ``prompt``, as one text with
    the marks ``Human:`` and ``Assistant:``.

    Args:
        names: the data set's columns.
        lists: those that hold lists.
        chosen: ``data.columns``: the column in each slot; None: found by their names.

    Raises:
        UserError: if there are no pairs.

    Example:
        >>> str(find_pairs(["system", "question", "chosen", "rejected"], [], None))
        'question -> chosen over rejected, system: system'
    """
    if chosen is not None:
        _check_named(names, chosen, PAIR_SLOTS)
        if not {"chosen", "rejected"} <= chosen.keys():
            raise UserError(f"data.columns: name chosen and rejected, and prompt; got {', '.join(chosen) or 'none'}")
        columns = dict(chosen)
    elif pair := _preferred_and_rejected(names):
        prompts = [name for name in dict.fromkeys(("conversations", "prompt", *ANSWERS)) if name in names]
        inputs = [name for name in INPUTS if name in names and prompts[:1] == ["instruction"]]
        columns = dict(zip(("prompt", "input"), [*prompts[:1], *inputs], strict=False))
        columns |= {"chosen": pair[0], "rejected": pair[1]}
        if prompts or pair[0] in lists:
            columns |= _extra(names)
    else:
        raise _nothing_fits(names, "preference pairs")
    has_turns = columns["chosen"] in lists or columns.get("prompt") in lists
    return Reading("messages" if has_turns else "prompt", columns)


def check_unpaired(reading: Reading, is_boolean: Callable[[str], bool]) -> None:
    """Refuses rows with a column that says whether a response is good: otherwise, bad responses are trained on like good ones.

    Args:
        reading: the columns, as found by their names.
        is_boolean: whether a column of the data set holds true or false.
    """
    label = next(filter(is_boolean, UNPAIRED), None)
    if label is not None and reading.kind != "text":
        raise UserError(
            f"data.columns: {label} says for each response whether it is good. Such unpaired preferences (KTO) are neither "
            f"pairs nor responses to imitate, and cannot be trained. To train on all of them, name the columns ({reading})"
        )
