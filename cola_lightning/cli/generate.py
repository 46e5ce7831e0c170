"""``cola generate``: generates text with a checkpoint or an export, from a prompt or in a conversation."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cola_lightning.chain.checkpoint import OpenedCheckpoint, check_arguments
from cola_lightning.chain.peft import CONFIG_NAME, TENSORS_NAME, adapter_config
from cola_lightning.chain.store import JSON_NAME
from cola_lightning.cli.help import command_parser, parsed
from cola_lightning.cli.inspect import LINKS, TRUST
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError, one_line
from cola_lightning.export.card import PROMPT_FORMAT
from cola_lightning.hub import quiet
from cola_lightning.seeding import check_seed

PLACE = "prompt"  # names a prompt that the chat template cannot format, in messages
MARK = "\ufeff"  # of the byte order, which some editors write at the beginning of a file


def generate(words: Sequence[str]) -> None:
    """Runs ``cola generate``.

    Args:
        words: its arguments.

    Raises:
        UserError: for invalid arguments, and for a model that does not generate.
    """
    options = parsed(_parser(), words)
    how = {name: options[name] for name in ("max_new_tokens", "do_sample", "temperature", "top_p")}
    decoding = Decoding(**how, stop=tuple(options.stop))
    decoding.check()
    check_seed("seed", options.seed)
    prompt = options.prompt if options.chat or options.prompt is not None else _standard_input()
    if prompt is not None and not prompt.strip():
        raise UserError("prompt: expected text, by --prompt or on standard input, received none")
    logging.getLogger("cola_lightning").setLevel(logging.ERROR)  # standard output is for the generated text
    _run(_loaded(options), options, decoding, prompt)


def _parser() -> ArgumentParser:
    description = "Generates text with a checkpoint, or an export, of a language model, and streams it to standard output."
    parser = command_parser("generate", description)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="a checkpoint that a fit wrote, or a folder that `cola export` wrote: a merged model, or a PEFT adapter",
    )
    parser.add_argument("--prompt", type=str, metavar="TEXT", help="the prompt (default: standard input)")
    parser.add_argument(
        "--chat", action="store_true", help="a conversation: one turn per line; an empty line or Ctrl-D ends it"
    )
    parser.add_argument("--links", type=int | None, metavar="K", help=f"for a checkpoint, the {LINKS}")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help=TRUST)
    parser.add_argument(
        "--chat_template",
        type=bool | None,
        help="format the prompt by the tokenizer's chat template (default: as in training)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="maximum number of generated tokens")
    parser.add_argument("--do_sample", action="store_true", help="sample tokens (default: greedy decoding)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="with --do_sample: divides the logits")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="with --do_sample: sample from the most probable tokens whose probabilities add up to this",
    )
    parser.add_argument("--stop", nargs="+", type=str, default=[], metavar="TEXT", help="texts at which generation stops")
    parser.add_argument("--seed", type=int | None, metavar="N", help="with --do_sample: seed of the sampling (default: random)")
    return parser


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("prompt, up to Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read()
    return text.removeprefix(MARK).removesuffix("\n")


# ---------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Generator:
    """A function that generates from a batch and a streamer, with its tokenizer, device and training prompt format."""

    write: Callable[[dict[str, Any], Any], list[str]]
    tokenizer: Any
    device: Any
    prompt_format: Mapping[str, Any]


def _loaded(options: Namespace) -> Generator:
    path, trust = options.checkpoint, options.trust_remote_code
    if not path.is_dir():
        return _of_checkpoint(path, options.links, trust)
    if options.links is not None:
        raise UserError(f"links: expected none beside an export, whose links are merged, received {options.links}")
    if (path / CONFIG_NAME).is_file():
        return _of_adapter(path, trust)
    if (path / "config.json").is_file():
        return _of_model(path, trust)
    what = "a chain folder, whose base is elsewhere" if (path / JSON_NAME).is_file() else "which is neither"
    raise UserError(
        "checkpoint: expected a checkpoint file, or the folder of a merged model or of a PEFT adapter, "
        f"received {str(path)!r}, {what}"
    )


def _of_checkpoint(path: Path, links: int | None, trust: bool) -> Generator:
    opened = OpenedCheckpoint.open(path)
    arguments, format_ = opened.state.module, opened.state.prompt_format
    check_arguments(arguments, "generate")
    from cola_lightning.hf import COLACausalLM
    from cola_lightning.module import COLAModule, find_class

    found = find_class(arguments["class_path"])
    if not issubclass(found, COLACausalLM):
        raise _cannot_generate(f"{str(path)!r}, of a {found.__name__}")
    given = {"trust_remote_code": True} if trust else {}  # not every subclass has the argument
    with quiet():
        module: Any = COLAModule.load_from_checkpoint(opened, links=links, **given)
    device = _device()
    module.to(device).eval()
    return Generator(module.generate, module.tokenizer, device, format_)


def _of_model(folder: Path, trust: bool) -> Generator:
    from cola_lightning.hf.pretrained import Pretrained

    pretrained = Pretrained(str(folder), trust_remote_code=trust)
    model = _language_model(pretrained, folder)
    return _of_plain(model, pretrained.tokenizer())


def _of_adapter(folder: Path, trust: bool) -> Generator:
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from cola_lightning.hf.pretrained import (
        PACKAGE_PREFIX,
        Pretrained,
        broken_files_refused,
        package_folder,
        with_padding,
    )

    config = adapter_config(folder)
    if (task := config.get("task_type")) not in ("CAUSAL_LM", None):
        raise _cannot_generate(f"{str(folder)!r}, an adapter of the task {task}")
    name, gguf_file = config["base_model_name_or_path"], None
    if not any((folder / file).is_file() for file in (TENSORS_NAME, "adapter_model.bin")):  # or peft would ask the hub
        raise UserError(f"adapter: expected {TENSORS_NAME} beside {CONFIG_NAME} in {str(folder)!r}, received none")
    if name.startswith(PACKAGE_PREFIX):  # an adapter's config does not name the package's file with its base
        files = sorted(path.name for path in package_folder(name).glob("*.gguf"))
        gguf_file = files[0] if len(files) == 1 else None
    base = Pretrained(name, config.get("revision"), gguf_file=gguf_file, trust_remote_code=trust)
    model = _language_model(base, folder)
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, UnpicklingError, EOFError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"adapter: expected a LoRA of PEFT for {name!r} in {str(folder)!r}, received one that peft cannot load "
            f"({one_line(str(error))})"
        ) from error
    if adapted.active_peft_config.is_prompt_learning:  # whose layers are not in the model that generates
        raise UserError(
            f"adapter: expected one of layers, such as a LoRA, in {str(folder)!r}, received {config.get('peft_type')}"
        )
    model = adapted.get_base_model()
    if not (folder / "tokenizer_config.json").is_file():
        return _of_plain(model, base.tokenizer())
    with broken_files_refused("adapter", "a tokenizer", AutoTokenizer, str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    return _of_plain(model, with_padding(tokenizer))


def _language_model(pretrained: Any, folder: Path) -> Any:
    """Loads a plain model.

    Raises:
        UserError: for a model of another type: transformers would initialise a new head.
    """
    import transformers

    names = pretrained.config().architectures or []
    kinds = [getattr(transformers, name, None) for name in names]  # None: custom code
    if kinds and not any(kind is None or kind.can_generate() for kind in kinds):
        raise _cannot_generate(f"{str(folder)!r}, of a {names[0]}")
    with quiet():
        how = {} if pretrained.gguf_file else {"dtype": "auto"}
        return pretrained.load(transformers.AutoModelForCausalLM, **how)


def _of_plain(model: Any, tokenizer: Any) -> Generator:
    """A generator for a model without this package's layers; tokenizer files from an export contain the prompt format."""
    from cola_lightning.chat_template import end_tokens
    from cola_lightning.hf.generation import generate as generate_
    from cola_lightning.hf.pretrained import with_limit

    device, tokenizer = _device(), with_limit(tokenizer, model.config)
    model.to(device).eval()
    ends = end_tokens(model, tokenizer)  # before generation replaces the model's own generation config

    def write(batch: dict[str, Any], streamer: Any) -> list[str]:
        return generate_(model, tokenizer, batch, ends, streamer=streamer)

    unknown = {"chat_template": tokenizer.chat_template is not None}
    return Generator(write, tokenizer, device, tokenizer.init_kwargs.get(PROMPT_FORMAT, unknown))


def _cannot_generate(received: str) -> UserError:
    return UserError(
        f"checkpoint: expected one of a causal language model (COLACausalLM), which generates, received {received}"
    )


def _device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


# ---------------------------------------------------------------------- generation


def _run(model: Generator, options: Namespace, decoding: Decoding, prompt: str | None) -> None:
    import torch

    from cola_lightning.chat_template import assistant_turn, user_turn

    kind, was_chat = model.prompt_format.get("kind"), bool(model.prompt_format.get("chat_template"))
    is_chat = was_chat if options.chat_template is None else options.chat_template
    has_template = bool(model.tokenizer.chat_template) and options.chat_template is not False
    if (options.chat or is_chat) and not has_template:
        received = "--chat_template false" if options.chat_template is False else "one without"
        field = "chat" if options.chat else "chat_template"
        raise UserError(f"{field}: expected a tokenizer with a chat template, received {received}")
    if kind == "options":
        _note("it was trained to choose among options, not to generate: `cola predict` chooses")
    elif options.chat and not was_chat:
        _note("it was not trained on turns in the chat template")
    if kind == "answer" and not decoding.stop:
        decoding = replace(decoding, stop=("\n",))  # the training answers end with it
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if not options.chat:
        assert prompt is not None
        _answer(model, decoding, user_turn(prompt) if is_chat else prompt)
        return
    turns = []
    for turn in _turns(prompt):
        turns += user_turn(turn)
        turns.append(assistant_turn(_answer(model, decoding, turns)))


def _turns(first: str | None) -> Iterator[str]:
    """The user's turns, one per line, up to an empty line or the end of standard input."""
    if first is not None:
        yield first
    if sys.stdin.isatty():
        _note("an empty line or Ctrl-D ends the conversation")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").removeprefix(MARK)
        except EOFError:
            print() if sys.stdin.isatty() else None  # ends the prompt's line
            return
        if not line.strip():
            return
        yield line


def _answer(model: Generator, decoding: Decoding, prompt: str | list[dict[str, Any]]) -> str:
    """Generates the continuation of a text, or the next turn of a conversation, and streams it."""
    from cola_lightning.chat_template import ChatTemplate, Conversation
    from cola_lightning.data.encoding import PromptRow, collate_prompts, encode_prompts

    tokenizer, is_chat = model.tokenizer, not isinstance(prompt, str)
    template = ChatTemplate(tokenizer, model.prompt_format.get("chat_template_kwargs", {}))
    text = prompt if isinstance(prompt, str) else template.prompt(Conversation(prompt), PLACE)
    (ids,) = encode_prompts(tokenizer, [text], sys.maxsize, is_whole=is_chat)
    if (room := int(tokenizer.model_max_length) - len(ids)) < 1:
        raise UserError(f"prompt: expected fewer than {len(ids) + room} tokens, for the model, received {len(ids)}")
    decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, room))
    ends = template.stop_tokens if is_chat else []
    batch = collate_prompts([PromptRow(ids, prompt, None)], tokenizer.pad_token_id, decoding, ends)
    batch |= {name: batch[name].to(model.device) for name in ("prompt_ids", "prompt_mask")}
    (response,) = model.write(batch, make_streamer(tokenizer, decoding))
    return response.strip()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


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
