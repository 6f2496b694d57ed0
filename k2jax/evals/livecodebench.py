"""LiveCodeBench's code generation: contest problems with stdin or function tests.

Fields of a problem: `question_id`, `question_title`, `question_content`, `starter_code`,
`public_test_cases`, `private_test_cases`, `metadata`. Prompts, extraction and comparison follow the
benchmark's runner; each test is a run of its own, graded by its output from outside the sandbox.
Source: [LCB] "LiveCodeBench: Holistic and Contamination Free Evaluation", 2403.07974.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.evals import code_runs
from k2jax.evals.contest_tests import Case, is_same_output, is_same_value, read_cases
from k2jax.evals.records import Record, digest_files, read_records, require_unique
from k2jax.evals.task import (
    FAILED,
    PASSED,
    UNPARSED,
    Answer,
    Generate,
    Item,
    Task,
    TaskSettings,
    Verdict,
)
from k2jax.sandbox import Limits, Outcome, Sandbox

SECONDS = 6.0  # of CPU, for each test
FILE = "custom_outputs.json"
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and"
    " will generate a correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your"
    " code within delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly"
    " test on the sample inputs). Enclose your code within delimiters as follows. Ensure that when"
    " the python program runs, it reads the inputs, runs the algorithm and writes output to STDOUT."
)
# What solutions of contests take for granted.
_STARRED = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
    "typing",
)
PRELUDE = "".join(f"from {name} import *\n" for name in _STARRED)
PRELUDE += "".join(f"import {name}\n" for name in _STARRED) + "sys.setrecursionlimit(50000)\n"
# Calls the function and prints what it returns as JSON, after all that it prints itself.
CALL = """
def _k2jax_call():
    import json, sys
    arguments = [json.loads(line) for line in sys.stdin.read().split("\\n") if line]
    scope = globals()
    owner = scope["Solution"]() if "Solution" in scope else None
    function = getattr(owner, {name!r}) if owner is not None else scope[{name!r}]
    value = function(*arguments)
    print("\\n{mark}" + json.dumps(value))
_k2jax_call()
"""
MARK = "\x01value\x01"  # before the value that a function returns


class LiveCodeBench(Task):
    """A release of LiveCodeBench's code generation problems."""

    settings = TaskSettings(max_new_tokens=8192)

    def __init__(self, path: str | Path, sandbox: Sandbox | None = None):
        """Read problems.

        Args:
            path: JSON lines.
            sandbox: where programs run; None: this process's.

        Raises:
            ConfigError: the file is missing or malformed, or programs cannot be isolated here.
        """
        records = read_records(path, ("question_id", "question_content"))
        self.name, self._sandbox = "livecodebench", sandbox or code_runs.shared_sandbox()
        self._items = [_make_item(record) for record in records]
        require_unique([item.id for item in self._items], path)
        self.digest = digest_files(path, more=f"{SYSTEM}{WITH_STARTER}{WITHOUT_STARTER}{SECONDS}")

    def items(self) -> Sequence[Item]:
        """All problems, in the order of the file."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Run the answer's program on all tests; the first that fails decides."""
        code = extract_code(answers[-1].text)
        if not code.strip():
            return Verdict(0.0, UNPARSED, "", "no code between a pair of ``` lines")
        return self.grade_code(item, code)

    def grade_code(self, item: Item, code: str) -> Verdict:
        """Run a program on all tests of a problem."""
        for number, test in enumerate(item.target["tests"], start=1):
            verdict = run_test(code, test, item.target["function"], self._sandbox)
            if verdict.result != PASSED:
                reason = f"test {number} of {len(item.target['tests'])}: {verdict.reason}"
                return Verdict(0.0, verdict.result, code, reason)
        return Verdict(1.0, PASSED, code)

    def grade_file(self, path: str | Path, threads: int = 2) -> dict[str, list[Verdict]]:
        """Grade the programs of a `custom_evaluator` file; verdicts by `question_id`.

        Raises:
            ConfigError: the file is malformed, or its problems are others.
        """
        codes = read_custom_outputs(path, [item.id for item in self._items])
        with ThreadPoolExecutor(threads) as pool:
            return {
                item.id: list(pool.map(functools.partial(self.grade_code, item), codes[item.id]))
                for item in self._items
            }

    def write_files(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, str]:
        """The programs as LiveCodeBench's `custom_evaluator` reads them."""
        codes = {id_: [one.extracted for one in all_] for id_, all_ in verdicts.items()}
        return {FILE: write_custom_outputs(codes)}


def extract_code(text: str) -> str:
    """What is between the last two lines with ```; "" if there are fewer."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def write_custom_outputs(codes: Mapping[str, Sequence[str]]) -> str:
    """Programs by `question_id`, as the file that `custom_evaluator` takes."""
    entries = [{"question_id": name, "code_list": list(all_)} for name, all_ in codes.items()]
    return json.dumps(sorted(entries, key=lambda entry: entry["question_id"]), indent=1) + "\n"


def read_custom_outputs(path: str | Path, ids: Sequence[str]) -> dict[str, list[str]]:
    """Programs by `question_id` from a `custom_evaluator` file.

    Args:
        path: objects with `question_id` and `code_list`, or lists of programs in the order of
            sorted ids.
        ids: of all problems; the file must have each once.

    Raises:
        ConfigError: the file is malformed, or its problems are others.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    codes: dict[str, Any] = {}
    if isinstance(entries, list) and all(isinstance(entry, list) for entry in entries):
        if len(entries) != len(ids):
            raise ConfigError(f"{path} has {len(entries)} lists of programs, not {len(ids)}")
        codes = dict(zip(sorted(ids), entries, strict=True))
    elif isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        codes = {str(one.get("question_id")): one.get("code_list") for one in entries}
    missing = sorted(set(ids) ^ set(codes))
    if missing:
        raise ConfigError(f"{path} and the problems differ in {missing[0]!r}")
    for name, all_ in codes.items():
        if not isinstance(all_, list) or not all(isinstance(code, str) for code in all_):
            raise ConfigError(f"{path}: the code_list of {name!r} is not a list of programs")
    return codes


def run_test(code: str, test: Case, function: str, sandbox: Sandbox) -> Verdict:
    """Run a program on one test.

    Args:
        code: the solution.
        test: input, expected output, and of which kind.
        function: that is called, where the test is of a function.
        sandbox: where it runs.
    """
    limits = code_runs.limit_time(SECONDS, Limits(output=16 << 20))
    program = PRELUDE + code
    if test.kind == "functional":
        program += CALL.format(name=function, mark=MARK)
    outcome = sandbox.run_python(program, test.input, limits)
    if not outcome.is_ok:
        return code_runs.to_verdict(outcome, False, code)
    return _compare(outcome, test, code)


def _compare(outcome: Outcome, test: Case, code: str) -> Verdict:
    printed = outcome.stdout.decode("utf-8", "replace")
    if test.kind == "functional":
        _, mark, value = printed.rpartition(f"\n{MARK}")
        equal = bool(mark) and is_same_value(value, test.output)
    else:
        equal = is_same_output(printed, test.output)
    if equal:
        return Verdict(1.0, PASSED, code)
    return Verdict(0.0, FAILED, code, "another output than expected")


def _make_item(record: Record) -> Item:
    tests = [
        *read_cases(record.text("public_test_cases", "[]"), record.place),
        *read_cases(record.text("private_test_cases", "[]"), record.place),
    ]
    if not tests:
        raise ConfigError(f"{record.place} has no tests")
    try:
        function = json.loads(record.text("metadata", "{}")).get("func_name", "")
    except (ValueError, AttributeError):
        raise ConfigError(f"{record.place}: 'metadata' is not a JSON object") from None
    if not function and any(test.kind == "functional" for test in tests):
        raise ConfigError(
            f"{record.place}: its tests call a function, but no 'func_name' says which"
        )
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": _ask(record)})
    target = {"tests": tests, "function": function}
    return Item(record.text("question_id"), Generate(messages=messages), target)


def _ask(record: Record) -> str:
    starter = record.text("starter_code", "")
    kind = WITH_STARTER if starter else WITHOUT_STARTER
    code = starter or "# YOUR CODE HERE"
    return (
        f"### Question:\n{record.text('question_content')}\n\n### Format: {kind}\n"
        f"```python\n{code}\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    )
