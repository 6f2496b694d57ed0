"""Boxed answers are read and compared as mathematics."""

import json
import threading

import pytest

from k2jax.config import ConfigError
from k2jax.evals import math_judge
from k2jax.evals.math_answers import MathAnswers, extract_boxed
from k2jax.evals.task import Answer


class Same:
    """Compares answers as texts without blanks; takes too long where one is "slow"."""

    version = "none"

    def are_equal(self, target, answer):
        return None if answer == "slow" else target.replace(" ", "") == answer.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"the set \boxed{\{1, 2\}}.", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4, which was cut off", "3"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 8$.", "8"),
        ("8", None),
        (r"\boxed{", None),
        (r"\boxedness", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text, answer):
    assert extract_boxed(text) == answer


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "math.jsonl"
    problems = [
        {"problem": "1+1?", "answer": "2", "subject": "Sums", "level": 1, "unique_id": "a"},
        {"problem": "1+2?", "solution": r"It is \boxed{3}.", "subject": "Sums", "unique_id": "b"},
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in problems))
    return path


def test_problems_are_asked_and_graded(file):
    task = MathAnswers(file, Same())
    first, second = task.items()
    assert first.ask.messages[0]["content"].startswith("1+1?\n")
    assert r"\boxed{}" in first.ask.messages[0]["content"]
    verdicts = [
        task.grade(item, [Answer(text=text)])
        for item, text in (
            (first, r"\boxed{2}"),
            (second, r"\boxed{2}"),
            (first, "2"),
            (first, r"\boxed{slow}"),
        )
    ]
    assert [one.result for one in verdicts] == ["passed", "failed", "unparsed", "timed out"]
    assert verdicts[1].reason == "'2' is not '3'" and verdicts[1].extracted == "2"
    by_kind = task.summarise({"a": verdicts[:1], "b": verdicts[1:2]})
    assert by_kind == {"level: 1": 1.0, "subject: Sums": 0.5}


def test_a_problem_without_an_answer_is_named(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text('{"problem": "1+1?", "solution": "two"}\n')
    with pytest.raises(ConfigError, match=r"line 1: its solution has no"):
        MathAnswers(path, Same())


def test_without_the_package_one_line_says_what_to_install(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'k2jax\[eval\]'"):
        MathAnswers(file)


def test_the_package_judges_in_any_thread_and_cannot_hang():
    pytest.importorskip("math_verify")
    judge = math_judge.Judge(seconds=20.0)
    pairs = [(r"\frac{1}{2}", "0.5", True), ("(1,2)", "(1, 2)", True), ("12", "13", False)]
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(judge.are_equal(a, b) == same for a, b, same in pairs)
    )
    thread.start()
    thread.join(200)
    assert results == [True, True, True]
    judge._seconds = 1.0
    assert judge.are_equal("9^{9^{9^{9}}}", "3") is None
    judge._seconds = 60.0
    assert judge.are_equal("1", "1.0") is True  # a new process
    judge.close()
