"""MultiPL-E: HumanEval and MBPP in other languages, completed and run in the sandbox.

Fields of a problem: `name`, `language`, `prompt`, `tests`, `stop_tokens`. A program is the prompt,
the completion up to the first stop, and the tests. Source: [MPLE] "MultiPL-E: A Scalable and
Extensible Approach to Benchmarking Neural Code Generation", 2208.08227.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from k2jax.config import ConfigError, nearest
from k2jax.evals import code_runs
from k2jax.evals.records import Record, digest_files, read_records, require_unique
from k2jax.evals.task import ERROR, Answer, Generate, Item, Task, TaskSettings, Verdict
from k2jax.sandbox import Limits, Sandbox

SEARCH = "/usr/local/bin:/usr/bin:/bin"  # of programs in the sandbox
LIMITS = code_runs.limit_time(15, Limits(memory=2 << 30, disk=256 << 20, processes=64))


class Language(NamedTuple):
    """How a program of a language runs.

    Attributes:
        needs: programs that must be there.
        file: its name.
        command: for the shell; empty: the sandbox runs it as Python itself.
        ending: a last line that prints TOKEN, so that leaving early is not passing; "" where the
            tests are the main program.
    """

    needs: tuple[str, ...]
    file: str
    command: str
    ending: str = ""


LANGUAGES = {
    "py": Language((), "main.py", ""),
    "js": Language(("node",), "main.js", "node main.js", '\nconsole.log("TOKEN");'),
    "ts": Language(
        ("node", "tsc"),
        "main.ts",
        "tsc --target es2020 --module commonjs main.ts; node main.js",
        '\nconsole.log("TOKEN");',
    ),
    "sh": Language(("bash",), "main.sh", "bash main.sh", "\necho TOKEN"),
    "pl": Language(("perl",), "main.pl", "perl main.pl"),
    "rb": Language(("ruby",), "main.rb", "ruby main.rb"),
    "php": Language(("php",), "main.php", "php main.php"),
    "lua": Language(("lua",), "main.lua", "lua main.lua"),
    "r": Language(("Rscript",), "main.r", "Rscript main.r", '\ncat("TOKEN")'),
    "jl": Language(("julia",), "main.jl", "julia main.jl", '\nprintln("TOKEN")'),
    "cpp": Language(("g++",), "main.cpp", "g++ -std=c++17 main.cpp -o main && ./main"),
    "rs": Language(("rustc",), "main.rs", "rustc main.rs -o main && ./main"),
    "go": Language(("go",), "main_test.go", "GOCACHE=/tmp/cache go test main_test.go"),
    "d": Language(("rdmd",), "main.d", "rdmd -unittest main.d"),
    "swift": Language(("swiftc",), "main.swift", "swiftc main.swift -o main && ./main"),
    "rkt": Language(("racket",), "main.rkt", "racket main.rkt"),
    "hs": Language(("ghc",), "main.hs", "ghc -v0 main.hs -o main && ./main"),
}
ALIASES = {"python": "py", "javascript": "js", "typescript": "ts", "bash": "sh", "c++": "cpp"}
ALIASES |= {"perl": "pl", "ruby": "rb", "julia": "jl", "rust": "rs", "go_test.go": "go"}


class MultiplE(Task):
    """A file of MultiPL-E: one language or several."""

    def __init__(self, path: str | Path, sandbox: Sandbox | None = None):
        """Read problems and see that their languages can be run.

        Args:
            path: JSON lines.
            sandbox: where programs run; None: this process's.

        Raises:
            ConfigError: the file is missing or malformed, a language's compiler is not there, or
                programs cannot be isolated here.
        """
        records = read_records(path, ("name", "language", "prompt", "tests"))
        self._items = [_make_item(record) for record in records]
        require_unique([item.id for item in self._items], path)
        languages = sorted({item.target["language"] for item in self._items})
        for language in languages:
            require_language(language)
        self.name = f"multipl-e-{'-'.join(languages)}"
        self.digest = digest_files(path, more=repr([LANGUAGES[one] for one in languages]))
        stops = set.intersection(*(set(item.target["stops"]) for item in self._items))
        self.settings = TaskSettings(max_new_tokens=1024, stop=tuple(sorted(stops)))
        self._sandbox = sandbox or code_runs.shared_sandbox()

    def items(self) -> Sequence[Item]:
        """All problems, in the order of the file."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Compile and run the completed program with its tests."""
        target = item.target
        completion = code_runs.cut_at_stops(answers[-1].text, target["stops"])
        program = f"{target['prompt']}{completion}\n{target['tests']}"
        return run_program(program, target["language"], self._sandbox)

    def summarise(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """Accuracy of each language, where there are several."""
        scores: dict[str, list[float]] = {}
        for item in self._items:
            found = [verdict.score for verdict in verdicts.get(item.id, ())]
            scores.setdefault(item.target["language"], []).extend(found)
        means = {name: sum(all_) / len(all_) for name, all_ in sorted(scores.items()) if all_}
        return means if len(scores) > 1 else {}


def run_program(program: str, language: str, sandbox: Sandbox, limits: Limits = LIMITS) -> Verdict:
    """Run a program that tests itself.

    Args:
        program: source, tests included.
        language: one of `LANGUAGES`.
        sandbox: where it runs.
        limits: what it may use, its compiler included.
    """
    way = LANGUAGES[language]
    if not way.command:
        outcome = sandbox.run_python(program, limits=limits)
        return code_runs.to_verdict(outcome, outcome.finished, program)
    token = secrets.token_hex()
    source = program + way.ending.replace("TOKEN", token) + "\n"
    outcome = sandbox.run(["/bin/sh", "-c", way.command], {way.file: source}, limits=limits)
    has_ended = not way.ending or token.encode() in outcome.stdout
    verdict = code_runs.to_verdict(outcome, outcome.is_ok and has_ended, program)
    if outcome.status == "exited" and outcome.code in (126, 127):
        return Verdict(0.0, ERROR, program, f"{way.command}: {verdict.reason}")
    return verdict


def require_language(language: str) -> None:
    """See that programs of a language can run in the sandbox.

    Raises:
        ConfigError: a compiler or interpreter is not there.
    """
    missing = [one for one in LANGUAGES[language].needs if not shutil.which(one, path=SEARCH)]
    if missing:
        raise ConfigError(
            f"problems in {language!r} need {' and '.join(missing)} in {SEARCH.replace(':', ', ')}"
        )


def _make_item(record: Record) -> Item:
    tag = record.text("language").lower()
    language = ALIASES.get(tag, tag)
    if language not in LANGUAGES:
        known = nearest(language, list(LANGUAGES))
        raise ConfigError(f"{record.place} is in {tag!r}, which cannot be run; {known}")
    stops = record.fields.get("stop_tokens") or ()
    if not all(isinstance(stop, str) for stop in stops):
        raise ConfigError(f"{record.place}: 'stop_tokens' is not a list of texts")
    fields = {name: record.text(name) for name in ("prompt", "tests")}
    target = fields | {"language": language, "stops": tuple(stops)}
    # Files of several languages may use one name for all of them.
    return Item(f"{language}/{record.text('name')}", Generate(prompt=fields["prompt"]), target)
