"""What answers may be: sections of calls, thoughts, JSON, and when they must end."""

import json

import numpy as np
import pytest
from drive import BYTES, NAMED, draw, follow, tool

from k2jax.config import ConfigError
from k2jax.constrain import make_constraint
from k2jax.constrain.vocabulary import list_ids
from k2jax.text.reply import parse

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
OPEN, CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
END = "<|im_end|>"


def call(id_, arguments):
    return f"<|tool_call_begin|>{id_}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def ids(text, tokenizer=BYTES):
    return tokenizer.encode(text, special=True)


def required(**options):
    made = make_constraint(BYTES, tools=[tool(CITY)], tool_choice="required", **options)
    assert made is not None
    return made


PARIS, ROME = call("functions.get_weather:4", '{"city": "Paris"}'), '{"city":"Rom","unit":"C"}'


def test_a_section_may_have_several_calls_that_count_on():
    made = required(first_index=4)
    made.start(500)
    follow(made, ids(OPEN + PARIS + call("functions.get_weather:5", ROME) + CLOSE + END))


def test_parallel_off_and_a_named_function_are_one_call():
    for options in ({"parallel": False}, {}):
        choice = {"type": "function", "function": {"name": "get_weather"}}
        choice = choice if not options else "required"
        made = make_constraint(BYTES, tools=[tool(CITY)], tool_choice=choice, **options)
        made.start(500)
        follow(made, ids(OPEN + call("functions.get_weather:0", ROME)))
        assert list_ids(made.mask()).tolist() == ids(CLOSE)


def test_names_with_dots_hyphens_and_common_beginnings_are_told_apart():
    names = ["a", "a-b", "a-b.c", "ab"]
    tools = [tool(CITY, name) for name in names]
    for name in names:
        made = make_constraint(BYTES, tools=tools, tool_choice="required")
        made.start(300)
        answer = ids(OPEN + call(f"functions.{name}:0", ROME) + CLOSE + END)
        follow(made, answer)
        assert parse(BYTES, answer).calls[0].name == name


def test_control_tokens_never_stand_in_arguments():
    made = required()
    made.start(500)
    follow(made, ids(OPEN + call("functions.get_weather:0", "")[: -len("<|tool_call_end|>")]))
    follow(made, ids('{"city": "x'))
    assert max(list_ids(made.mask())) < 256
    follow(made, ids('"}'))
    assert list_ids(made.mask()).tolist()[-1] == ids("<|tool_call_end|>")[0]


def test_auto_is_free_until_a_section_begins():
    made = make_constraint(BYTES, tools=[tool(CITY)])
    made.start(400)
    follow(made, ids("<think>so</think>Let me look." + OPEN))
    assert list_ids(made.mask()).tolist() == ids("<|tool_call_begin|>")
    follow(made, ids(call("functions.get_weather:0", ROME) + CLOSE + END))


def test_auto_begins_no_section_that_cannot_be_completed():
    made = make_constraint(BYTES, tools=[tool(CITY)])
    made.start(60)
    section = ids(OPEN)[0]
    free = make_constraint(BYTES, tools=[tool(CITY)], tool_choice="required").least
    allowed = []
    for left in range(60, 0, -1):
        allowed.append((section in list_ids(made.mask())) == (left >= free))
        made.accept(65)
    assert all(allowed) and free == 40


def test_none_forbids_sections_and_nothing_else():
    made = make_constraint(BYTES, tools=[tool(CITY)], tool_choice="none")
    made.start(1)
    marks = {i for name, i in BYTES.specials.items() if "tool_call" in name}
    assert set(range(BYTES.vocab)) - set(list_ids(made.mask())) == marks


def test_nothing_to_constrain_makes_no_constraint():
    assert make_constraint(BYTES) is None
    assert make_constraint(BYTES, response_format={"type": "text"}) is None


@pytest.mark.parametrize("tokenizer", [BYTES, NAMED], ids=["text", "tokens"])
@pytest.mark.parametrize("opened", [False, True], ids=["own", "open"])
def test_a_thought_may_precede_a_forced_call_and_ends_in_time(tokenizer, opened):
    prompt = ids("<|im_assistant|>assistant<|im_middle|><think>" if opened else "Hi", tokenizer)
    for seed in range(12):
        made = make_constraint(
            tokenizer, tools=[tool(CITY)], tool_choice="required", thinking=True, prompt=prompt
        )
        tokens = made.least + (0 if seed < 3 else 5 * seed)
        mark = tokenizer.encode("<think>", special=True)
        out = draw(made, tokens, np.random.default_rng(seed), prefer=() if opened else mark)
        reply = parse(tokenizer, out, prompt)
        assert [c.complete for c in reply.calls] and reply.content == ""
        assert set(json.loads(reply.calls[0].arguments)) <= {"city", "unit"}
        assert opened or not reply.reasoning or out[: len(mark)] == mark


@pytest.mark.parametrize("thinking", [False, True])
def test_json_answers_end_in_time(thinking):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}
    for seed in range(8):
        made = make_constraint(BYTES, response_format=schema, thinking=thinking)
        out = draw(made, made.least + 3 * seed, np.random.default_rng(seed))
        assert set(json.loads(parse(BYTES, out).content)) <= {"city", "unit"}
        assert out[-1] in BYTES.stops


def test_json_object_is_any_object():
    made = make_constraint(BYTES, response_format={"type": "json_object"})
    made.start(200)
    follow(made, ids('{"a": [1, {"b\\n": null}], "c": -1.5e3}' + END))


def test_tools_and_a_format_leave_both_open():
    for answer in (ROME, OPEN + call("functions.get_weather:0", ROME) + CLOSE):
        made = make_constraint(
            BYTES,
            tools=[tool(CITY)],
            response_format={"type": "json_schema", "json_schema": {"schema": CITY}},
        )
        made.start(300)
        follow(made, ids(answer + END))


def test_white_space_is_bounded():
    made = make_constraint(BYTES, response_format={"type": "json_object"})
    made.start(5000)
    made.accept(ord("{"))
    written = []
    while space := [i for i in list_ids(made.mask()) if i in b" \n\t\r"]:
        written.append(int(space[0 if not written else -1]))
        made.accept(written[-1])
        assert len(written) < 40
    assert written


def test_too_few_tokens_are_refused_and_the_least_is_named():
    made = required()
    least = made.least
    with pytest.raises(ConfigError, match=f"has {least} tokens"):
        made.start(least - 1)
    out = draw(required(), least, np.random.default_rng(0))
    assert len(out) <= least and parse(BYTES, out).calls[0].complete


def test_the_least_is_the_least():
    """By hand: two marks, `functions.get_weather:0`, a mark, `{"city":""}`, two marks, the end."""
    text = 'functions.get_weather:0{"city":""}'
    assert required().least == len(text) + 5 + 1
