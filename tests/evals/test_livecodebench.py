"""Contest problems: tests are read without running anything, outputs compared from outside."""

import base64
import json
import pickle
import zlib

import pytest

from k2jax.config import ConfigError
from k2jax.evals.contest_tests import Case, is_same_output, is_same_value, read_cases
from k2jax.evals.livecodebench import (
    LiveCodeBench,
    extract_code,
    read_custom_outputs,
    write_custom_outputs,
)
from k2jax.evals.task import Answer

SUM = {
    "question_id": "sum",
    "question_content": "Add the numbers.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "4 5", "output": "9.0", "testtype": "stdin"}]),
    "metadata": "{}",
}
PAIR = {
    "question_id": "pair",
    "question_content": "Return both.",
    "starter_code": "class Solution:\n    def pair(self, a: int, b: List[int]):\n        ",
    "public_test_cases": json.dumps(
        [{"input": "1\n[2, 3]", "output": "[1, [2, 3]]", "testtype": "functional"}]
    ),
    "private_test_cases": "[]",
    "metadata": json.dumps({"func_name": "pair"}),
}


def pack(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def code(text):
    return Answer(text=f"Here it is.\n```python\n{text}\n```\nDone.")


@pytest.fixture
def task(sandbox, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (SUM, PAIR)))
    return LiveCodeBench(path, sandbox)


def test_programs_are_graded_by_their_output(task):
    item = task.items()[0]
    assert "### Question:\nAdd the numbers." in item.ask.messages[1]["content"]
    right = "if __name__ == '__main__':\n    print(sum(map(int, input().split())))"
    assert task.grade(item, [code(right)]).result == "passed"
    wrong = task.grade(item, [code("print(3)")])
    assert (wrong.result, wrong.reason) == ("failed", "test 2 of 2: another output than expected")
    crashed = task.grade(item, [code("print(nothing)")])
    assert crashed.reason.startswith("test 1 of 2: NameError")
    assert task.grade(item, [Answer(text="print(3)")]).result == "unparsed"


def test_functions_are_graded_by_their_value(task):
    item = task.items()[1]
    assert PAIR["starter_code"] in item.ask.messages[1]["content"]
    method = "class Solution:\n    def pair(self, a, b):\n        print('x')\n        return (a, b)"
    assert task.grade(item, [code(method)]).result == "passed"
    assert task.grade(item, [code("def pair(a, b): return [a, b]")]).result == "passed"
    assert task.grade(item, [code("def pair(a, b): return [b, a]")]).result == "failed"
    fake = "import os\nos.write(1, b'\\n\\x01value\\x01[1, [2, 3]]')\nos._exit(0)"
    assert task.grade(item, [code(f"def pair(a, b):\n    return 0\n{fake}")]).result != "error"


def test_compressed_tests_are_read_and_nothing_is_loaded(tmp_path):
    text = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    assert read_cases(pack(text), "here") == [Case("1", "2", "stdin")]

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for value in (Evil(), [text], (text, text), 3):
        with pytest.raises(ConfigError, match="here has tests that cannot be unpacked"):
            read_cases(pack(value), "here")
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        read_cases("neither", "here")
    with pytest.raises(ConfigError, match="'testtype' is 'other'"):
        read_cases('[{"input": "", "output": "", "testtype": "other"}]', "here")


def test_outputs_are_compared_line_by_line_and_number_by_number():
    assert is_same_output("a \nb\n\n", "a\nb")
    assert is_same_output("1.0 2\n", "1 2.00")
    assert not is_same_output("1 2 3", "1 2")
    assert not is_same_output("yes", "no")
    assert not is_same_output("a\n\nb", "a\nb")
    assert is_same_value("[1, 2]", " [1,2]") and not is_same_value("x", "x")


def test_code_is_what_the_last_fences_hold():
    assert extract_code("```\na\n```\n```python\nb\nc\n```") == "b\nc"
    assert extract_code("```a") == ""


def test_files_of_the_custom_evaluator_go_out_and_in(task, tmp_path):
    path = tmp_path / "out.json"
    codes = {"sum": ["x", "y"], "pair": ["z"]}
    path.write_text(write_custom_outputs(codes))
    assert json.loads(path.read_text())[0] == {"question_id": "pair", "code_list": ["z"]}
    assert read_custom_outputs(path, ["sum", "pair"]) == codes
    sums = "print(sum(map(int, input().split())))"
    path.write_text(write_custom_outputs({"sum": [sums, "x"], "pair": ["def pair(*a): return a"]}))
    verdicts = {name: [v.score for v in each] for name, each in task.grade_file(path).items()}
    assert verdicts == {"sum": [1, 0], "pair": [1]}
    path.write_text('[["z"], ["x", "y"]]')
    assert read_custom_outputs(path, ["sum", "pair"]) == codes
    with pytest.raises(ConfigError, match="differ in 'more'"):
        path.write_text(write_custom_outputs(codes))
        read_custom_outputs(path, ["sum", "pair", "more"])
