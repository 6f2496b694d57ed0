"""Conversations are checked as programs are: keys, references, ids."""

import pytest

from k2jax.config import ConfigError
from k2jax.text.kimi_template import encode
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.messages import check_messages, renumber_calls

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
USER = {"role": "user", "content": "1+1?"}


def call(id_, name="f", **other):
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}, **other}


def asks(*calls):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def result(id_):
    return {"role": "tool", "tool_call_id": id_, "content": "r"}


def error_of(*messages) -> str:
    with pytest.raises(ConfigError) as error:
        encode(BYTES, list(messages))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    wrong = {"role": "assistant", "content": "2", "tool_call": []}
    assert error_of(USER, wrong).startswith("messages[1] has the key 'tool_call'; did you mean")
    assert "[0] has the key 'args'" in error_of(asks(call("a", args={})))
    function = {"name": "f", "arguments": "{}", "parameters": {}}
    assert "function has the key 'parameters'" in error_of(asks({"id": "a", "function": function}))
    part = {"type": "text", "text": "x", "cache": 1}
    assert "content[0] has the key 'cache'" in error_of({"role": "user", "content": [part]})


def test_a_member_that_is_null_counts_as_absent():
    """As Arrow fills them in, and as servers write `refusal`."""
    filled = {"role": "user", "content": "hi", "tool_calls": None, "refusal": None, "name": None}
    assert check_messages([filled]) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ({"role": "user", "content": "", "weight": 0}, "only an assistant's message has that"),
        ({"role": "assistant", "content": "", "weight": 0.5}, "weight is 0.5; it must be 0 or 1"),
        ({"role": "user", "content": "", "reasoning": "x"}, "only an assistant's message"),
        ({"role": "assistant", "content": "", "tool_call_id": "x"}, "only a tool's message"),
        ({"role": "assistant", "reasoning": "x", "reasoning_content": "y"}, "another 'reasoning_"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "arguments must be"),
        ({"role": "assistant", "tool_calls": [call("a", index=1)]}, "index is not 0"),
        ({"role": "assistant", "tool_calls": [{**call("a"), "type": "web"}]}, "the type 'web'"),
        ({"role": "assistant", "tool_calls": [call("a", " ")]}, "needs a 'name'"),
        ({"role": "function", "name": "f", "content": ""}, "no call precedes it"),
        ({"role": "user", "content": [{"type": "image", "text": "x"}]}, "is 'image'"),
    ],
)
def test_what_a_message_cannot_mean_is_refused(message, line):
    assert line in error_of(message)


def test_every_result_belongs_to_one_call_before_it():
    assert "messages[1] is the result of 'b'" in error_of(asks(call("a")), result("b"))
    assert "messages[0] is the result of 'a', which is no call's" in error_of(
        result("a"), asks(call("a"))
    )
    assert "has a result already" in error_of(asks(call("a")), result("a"), result("a"))


def test_ids_are_unique_in_a_turn_and_may_come_again_in_another():
    assert "messages[0] has two tool calls with the id 'a'" in error_of(asks(call("a"), call("a")))
    talk = [asks(call("a")), result("a"), asks(call("a", "g"), call("b")), result("b"), result("a")]
    ids = [m["tool_call_id"] for m in renumber_calls(check_messages(talk)) if m["role"] == "tool"]
    assert ids == ["functions.f:0", "functions.f:2", "functions.g:1"]


@pytest.mark.parametrize(
    "ids",
    [
        ("functions.f:0", "functions.f:0"),  # counted in each turn
        ("functions.f:1", "functions.f:0"),
        ("functions.g:0", "functions.f:1"),  # of another function
        ("functions.f:00", "functions.f:1"),
        ("functions.f", "functions.f:1"),
        ("call_1", "call_2"),
    ],
)
def test_indices_run_over_the_conversation_and_name_the_function_called(ids):
    first, second = ids
    talk = [asks(call(first)), result(first), asks(call(second)), result(second)]
    renamed = renumber_calls(check_messages(talk))
    assert [m["tool_calls"][0]["id"] for m in renamed[::2]] == ["functions.f:0", "functions.f:1"]
    assert [m["tool_call_id"] for m in renamed[1::2]] == ["functions.f:0", "functions.f:1"]
    assert renumber_calls(renamed) == renamed


def test_results_without_ids_belong_to_the_calls_of_their_function_in_order():
    said = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    answer = {"role": "function", "name": "f", "content": "r"}
    talk = renumber_calls(check_messages([said, answer, said, answer]))
    assert [m["tool_call_id"] for m in talk[1::2]] == ["functions.f:0", "functions.f:1"]
