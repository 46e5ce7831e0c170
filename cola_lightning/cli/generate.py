"""``cola generate``: generates text with a checkpoint of a language model, from a prompt or in a conversation."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.cli.help import OPTIONS, add_scale, command_parser, load_module, parse_options
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError

PROMPT = "Respond to this text. By default, the prompt is read from standard input. With --chat, it is your first message."
CHAT = "Have a conversation: type one message per line. An empty line or Ctrl-D ends it. The model needs a chat template."
DO_SAMPLE = "Choose each token at random, by its probability. Without this option, each token is the most probable one."
TEMPERATURE = "With --do_sample, this sets how random the text is: less random below 1, more random above 1."
TOP_P = "With --do_sample, choose only from the most probable tokens whose probabilities add up to P. 1 uses all tokens."
STOP = "Stop when the model has written one of these texts. The text itself is not printed."
SEED = "With --do_sample, the same seed chooses the same tokens again. Without a seed, they differ from run to run."


def generate(words: Sequence[str]) -> None:
    """Runs ``cola generate``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments, and for a checkpoint of a module that does not generate.
    """
    options = parse_options(_parser(), words)
    decoding = Decoding(options.max_new_tokens, options.do_sample, options.temperature, options.top_p, tuple(options.stop))
    decoding.check()
    prompt = options.prompt if options.chat or options.prompt is not None else _standard_input()
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: is empty. Pass one with --prompt or on standard input")
    opened = OpenedCheckpoint.open(options.checkpoint)
    module, prompt_format = load_module(opened, options, "generate"), opened.state.facts.prompt_format
    import torch

    from cola_lightning.chat_template import ChatTemplate, PlainTemplate
    from cola_lightning.hf.causal_lm import COLACausalLM

    if not isinstance(module, COLACausalLM):
        found = f"{str(options.checkpoint)!r} contains a {type(module).__name__}"
        raise UserError(f"checkpoint: {found}, but only a COLACausalLM generates text")
    module.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()
    is_chat = options.chat or bool(prompt_format.get("chat_template"))
    if is_chat and not module.tokenizer.chat_template:
        raise UserError("chat: the model's tokenizer has no chat template")
    kind = prompt_format.get("kind")
    if kind == "options":
        print("note: this model was trained to choose among options, not to generate text. Use `cola predict`", file=sys.stderr)
    if kind == "answer" and not decoding.stop:
        decoding = replace(decoding, stop=("\n",))  # the training answers end with it
    if options.seed is not None:
        torch.manual_seed(options.seed)
    template = (ChatTemplate if is_chat else PlainTemplate)(module.tokenizer, prompt_format.get("chat_template_kwargs", {}))
    session = Session(module, template, decoding)
    for turn in _turns(prompt) if options.chat else [prompt]:
        session.take_turn(turn)


def _parser() -> ArgumentParser:
    parser = command_parser("generate")
    parser.usage = "cola generate PATH [OPTIONS]"
    parser.add_argument("checkpoint", type=Path, metavar="PATH", help="Load this run: type its folder, or a checkpoint in it.")
    parser.add_argument("--links", type=int | str | None, metavar="N", help=OPTIONS["links"])
    add_scale(parser)
    parser.add_argument("--prompt", type=str, metavar="TEXT", help=PROMPT)
    parser.add_argument("--chat", action="store_true", help=CHAT)
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=OPTIONS["trust"])
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="Stop a response after this many tokens.")
    parser.add_argument("--do_sample", action="store_true", help=DO_SAMPLE)
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help=TEMPERATURE)
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help=TOP_P)
    parser.add_argument("--stop", nargs="+", type=str, default=[], metavar="TEXT", help=STOP)
    parser.add_argument("--seed", type=int | None, metavar="N", help=SEED)
    return parser


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("prompt, up to Ctrl-D:", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _turns(first: str | None) -> Iterator[str]:
    """The user's turns, one per line, up to an empty line or the end of standard input."""
    if first is not None:
        yield first
    with contextlib.suppress(EOFError):
        while (line := input("> " if sys.stdin.isatty() else "")).strip():
            yield line


class Session:
    """Generates with a module, and remembers the turns of the conversation.

    Args:
        module: a :class:`~cola_lightning.COLACausalLM`.
        template: a ``ChatTemplate`` of its tokenizer.
        decoding: how the text is generated.
    """

    def __init__(self, module: Any, template: Any, decoding: Decoding) -> None:
        self.module, self.template, self.decoding = module, template, decoding.stopping(template.stop_texts)
        self.turns: list[dict[str, Any]] = []

    def take_turn(self, prompt: str) -> None:
        """Streams the response to the user's next turn.

        Raises:
            UserError: if the conversation is too long for the model.
        """
        from cola_lightning.chat_template import Conversation, assistant_turn, user_turn
        from cola_lightning.data.batch import PromptRow, collate_prompts
        from cola_lightning.data.render import encode_prompt

        self.turns += user_turn(prompt)
        longest, tokenizer = int(self.module.tokenizer.model_max_length), self.module.tokenizer
        ids = encode_prompt(self.template, Conversation(self.turns), sys.maxsize)
        if len(ids) >= longest:
            raise UserError(f"prompt: must have fewer than {longest} tokens for this model, got {len(ids)}")
        decoding = replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, longest - len(ids)))
        batch = collate_prompts([PromptRow(ids, prompt, None)], tokenizer.pad_token_id, decoding, self.template.stop_tokens)
        batch |= {name: batch[name].to(self.module.device) for name in ("prompt_ids", "prompt_mask")}
        (response,) = self.module.generate(batch, make_streamer(tokenizer, decoding))
        self.turns.append(assistant_turn(str(response.strip())))


def make_streamer(tokenizer: Any, decoding: Decoding) -> Any:
    """A transformers ``TextStreamer`` that prints up to a stop text, and withholds what may be the beginning of one.

    Args:
        tokenizer: the model's tokenizer.
        decoding: the stop texts.
    """
    from transformers import TextStreamer

    class StoppingStreamer(TextStreamer):  # here: transformers is imported only on first use
        text, n_printed = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text = (self.text + text).lstrip()  # as in predictions files
            sure, _ = decoding.cut(self.text, is_open=not stream_end)
            print(sure[self.n_printed :], end="\n" if stream_end else "", flush=True)
            self.n_printed = max(len(sure), self.n_printed)

    return StoppingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
