"""Turns of a conversation, in a tokenizer's chat template; the tokens with which a turn or a text ends."""

from typing import Any

from cola_lightning.errors import UserError

Messages = list[dict[str, str]]  # turns of a role and its content


def user_turn(prompt: str) -> Messages:
    """A conversation of one user turn."""
    return [{"role": "user", "content": prompt}]


def assistant_turn(response: str) -> dict[str, str]:
    """The assistant's turn."""
    return {"role": "assistant", "content": response}


def as_turn(tokenizer: Any, prompt: str, place: str) -> str:
    """A user's turn, and the beginning of the assistant's."""
    return as_prompt(tokenizer, user_turn(prompt), place)


def as_prompt(tokenizer: Any, messages: Messages, place: str) -> str:
    """A conversation, and the beginning of the assistant's next turn."""
    return render(tokenizer, messages, place, is_open=True)


def end_of_turn(tokenizer: Any) -> list[int]:
    """The token with which the assistant's turn ends, if special or added; it need not be the tokenizer's end of text."""
    question, answer, place = user_turn("Is it old?"), "It is.", "model.model_name"
    try:
        prompt = as_prompt(tokenizer, question, place)
    except UserError:  # some templates need a system turn
        question = [{"role": "system", "content": "Be brief."}, *question]
        prompt = as_prompt(tokenizer, question, place)
    text = render(tokenizer, [*question, assistant_turn(answer)], place, is_open=False)
    _, _, end = text.removeprefix(prompt).partition(answer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in tokenizer(end, add_special_tokens=False)["input_ids"] if token in special][:1]


def n_appended(tokenizer: Any) -> int:
    """How many tokens a tokenizer appends to each text: ``</s>``, or BERT's ``[SEP]``."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((k for k, is_special in enumerate(reversed(mask)) if not is_special), 0)


def end_of_text(tokenizer: Any) -> int | None:
    """The token that ends a text: the tokenizer's end of text or, where it has none, what it appends; None for neither."""
    if tokenizer.eos_token_id is not None or not n_appended(tokenizer):
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    return int(tokenizer("a")["input_ids"][-1])


def render(tokenizer: Any, messages: Messages, place: str, *, is_open: bool) -> str:
    """A conversation as text; ``is_open``: with the beginning of the assistant's next turn."""
    if not tokenizer.chat_template:
        raise UserError("data: expected a tokenizer with a chat template (model.model_name), received one without")
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:  # the latter three: of its expressions
        raise UserError(f"{place}: expected turns that the chat template can render, received: {error}") from error
    return text
