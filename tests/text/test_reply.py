"""What a model said, from ids in any portions (spec 5.3)."""

import random

import pytest

from k2jax.text import deepseek
from k2jax.text.incremental_decode import TextStream
from k2jax.text.kimi_template import KIMI_K2, TEMPLATES, encode, to_text
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.reply import Delta, ReplyStream, parse

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
NAMED = Tokenizer({bytes([i]): i for i in range(256)}, {278: "<think>", 279: "</think>"})


def ids(text, tokenizer=BYTES):
    return tokenizer.encode(text, special=True)


def call(id_, arguments):
    return f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def section(*calls):
    return "<|tool_calls_section_begin|>" + "".join(calls) + "<|tool_calls_section_end|>"


def said(deltas, kind, number=-1):
    return "".join(d.text for d in deltas if (d.kind, d.call) == (kind, number))


PARIS, ROME = '{"city": "Paris"}', '{"city": "R\u00f6m"}'
SAID = (
    "<think>both</think>I look.\u6f22"
    + section(call("functions.get_weather:0", PARIS), call(" functions.a-b.c:11 ", f" {ROME}\n"))
    + "<|im_end|>ignored"
)


def test_text_thought_and_calls_are_told_apart():
    reply = parse(BYTES, ids(SAID))
    assert (reply.reasoning, reply.content) == ("both", "I look.\u6f22")
    assert reply.calls[0] == ("functions.get_weather:0", "get_weather", PARIS, True)
    # Hyphens and dots stay in the name (trap 27).
    assert reply.calls[1] == ("functions.a-b.c:11", "a-b.c", ROME, True)


@pytest.mark.parametrize("tokenizer", [BYTES, NAMED])
def test_any_portions_give_the_same_and_nothing_is_taken_back(tokenizer):
    all_ids, whole = ids(SAID, tokenizer), parse(tokenizer, ids(SAID, tokenizer))
    rng = random.Random(0)
    for _ in range(50):
        stream, at, deltas = ReplyStream(tokenizer), 0, []
        while at < len(all_ids):
            step = rng.choice([1, 1, 2, 3, 17])
            deltas += stream.feed(all_ids[at : at + step])
            at += step
        deltas += stream.close()
        assert stream.reply() == whole
        assert (said(deltas, "reasoning"), said(deltas, "content")) == whole[1::-1]
        assert [said(deltas, "call", n) for n in (0, 1)] == [c.id for c in whole.calls]
        assert [said(deltas, "arguments", n).strip() for n in (0, 1)] == [PARIS, ROME]
        assert "\ufffd" not in "".join(d.text for d in deltas)


def test_an_answer_goes_back_into_a_conversation_as_it_came():
    message = parse(
        BYTES, ids(SAID.replace(" functions", "functions").replace(":11 ", ":1"))
    ).message()
    talk = [{"role": "user", "content": "?"}, message]
    text = to_text(TEMPLATES["kimi_k2_thinking"].parts(talk, prompt=False))
    assert text.endswith(
        "<|im_middle|><think>both</think>I look.\u6f22"
        + section(call("functions.get_weather:0", PARIS), call("functions.a-b.c:1", ROME))
        + "<|im_end|>"
    )


def test_text_that_spells_control_tokens_stays_text():
    spelled = BYTES.encode("see " + section(call("functions.f:0", "{}")))
    reply = parse(BYTES, spelled)
    assert reply.content == BYTES.decode(spelled) and not reply.calls


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<thin", "<thin", ""),
        ("<thinking>x", "<thinking>x", ""),
        ("a <think>b</think>", "a <think>b</think>", ""),
        ("\n<think>b</thin", "", "b</thin"),
        ("<think>a</think></think>b", "</think>b", "a"),
        ("  ", "  ", ""),
        ("", "", ""),
    ],
)
def test_only_a_thought_at_the_start_is_one(text, content, reasoning):
    assert parse(BYTES, BYTES.encode(text))[:2] == (content, reasoning)


def test_a_thought_may_begin_in_the_prompt():
    prompt = [*encode(BYTES, []), *BYTES.encode("<think>")]
    assert parse(BYTES, BYTES.encode("hm</think>yes"), prompt)[:2] == ("yes", "hm")
    closed = [*prompt, *BYTES.encode("</think>")]
    assert parse(BYTES, BYTES.encode("yes"), closed)[:2] == ("yes", "")


def test_a_call_that_was_cut_off_is_reported_and_left_out_of_the_message():
    cut = "look" + section(call("functions.f:0", "{}")).removesuffix("<|tool_calls_section_end|>")
    cut += '<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{"a'
    reply = parse(BYTES, ids(cut))
    assert [c.complete for c in reply.calls] == [True, False]
    assert reply.calls[1].arguments == '{"a'
    assert [c["function"]["name"] for c in reply.message()["tool_calls"]] == ["f"]
    only_id = parse(BYTES, ids("<|tool_calls_section_begin|><|tool_call_begin|>func"))
    assert only_id.calls[0][:3] == ("func", "func", "") and "tool_calls" not in only_id.message()


def test_nonsense_neither_fails_nor_invents_calls():
    rng = random.Random(1)
    tokens = [*range(97, 100), *(BYTES.specials[n] for n in BYTES.specials if "tool" in n)]
    for _ in range(300):
        reply = parse(BYTES, rng.choices(tokens, k=12))
        assert len(reply.message()) <= 3


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Let me look." + call("functions.f:0", '{"a": 1}'), "Let me look."),
        ("a" + call("functions.f:0", "{}") + "b", "ab"),
        ("a<|tool_call_begin|>functions.f:0<|tool_call_end|>b", "ab"),
        ('a<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>b', "ab"),
        ("a<|tool_call_begin|>functions.f:0", "a"),
        ("a<|im_assistant|>assistant<|im_middle|>b", "ab"),
        ("<|im_assistant|>assistant<|im_middle|><think>t</think>b", "b"),
        ("a<|im_system|>tool<|im_middle|>## Return of functions.f:0\n1", "a"),
        (
            "a<|tool_calls_section_begin|>x<|tool_call_argument_begin|>{}<|tool_call_end|>"
            "<|tool_calls_section_end|>b",
            "ab",
        ),
    ],
)
def test_what_stray_marks_enclose_is_neither_content_nor_a_call(text, content):
    """That a call outside of a section is no call is this project's decision."""
    reply = parse(BYTES, ids(text))
    assert (reply.content, reply.calls) == (content, ())


def test_a_call_without_arguments_ends_at_its_mark():
    begun = "<|tool_call_begin|>functions.f:0<|tool_call_end|>\n"
    reply = parse(BYTES, ids(section(begun, call("functions.g:1", "{}"))))
    assert [(c.id, c.complete) for c in reply.calls] == [
        ("functions.f:0", False),
        ("functions.g:1", True),
    ]


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        ("functions.get_weather", "get_weather"),
        ("functions.f\n:0", "f"),
        ("f:0", "f"),
        ("functions.ns:tool", "ns:tool"),
        ("functions.ns:tool:3", "ns:tool"),
        ("f", "f"),
        ("functions.a.b:1", "a.b"),
        (" functions.f : 0 ", "f"),
        ("functions.f:\u0663", "f:\u0663"),
        ("functions.f:-1", "f:-1"),
        ("functions.functions.f:0", "functions.f"),
    ],
)
def test_the_name_of_a_call_is_its_id_without_prefix_and_index(id_, name):
    assert parse(BYTES, ids(section(call(id_, "{}")))).calls[0].name == name


@pytest.mark.parametrize("id_", ["", "functions.:0", " :0", "functions."])
def test_a_call_of_no_function_is_not_complete(id_):
    reply = parse(BYTES, ids(section(call(id_, "{}"))))
    assert not reply.calls[0].complete and "tool_calls" not in reply.message()


def test_what_follows_the_section_is_content():
    reply = parse(BYTES, ids("a" + section(call("functions.f:0", "{}")) + "b"))
    assert reply.content == "ab" and len(reply.calls) == 1


def test_deltas_name_their_call():
    stream = ReplyStream(BYTES)
    found = stream.feed(ids(section(call("functions.f:0", "{"), call("functions.f:1", "["))))
    assert found == [
        Delta("call", "functions.f:0", 0),
        Delta("arguments", "{", 0),
        Delta("call", "functions.f:1", 1),
        Delta("arguments", "[", 1),
    ]


def test_streamed_text_is_the_decoded_text_and_never_half_a_character():
    rng = random.Random(2)
    for _ in range(200):
        raw = "".join(rng.choices(["a", "\u00e9", "\u6f22", "\U0001f600"], k=6)).encode()
        if rng.random() < 0.5:
            raw = bytes(rng.choices(raw + b"\xff\xe6", k=12))
        stream = TextStream(BYTES)
        shown = [stream.feed([byte]) for byte in raw]
        assert "".join(shown) + stream.close() == BYTES.decode(raw)
    stream = TextStream(BYTES)
    assert [stream.feed([byte]) for byte in "\u6f22".encode()] == ["", "", "\u6f22"]


def test_kimi_stops_at_both_ends():
    """Trap 23: configs name [EOS], chats end with <|im_end|>."""
    assert BYTES.stops == (BYTES.specials["[EOS]"], BYTES.specials["<|im_end|>"])
    for name in ("[EOS]", "<|im_end|>"):
        assert parse(BYTES, ids(f"a{name}b")).content == "a"
    assert to_text(KIMI_K2.parts([])).endswith("<|im_assistant|>assistant<|im_middle|>")


D = deepseek
DEEPSEEK = [D.CALLS, D.END_CALLS, D.CALL, D.END_CALL, D.SEPARATOR, "<think>", "</think>"]
V3 = Tokenizer({bytes([i]): i for i in range(256)}, dict(enumerate(DEEPSEEK, 270)))
TICKS = '{"code": "```json\\n```", "n": "\u6f22"}'


def v3(name, arguments):
    return f"{D.CALL}function{D.SEPARATOR}{name}\n```json\n{arguments}\n```{D.END_CALL}"


def v3_1(name, arguments):
    return f"{D.CALL}{name}{D.SEPARATOR}{arguments}{D.END_CALL}"


@pytest.mark.parametrize("form", [v3, v3_1])
def test_deepseeks_calls_in_any_portions(form):
    assert D.CALL == "<\uff5ctool\u2581call\u2581begin\uff5c>"
    calls = form("get_weather", PARIS) + "\n" + form("a-b.c", TICKS) + form("function", "{}")
    said_ids = ids(f"<think>hm</think>I look.{D.CALLS}{calls}{D.END_CALLS}", V3)
    prompt = ids("Hi" + form("past", "{}"), V3)  # ids count on over the whole conversation
    whole = parse(V3, said_ids, prompt)
    assert (whole.reasoning, whole.content) == ("hm", "I look.")
    assert [tuple(call) for call in whole.calls] == [
        ("functions.get_weather:1", "get_weather", PARIS, True),
        ("functions.a-b.c:2", "a-b.c", TICKS, True),
        ("functions.function:3", "function", "{}", True),
    ]
    rng = random.Random(0)
    for _ in range(20):
        stream, at, deltas = ReplyStream(V3, prompt), 0, []
        while at < len(said_ids):
            step = rng.choice([1, 1, 2, 3, 17])
            deltas += stream.feed(said_ids[at : at + step])
            at += step
        deltas += stream.close()
        assert stream.reply() == whole
        for number, call in enumerate(whole.calls):
            assert said(deltas, "call", number) == call.id
            assert said(deltas, "arguments", number).strip() == call.arguments


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (f"function{D.SEPARATOR}f\n{PARIS}\n", PARIS),  # without a fence
        (f"function{D.SEPARATOR}f\n```json\n{PARIS}\n```\n", PARIS),
        (f"function{D.SEPARATOR}f\n```json\n{PARIS}", PARIS),
        (f"function{D.SEPARATOR} f \n\n```json\n\n```", ""),
    ],
)
def test_deepseeks_calls_with_other_white_space_and_fences(text, arguments):
    reply = parse(V3, ids(f"{D.CALLS}{D.CALL}{text}{D.END_CALL}", V3))
    assert [tuple(call) for call in reply.calls] == [("functions.f:0", "f", arguments, True)]


@pytest.mark.parametrize(
    "rest", ["", "f", "f\n", "f\n```js", "f\n```json\n{", "f\n```json\n{}\n```"]
)
def test_a_call_of_deepseeks_that_was_cut_off_is_left_out_of_the_message(rest):
    reply = parse(V3, ids(f"{D.CALLS}{D.CALL}function{D.SEPARATOR}{rest}", V3))
    assert [call.complete for call in reply.calls] == [False]
    assert "tool_calls" not in reply.message()


def test_a_stop_text_ends_the_content_alone():
    said_ids = ids("<think>a STOP b</think>c" + section(call("functions.f:0", '{"a": "STOP"}')))
    reply = parse(BYTES, said_ids)
    stream = ReplyStream(BYTES, stop=("STOP",))
    stream.feed([*said_ids, *ids("d STOP e")])
    assert stream.ended and stream.stopped_by == "STOP"
    assert stream.reply() == reply._replace(content="cd ")
    assert stream.close() == [] and stream.feed(ids("f")) == []


def test_what_may_become_a_stop_text_is_held_back_until_a_control_token():
    stream = ReplyStream(BYTES, stop=("STOP",))
    assert said(stream.feed(ids("a ST")), "content") == "a "
    deltas = stream.feed(ids(section(call("functions.f:0", "{}"))))
    assert deltas[0] == Delta("content", "ST") and not stream.ended
