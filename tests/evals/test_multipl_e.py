"""Problems of MultiPL-E run in their language; one without a compiler is named."""

import json
import shutil

import pytest

from k2jax.config import ConfigError
from k2jax.evals.multipl_e import MultiplE
from k2jax.evals.task import Answer

PYTHON = {
    "name": "double",
    "language": "py",
    "prompt": "def double(x):\n",
    "tests": "assert double(2) == 4\n",
    "stop_tokens": ["\ndef"],
}
SCRIPT = {
    "name": "double",
    "language": "js",
    "prompt": "function double(x){\n",
    "tests": "const assert = require('node:assert');\nassert.deepEqual(double(2), 4);\n",
    "stop_tokens": ["\nfunction ", "\n//"],
}
SHELL = {
    "name": "double",
    "language": "sh",
    "prompt": "double() {\n",
    "tests": '}\n[ "$(double 2)" = 4 ] || exit 1\n',
    "stop_tokens": ["\n}"],
}


def write(path, *problems):
    path.write_text("".join(json.dumps(one) + "\n" for one in problems))
    return path


def test_programs_are_cut_at_their_stops_and_run(sandbox, tmp_path):
    task = MultiplE(write(tmp_path / "a.jsonl", PYTHON, SHELL), sandbox)
    python, shell = task.items()
    assert python.ask.prompt == PYTHON["prompt"] and task.name == "multipl-e-py-sh"
    right = task.grade(python, [Answer(text="    return 2 * x\ndef other(:\n")])
    wrong = task.grade(python, [Answer(text="    return x\n")])
    assert (right.result, wrong.result, wrong.reason) == ("passed", "failed", "AssertionError")
    assert task.grade(shell, [Answer(text="echo $(($1 * 2))\n}\nexit 0")]).result == "passed"
    assert task.grade(shell, [Answer(text="exit 0")]).result == "failed"
    assert task.summarise({"py/double": [right, wrong]}) == {"py": 0.5}


@pytest.mark.skipif(not shutil.which("node", path="/usr/local/bin:/usr/bin:/bin"), reason="no node")
def test_javascript_runs_and_leaving_early_is_not_passing(sandbox, tmp_path):
    task = MultiplE(write(tmp_path / "a.jsonl", SCRIPT), sandbox)
    (item,) = task.items()
    texts = {
        "  return 2 * x;\n}\n// more": "passed",
        "  return x;\n}\n": "failed",
        "  return 2 * x;\n}\nprocess.exit(0);\n": "failed",
    }
    for text, result in texts.items():
        assert task.grade(item, [Answer(text=text)]).result == result


def test_a_language_without_its_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path="": None)
    with pytest.raises(ConfigError, match="problems in 'js' need node"):
        MultiplE(write(tmp_path / "a.jsonl", SCRIPT))
    with pytest.raises(ConfigError, match="line 1 is in 'jss', which cannot be run"):
        MultiplE(write(tmp_path / "b.jsonl", {**SCRIPT, "language": "jss"}))
    with pytest.raises(ConfigError, match="two problems 'py/double'"):
        MultiplE(write(tmp_path / "c.jsonl", PYTHON, PYTHON))
