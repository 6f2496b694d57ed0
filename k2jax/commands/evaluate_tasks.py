"""`k2jax evaluate --tasks` and `--compare`: benchmarks, with every sample in a ledger."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax.commands import loading
from k2jax.config import ConfigError
from k2jax.runtime.files import write_atomic
from k2jax.runtime.progress import Progress

if TYPE_CHECKING:
    from k2jax.cluster import Group
    from k2jax.evals.session import Options, Outcome
    from k2jax.weights.source import Source

OUT = "evals"
NO_ISOLATION = "run_code_without_isolation"
# Options that replace a task's own settings; each is a field of `TaskSettings`.
SETTINGS = ("samples", "max_new_tokens", "temperature", "top_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of tasks."""
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--tasks",
        action="append",
        default=[],
        metavar="TASK",
        help="KIND:FILE, a task of lm-eval (YAML), or a folder of such; repeat it for several",
    )
    add("--preset", default="", metavar="NAME", help="settings of a published score")
    add("--out", default=OUT, metavar="DIR", help=f"ledgers and pages; default: {OUT}")
    add("--limit", type=int, default=0, metavar="N", help="the first N items; default: all")
    add("--samples", type=int, metavar="N", help="of each item; default: the task's")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer; default: the task's")
    add("--temperature", type=float, metavar="X", help="default: the task's")
    add("--top-p", type=float, metavar="X", help="default: the task's")
    add("--seed", type=int, default=0, metavar="N", help="of all draws; default: 0")
    add(
        "--cache-tokens", type=int, default=0, metavar="N", help="in memory; default: as of `serve`"
    )
    add("--graders", type=int, default=2, metavar="N", help="threads that grade; default: 2")
    add(
        "--run-code-without-isolation",
        action="store_true",
        help="run what the model wrote as you: it can read your files and use the network",
    )
    add("--add-bos", action="store_true", help="lm-eval's tasks: put [BOS] before texts")
    add(
        "--max-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a sequence, at most; default: the model's context, at most 4,096",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="say in which samples two ledgers differ, and why; needs no checkpoint",
    )


def refuse_without_tasks(args: argparse.Namespace) -> None:
    """Refuse options that say nothing where no task is named.

    Raises:
        ConfigError: names the first.
    """
    for name in ("limit", *SETTINGS, "add_bos", "max_length", "cache_tokens", NO_ISOLATION):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} needs --tasks")


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the tasks, and print their scores; the exit code."""
    from k2jax.evals.registry import open_tasks
    from k2jax.evals.session import Options, check_options, open_all

    options = Options(
        Path(args.out).absolute(),
        {name: value for name in SETTINGS if (value := getattr(args, name)) is not None},
        args.limit,
        args.seed,
        max(args.graders, 1),
        args.add_bos,
    )
    check_options(options)
    if not args.tasks and args.preset:
        raise ConfigError(f"--preset {args.preset} needs --tasks FILE")
    if args.run_code_without_isolation:
        from k2jax.evals.code_runs import shared_sandbox

        shared_sandbox(isolated=False)
    # Before the weights are read, which takes longest.
    tasks = open_all(open_tasks(args.tasks, args.preset))
    with loading.opened(args, loading.read_mesh(args), inference=True) as (group, source):
        outcomes = _evaluate_all(args, tasks, options, group, source)
    if outcomes is not None:
        sys.stdout.write(render(outcomes, args.json) + "\n")
    return 0


def _evaluate_all(
    args: argparse.Namespace,
    tasks: list[Any],
    options: "Options",
    group: "Group",
    source: "Source",
) -> "list[Outcome] | None":
    from k2jax.evals.fingerprint import fingerprint_tokenizer, fingerprint_weights
    from k2jax.evals.scorer import Scorer
    from k2jax.evals.session import evaluate_one

    group.require_equal("tasks", {task.name: task.digest[:12] for task in tasks})
    model = source.load(args.dtype, args.weights)
    identity = {
        "weights": fingerprint_weights(model),
        "tokenizer": fingerprint_tokenizer(source.folder),
        "dtype": model.dtype,
    }
    scorer = Scorer(model, args.rows, args.max_length, args.cache_tokens)
    if group.number:
        scorer.follow()
        return None
    outcomes = []
    for task in tasks:
        with _Shown(task.name) as shown:
            outcome = evaluate_one(task, scorer, identity, options, shown.update)
        write_result(outcome, source.name)
        outcomes.append(outcome)
    scorer.dismiss()
    return outcomes


class _Shown:
    """Shows how far a task is, on stderr."""

    def __init__(self, name: str):
        self._name, self._total = name, 0
        self._progress = Progress(1, self._say, lambda _: self._text)
        self._text = ""

    def __enter__(self) -> "_Shown":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def _say(self, line: str) -> None:
        sys.stderr.write(f"k2jax: {line}\n")

    def update(self, name: str, done: int, total: int) -> None:
        """Show the number of samples."""
        of = f" of {total}" if total else ""
        self._text = f"{name}: {done}{of} samples"
        self._progress.total = max(total, done, 1)
        self._progress.update(done)


def write_result(outcome: "Outcome", checkpoint: str) -> None:
    """Write the numbers, the page and other files beside the ledger."""
    from k2jax.report.evaluation import write_page

    numbers = outcome.numbers | {"seconds": round(outcome.seconds, 3), "checkpoint": checkpoint}
    result = {"task": outcome.name} | numbers | {"evaluation": outcome.header}
    write_atomic(outcome.ledger.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    for name, content in outcome.files.items():
        write_atomic(outcome.ledger.with_name(name), content)
    write_page(outcome.ledger, numbers)


def render(outcomes: "list[Outcome]", as_json: bool) -> str:
    """The scores as text, or one JSON object by task."""
    if as_json:
        found = {
            o.name: o.numbers | {"seconds": round(o.seconds, 3), "ledger": str(o.ledger)}
            for o in outcomes
        }
        return json.dumps(found)
    return "\n".join(map(_describe, outcomes))


def _describe(outcome: "Outcome") -> str:
    numbers = outcome.numbers
    counts = ", ".join(f"{count} {result}" for result, count in numbers["results"].items())
    lines = [f"{outcome.name}: {numbers['items']} items, {numbers['samples']} samples: {counts}"]
    for name, value in numbers.items():
        if not isinstance(value, float) or name.endswith(("_low", "_high")):
            continue
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        between = f" (95%: {low:.4f} to {high:.4f})" if low is not None else ""
        lines.append(f"  {name} {value:.4f}{between}")
    return "\n".join([*lines, f"  {outcome.ledger}"])


def compare(args: argparse.Namespace) -> int:
    """Print in which samples two ledgers differ; the exit code."""
    from k2jax.evals.compare import compare_ledgers, describe

    if args.checkpoint is not None or args.tasks:
        raise ConfigError("--compare takes two ledgers, and neither a checkpoint nor --tasks")
    comparison = compare_ledgers(*args.compare)
    if args.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(comparison)) + "\n")
    else:
        sys.stdout.write(describe(comparison) + "\n")
    return 0
