"""What a chat template does to messages is seen: left out, moved, written twice, refused."""

import json
from pathlib import Path

import pytest

import tiny
from rmfast.data.encoding import Encoder, counted
from rmfast.data.rendering import Renderer
from rmfast.data.values import Chat
from rmfast.errors import DataError, RowError

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


SHORT = turns(("user", "yes"), ("assistant", "yes"))  # equal, and in the words of the template
SYSTEM = turns(("system", "be good"), ("user", "why?"), ("assistant", "so"))
LONG = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
DEVELOPER = turns(("developer", "in French"), ("user", "why?"), ("assistant", "parce que"))


def rendered(template, messages, given=None, **options):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    render = Renderer(tokenizer, **options)
    return render(messages, given or {}), dict(render.warnings)


@pytest.mark.parametrize("messages", [SHORT, SYSTEM, LONG, DEVELOPER])
def test_all_is_written(messages):
    text, warnings = rendered(TURNS, messages)
    assert text.count("<") == len(messages) and not warnings


CALLS = [{"type": "function", "function": {"name": "get", "arguments": {}}}]
WRONG = {
    "a role": (
        TURNS.replace("m in messages", "m in messages if m.role != 'developer'"), DEVELOPER,
        r"leaves out turn 0 \(developer\) of 3"),
    "the first of equal turns": (
        "{{ messages[-1].content }}", SHORT, r"leaves out turn 0 \(user\) of 2"),
    "all but the last four": (
        TURNS.replace("messages %", "messages[-2:] %"), LONG, r"leaves out turn 0 \(user\) of 4"),
    "a part": (TURNS.replace("m.content", "m.content[:20]"), turns(("user", 5 * "long, ")),
               r"a part of turn 0 \(user\)"),
    "lower case": (
        TURNS.replace("m.content", "m.content | lower"), DEVELOPER, r"turn 0 \(developer\), or"),
    "twice": (TURNS + "{{ messages[0].content }}", LONG, r"writes turn 0 \(user\) of 4 twice"),
    "the order": (
        TURNS.replace("messages %", "messages[::-1] %"), SHORT,
        r"turn 1 \(assistant\) of 2 before turn 0"),
    "a refusal": ("{{ raise_exception('not I') }}", SHORT, "refuses the messages: not I"),
    "a tool call": (TURNS, [LONG[0], {**LONG[1], "tool_calls": CALLS}],
                    r"leaves out tool calls of turn 1 \(assistant\) of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_it_was_given_is_refused(name):
    template, messages, said = WRONG[name]
    with pytest.raises(RowError, match=said):
        rendered(template, messages)


def test_what_templates_change_on_purpose():
    stripped = turns(("user", " why?\n\n"), ("tool", '{"a": "b\\n"}'), ("assistant", "so \n so"))
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}"
        "{{ m.content | trim | replace('\n', ' ') }}{% endif %}|{% endfor %}"
    )
    assert rendered(template, stripped)[1] == {}
    last = "{{ messages[1].content }}{{ messages[0].content }}{{ messages[2].content }}"
    assert list(rendered(last, SYSTEM)[1]) == ["the chat template moved the system prompt"]
    reasoning = turns(("user", "2?"), ("assistant", "<think>\nwell\n</think>\n\nYes."))
    template = TURNS.replace("m.content", "m.content.split('</think>')[-1]")
    text, warnings = rendered(template, reasoning)
    assert "Yes." in text and "well" not in text
    assert warnings == {"the chat template left out the reasoning before </think>": 1}


def test_two_answers_that_differ_in_lost_reasoning_are_not_compared():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TURNS.replace("m.content", "m.content.split('</think>')[-1]")
    encode = Encoder(tokenizer)
    sides = [turns(("user", "2?"), ("assistant", f"<think>{x}</think>Yes.")) for x in "ab"]
    assert "reasoning" in encode.lost(sides, encode(sides)).reason
    assert encode.lost(sides[:1] * 2, encode(sides[:1] * 2)) is None  # a tie
    assert "reasoning" in encode.lost([*sides, sides[0]], encode([*sides, sides[0]])).reason
    several = [turns(("user", "2?"), ("assistant", "No.")), *sides]
    assert encode.lost(several, encode(several)) is None
    assert encode.lost(["a", "b"], encode(["a", "b"])) is None
    assert counted(encode.warnings) == [
        "the chat template left out the reasoning before </think>: 9 conversations"
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_has_a_key_of_its_own(key):
    tokenizer = tiny.tokenizer()
    sides = [[*turns(("user", "2?")), {**SHORT[1], key: f"well {x}"}] for x in "ab"]
    encode = Encoder(tokenizer)
    assert "reasoning" in encode.lost(sides, encode(sides)).reason
    assert counted(encode.warnings) == [
        "the chat template left out the reasoning of a message: 2 conversations"
    ]
    tokenizer.chat_template = TURNS.replace("m.content", f"m.{key} }}}}{{{{ m.content")
    encode = Encoder(tokenizer)
    assert encode.lost(sides, encode(sides)) is None and not encode.warnings


MARKS = {
    "of the role": TURNS.replace("<{{ m.role }}>", "{{ '<|' + m.role + '|>' }}") + "</s>",
    "[INST]": "{{ bos_token }}{% for m in messages %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content }}{% endfor %}",
    "Alpaca's": "{% for m in messages %}### {{ 'Input' if m.role == 'user' else 'Response' }}:\n"
    "{{ m.content }}\n\n{% endfor %}",
    "Vicuna's": "Be kind. " + TURNS.replace("<{{ m.role }}>", "{{ m.role | upper }}: "),
}


@pytest.mark.parametrize("name", MARKS)
def test_text_that_was_templated_already(name):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = MARKS[name]
    templated = tokenizer.apply_chat_template(SHORT[:1], tokenize=False).removeprefix("<s>")
    templated = templated.removeprefix("Be kind. ") + {
        "Alpaca's": "### Response:",
        "Vicuna's": "ASSISTANT:",
    }.get(name, "")
    refused, fine = Encoder(tokenizer)([(templated, "so"), ("see [INST] or USER: ### Input", "so")])
    assert "which the chat template writes itself" in refused.reason
    assert not isinstance(fine, RowError)
    for options in ({"special_tokens": True}, {"chat": False}):
        assert not isinstance(Encoder(tokenizer, **options)([(templated, "so")])[0], RowError)


def test_special_tokens_in_a_call():
    call = {"function": {"name": "f", "arguments": {"x": "</s>"}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    (refused,) = Encoder(tiny.tokenizer())([[*SHORT[:1], turn]])
    assert 'turn 1 (assistant) has "</s>"' in refused.reason


@pytest.mark.parametrize("token", ["<s>", "</s>", "<|end|>"])
def test_special_tokens_in_messages(token):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|free|>"]})
    tokenizer.chat_template = "{{ bos_token }}" + TURNS + "<|end|>{{ eos_token }}"
    messages = turns(("user", f"a {token} b"), ("assistant", "c"))
    refused, prompt, plain, free = Encoder(tokenizer)(
        [messages, (f"a {token}", "c"), f"a {token} b", turns(("user", "<|free|>"))]
    )
    for one in (refused, prompt):
        assert f'turn 0 (user) has "{token}"' in one.reason and "--special-tokens" in one.reason
    assert len(plain) == len("a ") + 1 + len(" b") and not isinstance(free, RowError)
    (kept,) = Encoder(tokenizer, special_tokens=True)([messages])
    want = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert kept.tolist() == want
    assert not isinstance(Encoder(tokenizer, chat=False)([(f"a {token}", "c")])[0], RowError)


def test_several_templates():
    """As transformers chooses: the one for tools where there are tools, else the default."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": TURNS, "tool_use": "{{ tools | tojson }}" + TURNS}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    plain, tooled = Encoder(tokenizer)([SHORT, Chat(SHORT, {"tools": tools})])
    decoded = tokenizer.decode(tooled)
    assert json.loads(decoded[: decoded.index("<user>")]) == tools
    assert tokenizer.decode(plain) == rendered(TURNS, SHORT)[0]
    tokenizer.chat_template = {"rag": TURNS, "tool_use": TURNS}
    with pytest.raises(DataError, match=r"--chat-template FILE.*'rag', 'tool_use'"):
        Encoder(tokenizer)([SHORT])


def test_what_a_row_gives_the_template():
    template = "{% if loud %}!{% endif %}" + TURNS
    assert rendered(template, SHORT, {"loud": True})[0].startswith("!")
    with pytest.raises(RowError, match='"tokenize" is no variable'):
        rendered(template, SHORT, {"tokenize": True})
    with pytest.raises(RowError, match="tools goes with messages"):
        raise Encoder(tiny.tokenizer())([Chat("text", {"tools": []})])[0]


def test_tools_that_a_template_does_not_read_are_not_left_out_in_silence():
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    asked = turns(("user", "call search"), ("assistant", "so"))
    with pytest.raises(RowError, match='leaves out "tools"'):  # though its name is in the text
        rendered(TURNS, asked, {"tools": tools})
    assert rendered("{{ tools | tojson }}" + TURNS, asked, {"tools": tools})[1] == {}
    with pytest.raises(RowError, match='leaves out "documents"'):
        rendered(TURNS, SHORT, {"documents": [{"text": "d"}]})
    assert list(rendered(TURNS, SHORT, {"loud": True})[1]) == [
        'the chat template does not read "loud" of chat_template_kwargs'
    ]
    assert list(rendered(TURNS, SHORT[:1])[1]) == [
        "a conversation ends with what the user says, and has no answer"
    ]


def test_what_a_template_does_depends_on_what_it_is_given():
    """A probe of one row says nothing of a row with other values."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TURNS + "{% if twice %}" + TURNS + "{% endif %}"
    render = Renderer(tokenizer)
    assert render(LONG, {"twice": False})
    with pytest.raises(RowError, match="twice"):
        render(LONG, {"twice": True})


def test_templates_as_models_have_them():
    """TRL comes with copies of them: what is usual is not refused, and what they drop is."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    wanted = {"llama3_1": (SYSTEM, DEVELOPER), "qwen3": (SYSTEM, LONG), "gemma3": (SYSTEM, LONG),
              "deepseek_r1_distill": (SYSTEM, LONG), "cohere": (SYSTEM, LONG), "phi3": (LONG,),
              "gptoss": (LONG, DEVELOPER)}  # fmt: skip
    for name, conversations in wanted.items():
        if (folder / f"{name}.jinja").exists():  # older versions of TRL have fewer
            for messages in conversations:
                text, warnings = rendered((folder / f"{name}.jinja").read_text(), messages)
                assert all(m["content"] in text for m in messages) and not warnings, name
    if (folder / "qwen3.jinja").exists():
        with pytest.raises(RowError, match=r"leaves out turn 0 \(developer\)"):
            rendered((folder / "qwen3.jinja").read_text(), DEVELOPER)
