"""Preference pairs: two responses to one prompt, of which one is preferred."""

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from cola_lightning.chat_template import PreferencePair
from cola_lightning.data.columns import Reading, find_columns, find_pairs
from cola_lightning.data.forms import preference
from cola_lightning.data.preprocessing import Preprocessor, Size
from cola_lightning.data.render import LanguageRow, TurnEncoder, n_common
from cola_lightning.data.rows import Row, Rows, each
from cola_lightning.data.source import Source
from cola_lightning.data.text import TOKENS, LanguageRows, TextDataModule
from cola_lightning.errors import UnusableRow, UserError

SIDE: dict[str, Any] = {**TOKENS, "lost": "int32"}


class PreferencePairs(LanguageRows):
    """Two responses to one prompt, with the loss on both."""

    features = {"chosen": SIDE, "rejected": SIDE}  # noqa: RUF012

    @override
    def read(self, row: Row) -> PreferencePair:
        return preference(row, self.kind, self.columns)

    @override
    def encode(self, items: Sequence[PreferencePair], notes: set[str]) -> list[list[dict[str, LanguageRow]] | UnusableRow]:
        encoder = TurnEncoder(self.template, self.max_length, notes, self.too_long, shortens_response=True)
        return each(paired, encoder.preferences(items))

    @override
    def size(self, example: Any) -> Size:
        return Size(*map(sum, zip(*map(super().size, example.values()), strict=True)))

    @override
    def collate(self, examples: list[dict[str, LanguageRow]]) -> dict[str, Any]:
        sides = [example[side] for side in ("chosen", "rejected") for example in examples]
        return {**super().collate(sides), "n_pairs": len(examples)}


class PreferenceDataModule(TextDataModule):
    """Preference pairs for ``COLAPreferenceLM``, as data sets of the hub and other tools' files have them.

    How a row is read follows from its columns: ``chosen`` and ``rejected`` as texts or as turns, with their prompt in
    ``prompt``, ``instruction`` (with ``input``), ``question`` or ``conversations``; conversations in ``chosen`` and
    ``rejected``, as turns or as text with the marks ``Human:`` and ``Assistant:``, whose common beginning is the prompt. A
    ``system`` column is the system prompt.

    Responses are encoded as those of ``TextDataModule``, and both keep the same prompt: if the longer one is over
    ``max_length``, the prompt is shortened, and then the responses lose their ends. Pairs with an empty response, with equal
    responses or with different prompts are skipped and counted. Pairs are not packed.

    A batch of N pairs has 2 N rows: the chosen responses, and then the rejected ones in the same order. ``batch_size`` counts
    pairs. Predict generates the response to the prompt; its target is the chosen one.

    Args:
        source: A file, a folder of ``train.jsonl`` and so on, or the id of a data set on the hub: see ``SourceDataModule``.
        subset: Name of a configuration of a data set on the hub.
        columns: Which columns to use, as ``{chosen: good, rejected: bad}``. The keys are ``chosen`` and ``rejected``, and
            ``prompt`` (with ``input``, ``system`` and ``tools``). ``null`` finds them by their names.
        **rows: the other arguments of ``TextDataModule``, except ``text_unit``, ``packing`` and ``loss``.

    Raises:
        UserError: for invalid files, rows and sizes, and for a model that does not train pairs.
    """

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        columns: dict[str, str] | None = None,
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, columns=columns, text_unit="paragraph", packing=False, loss="last", **rows)

    @override
    def setup(self, stage: str) -> None:
        module = self.trainer and self.trainer.lightning_module
        if module is not None and stage != "predict" and not getattr(module, "trains_pairs", False):
            raise UserError(
                f"{type(module).__name__} would train on the rejected responses of pairs, too. Use COLAPreferenceLM with "
                "PreferenceDataModule, or TextDataModule for the chosen responses alone"
            )
        super().setup(stage)

    @override
    def read_columns(self, rows: Rows, chosen: Mapping[str, str] | None, *, has_response: bool) -> Reading:
        try:
            return find_pairs(rows.columns, rows.lists, chosen)
        except UserError:
            if has_response:
                raise
            return find_columns(rows.columns, rows.lists, chosen, has_response=False)  # rows with prompts alone, to predict

    @override
    def trained(self, **known: Any) -> Preprocessor:
        return PreferencePairs(**known)


def paired(pair: tuple[LanguageRow, LanguageRow]) -> list[dict[str, LanguageRow]]:
    """The example of a pair.

    Where the prompts' last tokens differ, because a token spans the boundary or the template opens a thought in only one of
    them, the loss of both begins at the first different token.

    Example:
        >>> paired(({"input_ids": [7, 8, 5], "spans": [1, 3]}, {"input_ids": [7, 9, 4, 5], "spans": [2, 4]}))
        [{'chosen': {'input_ids': [7, 8, 5], 'spans': [1, 3]}, 'rejected': {'input_ids': [7, 9, 4, 5], 'spans': [1, 4]}}]
    """
    chosen, rejected = pair
    if chosen["input_ids"] == rejected["input_ids"]:
        raise UnusableRow("the two responses are equal up to data.max_length")
    n_shared = max(n_common(chosen["input_ids"], rejected["input_ids"]), 1)
    for row in pair:
        row["spans"] = [min(row["spans"][0], n_shared), *row["spans"][1:]]
    return [{"chosen": chosen, "rejected": rejected}]
