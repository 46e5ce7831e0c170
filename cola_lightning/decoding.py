"""Options of text generation, shared by data modules, modules and commands."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cola_lightning.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Options of text generation, with the names and meanings of transformers' ``generate``.

    Attributes:
        max_new_tokens: the largest number of tokens to generate.
        do_sample: whether tokens are sampled; else each is the most probable one.
        temperature: where sampled: the logits are divided by it.
        top_p: where sampled: the most probable tokens whose probabilities add up to this are drawn from; 1: all.
        stop: texts at which generation ends; they are not part of the result.

    Example:
        >>> Decoding(stop=("###",)).cut("Oslo.### And", is_open=False), Decoding(stop=("###",)).cut("Oslo.#", is_open=True)
        (('Oslo.', True), ('Oslo.', False))
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def check(self, group: str = "") -> None:
        """Refuses values that generate nothing, or that would count for nothing.

        Args:
            group: prefix of the fields' names in messages: ``data.``.
        """
        temperature = f"must be above 0, got {self.temperature}. For the most probable token, leave out {group}do_sample"
        needs = f"needs {group}do_sample true. Otherwise the most probable token is chosen"
        for name, is_valid, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, f"must be at least 1, got {self.max_new_tokens}"),
            ("temperature", self.temperature > 0 or not self.do_sample, temperature),
            ("top_p", 0 < self.top_p <= 1, f"must be above 0 and at most 1, got {self.top_p}"),
            ("temperature", self.do_sample or self.temperature == Decoding.temperature, needs),
            ("top_p", self.do_sample or self.top_p == Decoding.top_p, needs),
            ("stop", "" not in self.stop, "must not contain an empty text"),
        ):
            if not is_valid:
                raise UserError(f"{group}{name}: {what}")

    def stopping(self, texts: Iterable[str]) -> "Decoding":
        """The same, with more texts at which generation ends."""
        return replace(self, stop=tuple(dict.fromkeys([*self.stop, *texts])))

    def cut(self, text: str, *, is_open: bool) -> tuple[str, bool]:
        """The part of a text that is certain to precede the first stop, and whether that stop was found.

        Args:
            text: the text generated so far.
            is_open: whether more may follow: a possible beginning of a stop is then omitted.
        """
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)], True
        beginnings = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        n_unsure = max(beginnings, default=0) if is_open else 0
        return text[: len(text) - n_unsure], False
