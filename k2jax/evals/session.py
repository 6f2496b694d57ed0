"""Evaluate one model on several tasks: each gets its ledger and its result."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax.config import ConfigError
from k2jax.evals import run_task, statistics
from k2jax.evals.asker import Asker
from k2jax.evals.ledger import Key, Ledger
from k2jax.evals.registry import HarnessFiles
from k2jax.evals.scorer import Scorer
from k2jax.evals.task import Generate, Task, TaskSettings

if TYPE_CHECKING:
    from k2jax.evals.harness_run import HarnessTask


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        out: folder of ledgers and results.
        settings: of tasks of ours, by the fields of `TaskSettings`; the rest stays each task's own.
        limit: items, the first ones; 0: all.
        seed: of all draws.
        graders: threads.
        add_bos: of lm-eval's tasks: put [BOS] before texts.
    """

    out: Path
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limit: int = 0
    seed: int = 0
    graders: int = 2
    add_bos: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        name: of the task.
        ledger: the file with every sample.
        header: what the scores depend on.
        numbers: scores, intervals and counts.
        files: that other programs take, by name.
        seconds: that this call took; what a ledger had before took none.
    """

    name: str
    ledger: Path
    header: dict[str, Any]
    numbers: dict[str, Any]
    files: dict[str, str]
    seconds: float


Say = Callable[[str, int, int], None]  # a task, samples that have ended, and of all; 0: unknown


def check_options(options: Options) -> None:
    """Refuse numbers that cannot work.

    Raises:
        ConfigError: names the first.
    """
    settings = TaskSettings(**options.settings)
    least = {"samples": 1, "max_new_tokens": 1, "temperature": 0}
    for name, bound in least.items():
        if (value := getattr(settings, name)) < bound:
            raise ConfigError(f"{name} is {value}; it must be at least {bound}")
    if not 0 < settings.top_p <= 1:
        raise ConfigError(f"top_p is {settings.top_p}; it must be above 0 and at most 1")
    if options.limit < 0:
        raise ConfigError(f"limit is {options.limit}; it must be 0 or more")


def open_all(opened: Sequence[Task | HarnessFiles]) -> list["Task | HarnessTask"]:
    """Return the tasks, those of lm-eval loaded.

    Raises:
        ConfigError: lm-eval cannot read one, or two have one name.
    """
    tasks: list[Task | HarnessTask] = []
    for entry in opened:
        if isinstance(entry, Task):
            tasks.append(entry)
            continue
        from k2jax.evals.harness_run import open_harness_tasks

        tasks += open_harness_tasks(entry)
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two tasks are called {twice[0]!r}; evaluate them one after the other")
    return tasks


def evaluate_one(
    task: "Task | HarnessTask",
    scorer: Scorer,
    identity: Mapping[str, Any],
    options: Options,
    say: Say = lambda name, done, total: None,
) -> Outcome:
    """Evaluate a task, or go on with it where a ledger in `options.out` ends.

    Args:
        task: ours or lm-eval's.
        scorer: with the model.
        identity: of the weights and the tokenizer: the ledger of others is refused.
        options: see there.
        say: is called as samples end.

    Raises:
        ConfigError: the ledger is of another evaluation, or the task cannot be asked.
    """
    began = time.perf_counter()
    path = options.out / f"{task.name}.jsonl"
    do = _evaluate_ours if isinstance(task, Task) else _evaluate_harness
    header, numbers, files = do(task, path, scorer, identity, options, say)  # type: ignore[arg-type]
    return Outcome(task.name, path, header, numbers, files, time.perf_counter() - began)


Made = tuple[dict[str, Any], dict[str, Any], dict[str, str]]


def _evaluate_ours(
    task: Task,
    path: Path,
    scorer: Scorer,
    identity: Mapping[str, Any],
    options: Options,
    say: Say,
) -> Made:
    settings = dataclasses.replace(task.settings, **options.settings)
    check_options(dataclasses.replace(options, settings=dataclasses.asdict(settings)))
    items = task.items()[: options.limit or None]
    new, generates = settings.max_new_tokens, any(isinstance(i.ask, Generate) for i in items)
    if generates and new >= scorer.context < scorer.most:
        raise ConfigError(
            f"{task.name} asks for {new} new tokens, sequences have at most {scorer.context}: set"
            f" --max-length, up to {scorer.most}, or --max-new-tokens"
        )
    header = {
        "task": task.name,
        "data": task.digest,
        **identity,
        "settings": dataclasses.asdict(settings) | {"context": scorer.context},
        "limit": options.limit,
        "seed": options.seed,
    }
    with contextlib.closing(Ledger(path, header)) as ledger:
        verdicts = run_task.evaluate_task(
            task,
            items,
            Asker(scorer, settings, options.seed),
            ledger,
            graders=options.graders,
            on_sample=lambda done, total: say(task.name, done, total),
        )
        asked = settings if generates else dataclasses.replace(settings, pass_at=())
        numbers = run_task.summarise(task, verdicts, asked)
        numbers["tokens_new"] = count_tokens(ledger)
        return ledger.header, numbers, task.write_files(verdicts)


def _evaluate_harness(
    task: "HarnessTask",
    path: Path,
    scorer: Scorer,
    identity: Mapping[str, Any],
    options: Options,
    say: Say,
) -> Made:
    import lm_eval

    from k2jax.evals.harness_run import evaluate_harness

    if options.settings:
        name = next(iter(options.settings))
        option = name.replace("_", "-")
        raise ConfigError(f"--{option} is for our own tasks; {task.name} of lm-eval has its own")
    settings = {"add_bos": options.add_bos, "context": scorer.context}
    header = {
        "task": task.name,
        "data": task.digest,
        **identity,
        "settings": settings | {"lm_eval": lm_eval.__version__},
        "limit": options.limit,
        "seed": options.seed,
    }
    with contextlib.closing(Ledger(path, header)) as ledger:
        own = evaluate_harness(
            task,
            scorer,
            ledger,
            limit=options.limit,
            seed=options.seed,
            add_bos=options.add_bos,
            on_sample=lambda done, total: say(task.name, done, total),
        )
        keys: list[Key] = [key for key in ledger.records if key[1] == 0]
        numbers = statistics.summarise(run_task.read_verdicts(ledger.records, keys), ())
        return ledger.header, numbers | own | {"tokens_new": count_tokens(ledger)}, {}


def count_tokens(ledger: Ledger) -> int:
    """Count the tokens that a ledger has, generated and scored."""
    return sum(
        len(part["ids"])
        for record in ledger.records.values()
        if record["sample"] == 0 or "filter" not in record
        for part in record["parts"]
    )
