import pytest

from k2jax.config import ConfigError
from k2jax.text.jinja_template import FolderTemplate
from k2jax.text.kimi_template import TEMPLATES, encode
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.supervised import encode_supervised

CALL = {
    "id": "functions.add:0",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1}},
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "functions.add:0", "content": "2"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Sure <|im_end|>?"},
    {"role": "assistant", "content": "Yes."},
]
LEARNED = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    "Two.<|im_end|>Yes.<|im_end|>"
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer({bytes([i]): i for i in range(256)})


def learned(tokenizer, talk) -> str:
    ids, mask = encode_supervised(tokenizer, talk)
    assert ids == encode(tokenizer, talk, prompt=False) and len(ids) == len(mask)
    return tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept])


def test_only_what_the_assistant_says_is_learned_and_its_end(tokenizer):
    assert learned(tokenizer, TALK) == LEARNED


def test_declared_tools_are_not_learned(tokenizer):
    tools = [{"type": "function", "function": {"name": "add"}}]
    ids, mask = encode_supervised(tokenizer, TALK, tools)
    assert ids == encode(tokenizer, TALK, tools, prompt=False)
    assert tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept]) == LEARNED


def test_a_folders_own_template_gives_the_same(tokenizer):
    source = (
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>{% endif %}"
    )
    tokenizer.template = FolderTemplate({"default": source}, tokenizer.specials, "t")
    talk = [m for m in TALK if m["role"] in ("user", "assistant") and "tool_calls" not in m]
    assert learned(tokenizer, talk) == "Two.<|im_end|>Yes.<|im_end|>"


def test_a_turn_without_its_thought_is_not_learned(tokenizer):
    """K2-Thinking writes empty marks for thoughts of turns before the last answer."""
    tokenizer.template = TEMPLATES["kimi_k2_thinking"]
    running = [
        TALK[1],
        {**TALK[4], "reasoning_content": "easy"},
        TALK[5],
        {**TALK[2], "reasoning_content": "hmm"},
        TALK[3],
    ]
    assert learned(tokenizer, running).startswith("<think>hmm</think>Let me see.")
    assert learned(tokenizer, running[:2]) == ""


def test_a_thought_that_the_template_never_writes_is_refused(tokenizer):
    talk = [TALK[1], {**TALK[4], "reasoning": "easy"}]
    with pytest.raises(ConfigError, match=r"messages\[1\] has a thought, which this chat template"):
        encode_supervised(tokenizer, talk)
    assert learned(tokenizer, [talk[0], {**talk[1], "weight": 0}]) == ""


def test_a_turn_of_weight_0_is_not_learned(tokenizer):
    talk = [{**turn, "weight": 0} if turn is TALK[4] else turn for turn in TALK]
    assert learned(tokenizer, talk) == LEARNED.replace("Two.<|im_end|>", "")
    assert learned(tokenizer, [TALK[1], {**TALK[4], "weight": 0}]) == ""


@pytest.mark.parametrize("talk", [TALK[:2], [], [TALK[0]]])
def test_a_conversation_that_teaches_nothing_is_legal(tokenizer, talk):
    assert learned(tokenizer, talk) == ""


@pytest.mark.parametrize(
    ("talk", "line"),
    [("hi", "must be a list"), ([{"role": "robot", "content": ""}], "has the role 'robot'")],
)
def test_a_malformed_conversation_is_refused(tokenizer, talk, line):
    with pytest.raises(ConfigError, match=line):
        encode_supervised(tokenizer, talk)


def test_a_function_call_and_a_reasoning_are_learned_as_their_newer_spellings(tokenizer):
    tokenizer.template = TEMPLATES["kimi_k2_thinking"]
    function = {"name": "add", "arguments": '{"a": 1}'}
    old = [
        TALK[1],
        {"role": "assistant", "content": None, "function_call": function, "reasoning": "hm"},
        {"role": "function", "name": "add", "content": "2"},
        {"role": "assistant", "content": "2", "reasoning": "done"},
    ]
    call = {"id": "functions.add:0", "type": "function", "function": function}
    new = [
        TALK[1],
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "name": "add", "tool_call_id": call["id"], "content": "2"},
        {"role": "assistant", "content": "2", "reasoning_content": "done"},
    ]
    assert learned(tokenizer, old) == learned(tokenizer, new)
    assert encode(tokenizer, old) == encode(tokenizer, new)
    assert "<think>hm</think>" in learned(tokenizer, old[:2])


def test_other_templates_are_refused(tokenizer):
    tokenizer.template = FolderTemplate({"default": "{{ messages[0].content }}"}, ["[EOS]"], "t")
    with pytest.raises(ConfigError, match="not one of Kimi's"):
        encode_supervised(tokenizer, TALK[4:])
    tokenizer.template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_supervised(tokenizer, TALK)
