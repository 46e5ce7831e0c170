"""Each assistant turn is trained once, in the context in which a server will ask for it, on what it must then generate."""

import io
import json
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cola_lightning import TextDataModule, UserError
from cola_lightning.chat_template import ChatTemplate, Conversation
from cola_lightning.cli import main
from cola_lightning.data.chat import encode_conversations
from cola_lightning.data.encoding import labels_of
from cola_lightning.data.rows import Row
from tests import tiny

CHAT = tiny.CHAT
TEMPLATES = sorted(Path(os.environ.get("COLA_DATA_DIR", "none"), "chat_templates").glob("*.jinja"))


def tokenizer(chat, *special):
    made = tiny.tokenizer(pad=True)
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = chat
    return made


def turns(*contents, system=None):
    """A conversation of the user and the assistant, in turn."""
    messages = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encoded(own, messages, max_length=4000, *, tools=None, loss="all", **kwargs):
    (rows,) = encode_conversations(
        ChatTemplate(own, kwargs), [Conversation(messages, tools)], max_length, ["line 1"], loss=loss
    )
    return rows


def spans(row):
    """Each run of tokens with a loss, and the tokens before it."""
    ids, labels = row["input_ids"], labels_of(row)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    starts = [k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100]
    ends = [k for k in range(1, len(ids) + 1) if labels[k - 1] != -100 and (k == len(ids) or labels[k] == -100)]
    return [(ids[:start], ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def texts(own, rows):
    """For each row, the texts that have a loss, and the text before each."""
    return [[(own.decode(before), own.decode(trained)) for before, trained in spans(row)] for row in rows]


def trained(own, rows):
    return [[text for _, text in row] for row in texts(own, rows)]


# ---------------------------------------------------------------------- templates of well-known models

CHATML, EOT, TURN = "{}<|im_end|>", "{}<|eot_id|>", "{}<end_of_turn>"
THOUGHT = "<think>\n\n</think>\n\n{}<|im_end|>"
TRAINED = {
    "cohere": "{}<|END_OF_TURN_TOKEN|>",
    "cohere2": "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseekv3": "{}<\uff5cend▁of▁sentence\uff5c>",
    "gemma": TURN,
    "gemma3": TURN,
    "glm4moe": "\n<think></think>\n{}<|user|>",
    "gptoss": "<|channel|>final<|message|>{}<|return|>",
    **dict.fromkeys(["lfm2", "lfm2_2_5"], CHATML),
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], EOT),
    **dict.fromkeys(["nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"], CHATML),
    **dict.fromkeys(["phi3", "phi3_5"], "{}<|end|>"),
    **dict.fromkeys(["qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_nothink"], CHATML),
    "qwen3": THOUGHT,
    **dict.fromkeys(["qwen3_5_think", "qwen3_6"], "\n</think>\n\n{}<|im_end|>"),
}
REWRITE = {"gptoss", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
WITHOUT_SYSTEM = {"gemma"}
CLOSED = {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"}  # rendered with enable_thinking false
OPENED = {"deepseekv3": "<think>\n"}  # by the generation prompt, and not by the turn
CONVERSATIONS = {
    "single": turns("2 + 2?", "It is 4."),
    "two": turns("2 + 2?", "It is 4.", "3 + 3?", "It is 6."),
    "system": turns("2 + 2?", "It is 4.", "3 + 3?", "It is 6.", system="Be brief."),
}


@pytest.mark.skipif(not TEMPLATES, reason="needs COLA_DATA_DIR with chat_templates")
def test_all_templates_are_tried():
    assert sorted(TRAINED) == [path.stem for path in TEMPLATES]


@pytest.mark.skipif(not TEMPLATES, reason="needs COLA_DATA_DIR with chat_templates")
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TRAINED)
def test_each_turn_of_a_known_template_is_trained_once_after_its_generation_prompt(name, kind):
    own, messages = own_of(name), CONVERSATIONS[kind]
    if name in WITHOUT_SYSTEM and kind == "system":
        with pytest.raises(UserError, match="System role not supported"):
            encoded(own, messages)
        return
    rows = encoded(own, messages)
    expected = []
    for k, turn in enumerate(messages):
        if turn["role"] == "assistant":
            how = {"tokenize": False, "add_generation_prompt": True} | ({"enable_thinking": False} if name in CLOSED else {})
            prompt = own.apply_chat_template(messages[:k], **how).removesuffix(OPENED.get(name, ""))
            words = TRAINED[name].format(turn["content"])
            expected.append(tuple(own(text, add_special_tokens=False)["input_ids"] for text in (prompt, words)))
    assert [span for row in rows for span in spans(row)] == expected
    assert len(rows) == (len(expected) if name in REWRITE else 1)


def own_of(name):
    """A tokenizer with a known template, and with what looks like a special token in it."""
    (source,) = [path.read_text() for path in TEMPLATES if path.stem == name]
    special = re.findall(r"<[|\uff5c][^|\uff5c<>]+[|\uff5c]>|</?[a-z_]+>|\[/?[A-Za-z_]+\]", source)
    return tokenizer(source, *sorted({*special} - {"<s>", "</s>"}))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    {"role": "user", "content": "Cold?"},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": '{"t": 9}'},
    {"role": "assistant", "content": "It is 9."},
    {"role": "user", "content": "Red?"},
    {"role": "assistant", "content": "Yes."},
]
JSON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
XML = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
CALLS = {  # by row: gpt-oss drops the call's thought where an answer follows, and the context of that answer has it
    "glm4moe": [
        [f"\n<think>Hm.</think>\n{XML}<|observation|>", "\n<think></think>\nIt is 9.<|user|>"],
        ["\n<think></think>\nYes.<|user|>"],
    ],
    "gptoss": [
        [HARMONY + '{"city": "Oslo"}<|call|>', "<|channel|>final<|message|>It is 9.<|return|>"],
        ["<|channel|>final<|message|>Yes.<|return|>"],
    ],
    "llama3_1": [['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "It is 9.<|eot_id|>", "Yes.<|eot_id|>"]],
    "qwen2_5": [[f"{JSON}<|im_end|>", "It is 9.<|im_end|>", "Yes.<|im_end|>"]],
    "qwen3": [
        [f"<think>\nHm.\n</think>\n\n{JSON}<|im_end|>", "<think>\n\n</think>\n\nIt is 9.<|im_end|>"],
        ["<think>\n\n</think>\n\nYes.<|im_end|>"],
    ],
}


@pytest.mark.skipif(not TEMPLATES, reason="needs COLA_DATA_DIR with chat_templates")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_a_tool_is_trained_with_its_thought_and_what_the_tool_says_is_not(name):
    own = own_of(name)
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "It is.", "parameters": parameters}}]
    assert trained(own, encoded(own, CALLING, tools=tools)) == CALLS[name]


# ---------------------------------------------------------------------- what templates do, one by one

TURN_OF = "{% for turn in messages %}[{{ turn.role }}]"
OPEN = "{% if add_generation_prompt %}[assistant]{% endif %}"
TALK = turns("Old?", "No", "Red?", "Yes")


def test_a_template_that_only_appends_gives_one_row_as_turn_after_turn():
    own = tokenizer(CHAT)
    (row,) = encoded(own, turns("Is it 🏠?", "Yes.", "Old?", "No, נו 🏠", system="Be kind."))
    whole = "<s>[system]\nBe kind.</s>\n[user]\nIs it 🏠?</s>\n[assistant]\nYes.</s>\n[user]\nOld?</s>\n[assistant]\n"
    whole += "No, נו 🏠</s>\n"
    assert row["input_ids"] == own(whole, add_special_tokens=False)["input_ids"]
    first, second = whole.split("[assistant]\n")[0] + "[assistant]\n", whole.removesuffix("No, נו 🏠</s>\n")
    assert texts(own, [row]) == [[(first, "Yes.</s>"), (second, "No, נו 🏠</s>")]]


@pytest.mark.parametrize("said", ["   def f(x):  \n   \n x   return   2", "\nIt is.", "a \n", " "])
def test_white_space_of_a_turn_is_trained_and_a_token_over_the_prompts_end_is_the_turns(said):
    own = tokenizer(CHAT)
    own.add_tokens(["\n\n"])
    (row,) = encoded(own, turns("Write.", said))
    ((before, text),) = texts(own, [row])[0]
    assert before + text == f"<s>[user]\nWrite.</s>\n[assistant]\n{said}</s>"
    assert text == ("\n" if said[0] == "\n" else "") + f"{said}</s>"


def test_a_template_that_drops_earlier_thoughts_gives_a_row_for_each_turn():
    chat = (
        TURN_OF + "{% if turn.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ turn.content }}</s>{% endfor %}"
    )
    own = tokenizer(chat + OPEN, "<think>", "</think>")
    assert texts(own, encoded(own, TALK)) == [
        [("[user]Old?</s>[assistant]", "<think></think>No</s>")],
        [("[user]Old?</s>[assistant]No</s>[user]Red?</s>[assistant]", "<think></think>Yes</s>")],
    ]


OPENS = "{% if add_generation_prompt %}[assistant]<think>{% endif %}"


def test_the_loss_begins_where_a_turn_departs_from_a_thought_that_the_generation_prompt_opens(caplog):
    own = tokenizer(TURN_OF + "{{ turn.content }}</s>{% endfor %}" + OPENS, "<think>")
    expected = [
        [("[user]Old?</s>[assistant]", "No</s>"), ("[user]Old?</s>[assistant]No</s>[user]Red?</s>[assistant]", "Yes</s>")]
    ]
    for _ in range(2):
        assert texts(own, encoded(own, TALK)) == expected
    (line,) = caplog.messages  # once for a template
    assert "generation prompt opens a thought" in line
    thought = turns("Old?", "<think>Hm.</think>No")
    assert texts(own, encoded(own, thought)) == [[("[user]Old?</s>[assistant]<think>", "Hm.</think>No</s>")]]


def test_a_turn_is_rendered_in_the_mode_whose_generation_prompt_it_follows(caplog):
    opens = OPENS.replace("<think>", "{{ '<think>\n' }}{% if enable_thinking is false %}{{ '\n</think>' }}{% endif %}")
    chat = TURN_OF + "{% if turn.role == 'assistant' and '<think>' not in turn.content %}{{ '<think>\n\n</think>' }}{% endif %}"
    own = tokenizer(chat + "{{ turn.content }}</s>{% endfor %}" + opens, "<think>", "</think>")
    own.add_tokens(["\n\n"])  # so that the prompt parts from the turn inside a token
    closed = [[("[user]Old?</s>[assistant]<think>\n\n</think>", "No</s>")]]
    assert texts(own, encoded(own, turns("Old?", "No"), enable_thinking=False)) == closed
    assert not caplog.messages
    for _ in range(2):
        assert texts(own, encoded(own, turns("Old?", "No"))) == closed
    (line,) = caplog.messages
    assert line.endswith("data.chat_template_kwargs '{enable_thinking: false}' does so in generation, too")
    thought = turns("Old?", "<think>\nHm.</think>No")
    assert texts(own, encoded(own, thought)) == [[("[user]Old?</s>[assistant]<think>\n", "Hm.</think>No</s>")]]


def test_a_last_turn_that_ends_with_another_token_is_trained_with_that():
    end = "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    own = tokenizer(TURN_OF + "{{ turn.content }}" + end + OPEN, "<|return|>", "<|end|>")
    assert trained(own, encoded(own, TALK)) == [["No<|return|>"], ["Yes<|return|>"]]
    assert own.convert_ids_to_tokens(ChatTemplate(own).stop_tokens) == ["<|return|>"]


@pytest.mark.parametrize("between", ["\n", ""])  # the white space after a token may be a part of it
def test_an_end_of_text_after_the_last_turn_is_no_part_of_it(between):
    end = f"<|end|>{between}{{% endfor %}}{{% if not add_generation_prompt %}}</s>{{% endif %}}"
    own = tokenizer(TURN_OF + "{{ turn.content }}" + end + OPEN, "<|end|>")
    assert trained(own, encoded(own, TALK)) == [["No<|end|>", "Yes<|end|>"]]
    assert own.convert_ids_to_tokens(ChatTemplate(own).stop_tokens) == ["<|end|>"]


@pytest.mark.parametrize("is_last", ["loop.last", "loop.index0 == ns.last"])
def test_a_system_prompt_before_the_last_user_turn_is_in_the_context_of_each(is_last):
    """With ``loop.last``, it is in the generation prompt's rendering, and no longer in that with the answer."""
    chat = "{% set system = messages[0].content if messages[0].role == 'system' %}{% set ns = namespace() %}"
    chat += "{% for turn in messages if turn.role != 'system' %}{% if turn.role == 'user' %}{% set ns.last = loop.index0 %}"
    chat += "{% endif %}{% endfor %}{% for turn in messages if turn.role != 'system' %}{% if turn.role == 'user' %}[INST] "
    chat += f"{{% if system and {is_last} %}}{{{{ system }}}}\n\n{{% endif %}}{{{{ turn.content }}}}[/INST]"
    chat += "{% else %} {{ turn.content }}</s>{% endif %}{% endfor %}"
    own = tokenizer(chat, "[INST]", "[/INST]")
    rows = encoded(own, turns("Old?", "No", "Red?", "Yes", system="Be brief."))
    assert texts(own, rows) == [
        [("[INST] Be brief.\n\nOld?[/INST]", " No</s>")],
        [("[INST] Old?[/INST] No</s>[INST] Be brief.\n\nRed?[/INST]", " Yes</s>")],
    ]
    assert len(encoded(own, TALK)) == 1


def test_a_turn_that_cannot_be_found_after_its_generation_prompt_is_refused():
    chat = "{% for turn in messages %}{{ messages | length if messages[-1].role == 'assistant' }}{{ turn.content }}{% endfor %}"
    own = tokenizer(chat)
    assert texts(own, encoded(own, turns("Old?", "No"))) == [[("Old?", "2No")]]
    own.chat_template += OPEN
    message = "line 1: expected a chat template whose generation prompt begins an assistant turn, received another"
    with pytest.raises(UserError, match=message):
        encoded(own, turns("Old?", "No"))


PARTS = TURN_OF + "{% for part in turn.content if part.type == 'text' %}{{ part.text }}{% endfor %}</s>{% endfor %}" + OPEN


@pytest.mark.parametrize("chat", [PARTS, CHAT])
def test_contents_as_text_and_as_parts_are_rendered_alike(chat):
    own = tokenizer(chat)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
    rows = [encoded(own, messages) for messages in (TALK, parts, [*parts[:3], TALK[3]], [*TALK[:3], parts[3]])]
    assert rows[1:] == rows[:1] * 3
    assert trained(own, rows[0]) == [["No</s>", "Yes</s>"]]
    assert own.convert_ids_to_tokens(ChatTemplate(own).stop_tokens) == ["</s>"]
    prompts = [ChatTemplate(own).prompt(Conversation(messages[:1]), "line 1") for messages in (TALK, parts)]
    assert prompts[0] == prompts[1]
    assert "Old?" in prompts[0]


def test_a_turn_without_a_token_of_its_own_ends_with_that_of_the_next():
    own = tokenizer(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}{% endfor %}"
        + OPEN.replace("[assistant]", "<|assistant|>"),
        "<|user|>",
        "<|assistant|>",
        "<|tool|>",
    )
    assert texts(own, encoded(own, TALK)) == [
        [("<|user|>Old?<|assistant|>", "No<|user|>"), ("<|user|>Old?<|assistant|>No<|user|>Red?<|assistant|>", "Yes<|user|>")]
    ]
    called = [TALK[0], TALK[1], {"role": "tool", "content": "9"}, TALK[3]]
    assert trained(own, encoded(own, called)) == [["No<|tool|>", "Yes<|user|>"]]
    assert own.convert_ids_to_tokens(ChatTemplate(own).stop_tokens) == ["<|user|>"]
    own.chat_template = "{% for turn in messages %}\n{{ turn.role }}: {{ turn.content }}{% endfor %}" + OPEN.replace(
        "[", "\n"
    ).replace("]", ":")
    assert trained(own, encoded(own, TALK)) == [[" No", " Yes"]]
    assert ChatTemplate(own).stop_tokens == []


# ---------------------------------------------------------------------- what reaches the template

TOOL = {"type": "function", "function": {"name": "weather", "description": "It is.", "parameters": {}}}
ALL = "{% if tools %}{% for tool in tools %}[tool]{{ tool.function.name }}{% endfor %}{% endif %}" + TURN_OF
ALL += "{% if turn.reasoning_content %}({{ turn.reasoning_content }}){% endif %}{{ turn.content }}"
ALL += "{% for call in turn.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
ALL += "</s>{% endfor %}"
CALLED = [
    {"role": "user", "content": "Is it?", "reasoning_content": None, "tool_calls": None},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "It is old.", "name": "weather"},
    {"role": "assistant", "content": "Old."},
]


def data_of(own, rows, stage, tmp_path, **arguments):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextDataModule(str(tmp_path), **arguments)
    module = SimpleNamespace(tokenizer=own, seed=3)
    data.trainer = SimpleNamespace(lightning_module=module, training=False, world_size=1, global_rank=0)
    data.setup(stage)
    return data


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_their_calls_and_thoughts_reach_the_template(tmp_path, tools):
    own = tokenizer(ALL + OPEN)
    data = data_of(own, [{"messages": CALLED, "tools": tools}], "test", tmp_path)
    first = "[tool]weather[user]Is it?</s>[assistant]"
    call = '(Hm.)weather{"city": "Oslo"}</s>'
    assert texts(own, list(data.test)) == [[(first, call), (f"{first}{call}[tool]It is old.</s>[assistant]", "Old.</s>")]]
    (prompt,) = data_of(own, [{"messages": CALLED[:3], "tools": tools}], "predict", tmp_path).test
    assert own.decode(prompt.prompt_ids) == f"{first}{call}[tool]It is old.</s>[assistant]"


def test_null_fields_of_turns_and_calls_are_none():
    call = {"type": "function", "function": {"name": "time", "arguments": {"city": "Oslo", "query": None}}, "id": None}
    row = Row(
        {
            "messages": [
                {"role": "user", "content": "Is it?", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
        "line 1",
    )
    asked, called = row.messages("messages")
    assert asked == {"role": "user", "content": "Is it?"}
    function = {"name": "time", "arguments": {"city": "Oslo"}}
    assert called == {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    assert row.tools() is None


def test_words_calls_and_thoughts_that_a_template_does_not_render(caplog):
    own = tokenizer(TURN_OF + "{{ turn.content if turn.role != 'assistant' or turn.content != 'No' }}</s>{% endfor %}" + OPEN)
    with pytest.raises(
        UserError, match=r"line 1: expected a chat template that renders the assistant's words, 'No' among them"
    ):
        encoded(own, turns("No or yes?", "No"))
    with pytest.raises(UserError, match="the assistant's words, 'weather' among them"):
        encoded(own, CALLED)
    for _ in range(2):
        encoded(own, [TALK[0], {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}])
    assert caplog.messages == ["the chat template does not render the thoughts of assistant turns"]


def test_the_loss_is_on_the_stop_token_also_where_a_template_marks_the_words_alone():
    marked = "{% generation %}{{ turn.content }}{% endgeneration %}</s>"
    own = tokenizer(
        TURN_OF
        + f"{{% if turn.role == 'assistant' %}}{marked}{{% else %}}{{{{ turn.content }}}}{{% endif %}}{{% endfor %}}"
        + OPEN
    )
    assert trained(own, encoded(own, TALK)) == [["No</s>", "Yes</s>"]]


@pytest.mark.parametrize("wrong", ["1 // 0", "messages[0].content + 1", "[1] | join(1, 2, 3, 4)"])
def test_an_error_of_a_chat_templates_expression_is_one_line(wrong):
    own = tokenizer(f"{{% if messages | length > 3 %}}{{{{ {wrong} }}}}{{% endif %}}{CHAT}")
    with pytest.raises(UserError, match="line 1: expected turns that the chat template can render, received: "):
        encoded(own, TALK)


# ---------------------------------------------------------------------- options


def test_the_last_turn_alone_is_trained_where_that_is_asked_for(tmp_path):
    own = tokenizer(CHAT)
    data = data_of(own, [{"messages": TALK}], "test", tmp_path, loss="last")
    assert trained(own, list(data.test)) == [["Yes</s>"]]
    assert [row["input_ids"] for row in data.test] == [row["input_ids"] for row in encoded(own, TALK)]


def test_a_long_conversation_loses_its_beginning_and_each_row_has_a_loss():
    chat = TURN_OF + "{% if turn.role == 'assistant' and loop.last %}...{% endif %}{{ turn.content }}</s>{% endfor %}" + OPEN
    own = tokenizer(chat)
    first, second = encoded(own, turns("Is the town old? " * 9, "No", "Red? " * 9, "Yes"), max_length=9)
    assert len(first["input_ids"]) == len(second["input_ids"]) == 9
    assert trained(own, [first, second]) == [["...No</s>"], ["...Yes</s>"]]
    own.chat_template = chat.replace("</s>{% endfor", "</s>and what follows{% endfor")
    with pytest.raises(UserError, match="line 1: expected words of the assistant in the last 2 tokens"):
        encoded(own, TALK, max_length=2)


CONFIG = """
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args: {model_name: model, target_modules: [q_proj], rank: 2}
data:
  class_path: TextDataModule
  init_args: {source: rows, max_new_tokens: 4}
trainer: {max_steps: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


def test_variables_of_the_template_are_those_of_training_prediction_generation_and_the_model_card(tmp_path, monkeypatch, capfd):
    """The template renders nothing without them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    tiny.folder("model")
    chat = "{{ raise_exception('It has no thoughts') if enable_thinking is not false }}" + CHAT
    tokenizer(chat).save_pretrained("model")
    Path("rows").mkdir()
    for split in ("train", "validation", "test"):
        Path("rows", f"{split}.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    Path("config.yaml").write_text(CONFIG)
    assert main(["fit", "--config", "config.yaml"]) == 2
    assert "expected turns that the chat template can render, received: It has no thoughts" in capfd.readouterr().err
    variables = ["--data.chat_template_kwargs", "{enable_thinking: false}"]
    assert main(["fit", "--config", "config.yaml", *variables]) == 0, capfd.readouterr().err
    (checkpoint,) = map(str, Path("runs").rglob("last.ckpt"))
    run = str(Path(checkpoint).parent.parent / "config.yaml")
    assert main(["predict", "--config", run, "--ckpt_path", checkpoint]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    assert json.loads(path.read_text())["target"] == "Yes"
    assert main(["export", "--checkpoint", checkpoint, "--format", "merged", "--output", "merged"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", Path("merged/README.md").read_text(), re.DOTALL)
    assert "add_generation_prompt=True, enable_thinking=False)" in code
    exec(code.replace("path/to/this/folder", "merged"), {})
    capfd.readouterr()
    assert main(["generate", "--checkpoint", checkpoint, "--prompt", "Red?", "--max_new_tokens", "4"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Red?\n"))
    assert main(["generate", "--checkpoint", checkpoint, "--chat", "--max_new_tokens", "4"]) == 0
    first, *others = capfd.readouterr().out.splitlines()
    assert set(others) == {first}


def test_a_template_can_be_pickled_for_worker_processes():
    template = ChatTemplate(tokenizer(CHAT), {"enable_thinking": False})
    how = ([Conversation(TALK)], 100, ["line 1"])
    rows = encode_conversations(template, *how)
    assert encode_conversations(pickle.loads(pickle.dumps(template)), *how) == rows
