"""Calls are compared by value or by what they do, as the package `bfcl-eval` compares them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from k2jax.config import ConfigError
from k2jax.evals.bfcl import Bfcl, make_tools
from k2jax.evals.bfcl_check import Mismatch, check_call
from k2jax.evals.bfcl_values import convert_java, convert_script
from k2jax.evals.task import Answer, Call

FUNCTION = {
    "name": "shop.order",
    "description": "Order things.",
    "parameters": {
        "type": "dict",
        "properties": {
            "item": {"type": "string", "description": "What."},
            "count": {"type": "integer", "description": "How many."},
            "price": {"type": "float", "description": "Of one."},
            "colours": {"type": "array", "items": {"type": "string"}, "description": "Wanted."},
            "where": {"type": "dict", "description": "To."},
            "parts": {"type": "array", "items": {"type": "dict"}, "description": "Of it."},
        },
        "required": ["item"],
    },
}
RIGHT = {
    "shop.order": {
        "item": ["Red Chair", "chair"],
        "count": [2, ""],
        "price": [3.0, ""],
        "colours": [["red", "dark-blue"], ""],
        "where": [{"city": ["Bern", "Berne"], "zip": [3000, ""]}, ""],
        "parts": [[{"name": ["leg"]}, {"name": ["seat"]}], ""],
    }
}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"item": "red chair"}, ""),
        ({"item": "RED-CHAIR", "count": 2, "price": 3}, ""),
        ({"item": "chair", "colours": ["Red", "dark blue"]}, ""),
        ({"item": "chair", "where": {"city": "BERN"}}, ""),
        ({"item": "chair", "where": {"city": "Bern", "zip": 3000}}, ""),
        ({"item": "chair", "parts": [{"name": "leg"}, {"name": "Seat"}]}, ""),
        ({}, "'item' is required"),
        ({"item": "table"}, "'item' is 'table', not one of"),
        ({"item": 3}, "'item' is 3, not of type str"),
        ({"item": "chair", "count": 2.0}, "'count' is 2.0, not of type int"),
        ({"item": "chair", "count": True}, "'count' is True"),
        ({"item": "chair", "more": 1}, "'more' is not expected"),
        ({"item": "chair", "colours": ["dark blue", "red"]}, "'colours' is"),
        ({"item": "chair", "where": {"city": "Bern", "x": 1}}, "the key 'x' is not expected"),
        ({"item": "chair", "where": {"zip": 3000}}, "the key 'city' is missing"),
        ({"item": "chair", "parts": [{"name": "leg"}]}, "1 items, not 2"),
    ],
)
def test_a_call_is_compared_parameter_by_parameter(values, why):
    try:
        check_call(FUNCTION, {"shop.order": values}, RIGHT)
        assert why == ""
    except Mismatch as error:
        assert why and why in str(error)


def test_source_texts_of_other_languages_become_values():
    assert convert_java("12L", "long") == 12 and convert_java("12", "long") == "12"
    assert convert_java("1.5f", "float") == 1.5 and convert_java("true", "boolean") is True
    assert convert_java(
        'new ArrayList<String>(Arrays.asList("a", "b"))', "ArrayList", "String"
    ) == [
        "a",
        "b",
    ]
    assert convert_java("new int[] {1, 2}", "Array", "integer") == [1, 2]
    assert convert_java('new HashMap<String, Integer>() {{ put("a", 1); }}', "HashMap") == {"a": 1}
    assert convert_script("7n", "Bigint") == 7 and convert_script("'x'", "String") == "x"
    assert convert_script("[1, 'b', true]", "array") == [1, "b", True]
    assert convert_script("[[1, 2], [3]]", "array") == [[1, 2], [3]]
    assert convert_script("{a: 1, b: [2, 3]}", "dict") == {"a": 1, "b": [2, 3]}


def write(folder, category, functions, right=None):
    name = f"BFCL_v4_{category}.json"
    question = {
        "id": f"{category}_0",
        "question": [[{"role": "user", "content": "Order."}]],
        "function": functions,
    }
    (folder / name).write_text(json.dumps(question) + "\n")
    if right is not None:
        (folder / "possible_answer").mkdir(exist_ok=True)
        answer = {"id": f"{category}_0", "ground_truth": right}
        (folder / "possible_answer" / name).write_text(json.dumps(answer) + "\n")
    return Bfcl(folder / name)


def call(name="shop_order", **values):
    return Call(name, json.dumps(values))


def test_categories_count_calls_and_their_order_as_they_should(tmp_path):
    other = {"shop.order": {"item": ["table"]}}
    task = write(tmp_path, "parallel", [FUNCTION], [RIGHT, other])
    (item,) = task.items()
    assert item.ask.tools[0]["function"]["name"] == "shop_order"
    for calls, result in (
        ([call(item="table"), call(item="chair")], "passed"),
        ([call(item="chair"), call(item="chair")], "failed"),
        ([call(item="chair")], "failed"),
        ([Call("shop_order", "{")], "unparsed"),
    ):
        assert task.grade(item, [Answer(calls=tuple(calls))]).result == result
    task = write(tmp_path, "irrelevance", [FUNCTION])
    (item,) = task.items()
    assert task.grade(item, [Answer(text="There is no such function.")]).score == 1
    assert task.grade(item, [Answer(calls=(call(item="chair"),))]).score == 0
    task = write(tmp_path, "live_relevance", [FUNCTION])
    assert task.grade(task.items()[0], [Answer(calls=(call(item="chair"),))]).score == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        write(tmp_path, "multiple", [FUNCTION])


def test_tools_say_how_values_of_other_languages_are_written():
    described = {"a": {"type": "ArrayList", "items": {"type": "long"}, "description": "All."}}
    function = {"name": "f", "description": "F.", "parameters": {"properties": described}}
    (tool,) = make_tools([function], "simple_java")
    assert (
        tool["function"]["description"]
        == "F. Note that the provided function is in Java 8 SDK syntax."
    )
    assert tool["function"]["parameters"]["properties"]["a"] == {
        "type": "string",
        "description": "All. This is Java ArrayList type parameter in string representation. The"
        " list elements are of type long; they are not in string representation.",
    }
    (tool,) = make_tools([FUNCTION], "simple_python")
    types = {k: v["type"] for k, v in tool["function"]["parameters"]["properties"].items()}
    assert types["price"] == "number" and types["where"] == "object"


@pytest.fixture
def peer():
    """The comparison with the package, over the data that it carries."""
    pytest.importorskip("bfcl_eval")
    file = Path(__file__).parents[2] / "bench" / "bfcl.py"
    spec = importlib.util.spec_from_file_location("bench_bfcl", file)
    module = importlib.util.module_from_spec(spec)
    before = dict(sys.modules)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - set(before):
        if name.startswith("bfcl_eval"):
            del sys.modules[name]


def test_verdicts_are_those_of_the_package(peer):
    data, check = peer.load_peer()
    count = peer.compare(data, check)
    assert count["agree"] == count["gold"] + count["wrong"] > 10_000
    assert count["gold passed"] == count["gold"] - count["gold impossible"]
    assert count["gold impossible"] < 10 and count["wrong passed"] == 0
    count = peer.compare_turns(data, every=8)
    assert count["turns agree"] == count["turns"] >= 300
    assert count["turns gold passed"] == count["turns gold"] and not count["turns wrong passed"]


def test_a_conversation_is_carried_on_turn_by_turn(peer):
    data, _ = peer.load_peer()
    task = Bfcl(data / "BFCL_v4_multi_turn_miss_func.json")
    item = task.items()[0]
    answers, asked = [], [item.ask]
    for turn in item.target["expected"]:
        for calls in [turn] if turn else []:
            made = [peer.bfcl_turns._read_source(one) for one in calls]
            names = [_named(item, name, args, values) for name, args, values in made]
            tool_calls = [
                {"id": f"functions.{one.name}:{i}", "function": {"name": one.name}}
                for i, one in enumerate(names)
            ]
            message = {"role": "assistant", "content": "", "tool_calls": tool_calls}
            answers.append(Answer(calls=tuple(names), message=message))
            asked.append(task.follow_up(item, answers))
            assert asked[-1].messages[-1]["role"] == "tool"
        message = {"role": "assistant", "content": "Done."}
        answers.append(Answer(text="Done.", message=message))
        asked.append(task.follow_up(item, answers))
    assert asked[-1] is None and all(one is not None for one in asked[:-1])
    assert len(asked[-2].tools) > len(asked[0].tools)  # a function was held back at first
    assert task.grade(item, answers).result == "passed"
    assert task.grade(item, answers[1:]).result == "failed"
    endless = [answers[0]] * 21
    assert task.follow_up(item, endless[:-1]) is not None and task.follow_up(item, endless) is None
    assert "ended in turn 1" in task.grade(item, endless).reason


def _named(item, name, args, values):
    """A call with the names of its parameters."""
    entry = item.target["entry"]
    held = [one for all_ in entry["missed_function"].values() for one in all_]
    described = next(one for one in [*entry["function"], *held] if one["name"] == name)
    names = list(described["parameters"]["properties"])
    return Call(name, json.dumps(dict(zip(names, args, strict=False)) | values))
