"""A custom task without code: a prompt with the data's fields in it, and options, or an answer to be generated."""

from string import Formatter
from typing import Any, Literal, get_args

from typing_extensions import override

from cola_lightning.data.examples import Example, Loss, OptionRows, generated
from cola_lightning.data.labels import option_index, read_answers
from cola_lightning.data.rows import Row, Rows
from cola_lightning.data.source import Source
from cola_lightning.data.tokenized import TokenizedDataModule
from cola_lightning.errors import UnusableRow, UserError

OptionMetric = Literal["accuracy", "f1", "matthews_corrcoef"]
AnswerMetric = Literal["f1", "exact_match"]


class Template(Formatter):
    """Text with fields of a row in braces: ``{premise}``, or ``{answers.text}`` for a field inside another; ``{{`` is a brace.

    Args:
        text: the template, in the syntax of ``str.format``.
        option: the option whose value it is, for messages.

    Example:
        >>> Template("{question}? {{yes}}", "data.prompt").fill(Row({"question": "Is it"}, "line 1"))
        'Is it? {yes}'
    """

    def __init__(self, text: str, option: str) -> None:
        self.text, self.option = text, option

    def fill(self, row: Row) -> str:
        """The text for a row.

        Raises:
            UnusableRow: if a field is missing, its format does not fit it (``{size:d}`` for a text), or a brace is left open.
        """
        try:
            return self.vformat(self.text, (), row)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UnusableRow(f"{self.option}: {error}") from error

    @override
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        holder, field = kwargs.at(field_name)
        value = holder[field]
        return (value if isinstance(value, int | float) else holder.text(field)), field


class TemplateDataModule(TokenizedDataModule):
    """A task of your own: rows of any data set, a prompt that names their fields, and options, or an answer to be generated.

    Args:
        source: A file, a folder of ``train.csv`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: Name of a configuration of a data set on the hub.
        prompt: The prompt, with the data's columns in braces: ``{premise} Is it true that {hypothesis}?``.
        options: List of texts to choose from, which follow the prompt and may also have columns in braces; or the name of the
            column that lists them. ``null`` generates the answer.
        delimiter: Text between the prompt and each option, or the answer. ``null`` inserts a space, before an option only if
            neither the prompt ends nor the option begins with white space. In a chat template an option has no delimiter, and
            an answer has it without white space at its start.
        label: Column with the right option: its index, from 0, or its text. Numeric labels that could mean either an index or
            an option's text are rejected. In a CSV file, where numbers are text, so is a number that is no option if all
            options are numbers.
        answer: If the answer is generated, the column with the answer, or with a list of answers. The first is trained, and the
            best match is scored. ``answers.text`` is a field inside a column.
        loss: ``options`` (the default of ``null``) is the loss over all options. ``answer`` is the language-model loss of the
            right one, which a generated answer always has.
        metric: What validation and test measure. For options: ``accuracy``, ``f1`` (of the second of two options; of more, the
            mean) or ``matthews_corrcoef``. For a generated answer: ``f1`` (over words) or ``exact_match``. ``null`` is the
            accuracy of options, or both metrics of an answer.
        apply_chat_template: Format the prompt by the tokenizer's chat template, as a user turn.
        max_length: Maximum length of prompt and option, in tokens. The model's own limit also applies. A longer prompt loses
            its beginning. If the answer is generated, 50 tokens are reserved for it, in training as well.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Raises:
        UserError: for a prompt with fields that the data does not have, and for invalid files, rows and sizes.
    """

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        prompt: str,
        options: list[str] | str | None = None,
        delimiter: str | None = None,
        label: str = "label",
        answer: str | None = None,
        loss: Loss | None = None,
        metric: OptionMetric | AnswerMetric | None = None,
        apply_chat_template: bool = False,
        max_length: int = 1024,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, max_length=max_length, num_proc=None, **rows)  # examples stay in memory
        if (options is None) is (answer is None):
            raise UserError(f"data.options, data.answer: set one of the two, not {'neither' if options is None else 'both'}")
        known = get_args(AnswerMetric if options is None else OptionMetric)
        if isinstance(options, str):  # they differ by row, and so does what an index means
            known = ("accuracy",)
        if metric not in (None, *known):
            raise UserError(f"data.metric must be {', '.join(known)} or null for this task, got {metric!r}")
        self.metric = metric
        self.delimiter, self.prompt = delimiter, Template(prompt, "data.prompt")
        self.options = [Template(text, "data.options") for text in options] if isinstance(options, list) else options
        self.label, self.answer, self.apply_chat_template = label, answer, apply_chat_template
        self.loss: Loss = "answer" if options is None else loss or "options"

    @override
    def preprocessor_of(self, rows: Rows, part: str) -> OptionRows:
        options: Any = self.options
        if isinstance(options, list):
            options = [self._joined(self.prompt.text, option.text) for option in options]
        return OptionRows(
            self.tokenizer,
            self.max_length,
            self._example,
            self.loss,
            self.metric,
            is_chat=self.apply_chat_template,
            is_trained=part == "train",
            too_long=self.too_long,
            templates=(self.prompt.text, options),
        )

    def _joined(self, prompt: str, option: str) -> str:
        """An option as it follows a prompt."""
        if self.apply_chat_template:
            return option
        if self.delimiter is None and not (prompt[-1:].isspace() or option[:1].isspace()):
            return f" {option}"
        return (self.delimiter or "") + option

    def _example(self, row: Row) -> Example:
        prompt = self.prompt.fill(row)
        if self.answer is not None:
            answers = read_answers(row, self.answer) or ()
            return generated(prompt, answers, " " if self.delimiter is None else self.delimiter)
        if isinstance(self.options, str):
            holder, field = row.at(self.options)
            options = holder.texts(field)
        else:
            options = tuple(option.fill(row) for option in self.options or ())
        joined = tuple(self._joined(prompt, option) for option in options)
        return Example(prompt, joined, option_index(row, self.label, options))
