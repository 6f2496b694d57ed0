"""Evaluate a task of ours: ask, grade, and keep every sample in a ledger."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from k2jax.config import one_line
from k2jax.evals import statistics
from k2jax.evals.asker import Asked, Asker
from k2jax.evals.ledger import Key, Ledger, Record
from k2jax.evals.task import (
    ERROR,
    FAILED,
    TRUNCATED,
    UNPARSED,
    Answer,
    Generate,
    Item,
    Task,
    TaskSettings,
    Verdict,
)

GRADED_AHEAD = 64  # samples that wait for a grader, at most


@dataclasses.dataclass
class Sample:
    """A sample from its first question to its verdict.

    Attributes:
        item: the question.
        number: of the sample, from 0.
        answers: one for each turn so far.
        parts: what the ledger has of each request, in order.
        failure: why the model gave no answer.
    """

    item: Item
    number: int
    answers: list[Answer] = dataclasses.field(default_factory=list)
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failure: Verdict | None = None

    @property
    def key(self) -> Key:
        """What the ledger knows it by."""
        return self.item.id, self.number


def evaluate_task(
    task: Task,
    items: Sequence[Item],
    asker: Asker,
    ledger: Ledger,
    *,
    graders: int = 2,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Verdict]]:
    """Ask and grade what the ledger does not have yet; all verdicts, by item.

    Args:
        task: grades.
        items: of it that are asked.
        asker: asks the model, with the task's settings or others.
        ledger: is finished, in the order of the items.
        graders: threads.
        on_sample: called with the number of samples that have ended, and of all.
    """
    keys = [(item.id, number) for item in items for number in range(asker.settings.samples)]
    waiting = deque(
        Sample(item, number)
        for item in items
        for number in range(asker.settings.samples)
        if (item.id, number) not in ledger.records
    )
    done = len(keys) - len(waiting)
    on_sample(done, len(keys))
    with ThreadPoolExecutor(graders, thread_name_prefix="k2jax-grader") as pool:
        runner = _Runner(task, asker, pool)
        for sample, verdict in runner.run(waiting):
            ledger.add(make_record(sample, verdict))
            done += 1
            on_sample(done, len(keys))
    ledger.finish(keys)
    return read_verdicts(ledger.records, keys)


class _Runner:
    """Keeps the engine and the graders at work."""

    def __init__(self, task: Task, asker: Asker, pool: ThreadPoolExecutor):
        self._task, self._asker, self._pool = task, asker, pool
        self._grading: dict[Future[Verdict], Sample] = {}

    def run(self, waiting: deque[Sample]) -> Iterator[tuple[Sample, Verdict]]:
        """Yield samples as they end."""
        scorer = self._asker.scorer
        while waiting or not scorer.is_idle or self._grading:
            while waiting and scorer.has_room and len(self._grading) < GRADED_AHEAD:
                sample = waiting.popleft()
                self._ask(sample, sample.item.ask)
            if not scorer.is_idle:
                scorer.step()
            elif self._grading:
                wait(self._grading, return_when=FIRST_COMPLETED)
            for future in [future for future in self._grading if future.done()]:
                yield self._grading.pop(future), future.result()

    def _ask(self, sample: Sample, ask: Any) -> None:
        self._asker.submit(sample.key, len(sample.answers), ask, lambda a: self._read(sample, a))

    def _read(self, sample: Sample, asked: Asked) -> None:
        sample.parts += asked.parts
        if asked.answer is None:
            sample.failure = Verdict(0.0, asked.result, reason=asked.reason)
            self._grade(sample)
            return
        sample.answers.append(asked.answer)
        following: Generate | None = None
        if not asked.answer.is_truncated:
            try:
                following = self._task.follow_up(sample.item, sample.answers)
            except Exception as error:
                sample.failure = Verdict(0.0, ERROR, reason=one_line(error, typed=True))
        if following is None:
            self._grade(sample)
        else:
            self._ask(sample, following)

    def _grade(self, sample: Sample) -> None:
        self._grading[self._pool.submit(grade, self._task, sample)] = sample


def grade(task: Task, sample: Sample) -> Verdict:
    """Return the verdict of a sample; a grader that raises is a verdict too."""
    if sample.failure is not None:
        return sample.failure
    try:
        verdict = task.grade(sample.item, sample.answers)
    except Exception as error:
        return Verdict(0.0, ERROR, reason=one_line(error, typed=True))
    if sample.answers[-1].is_truncated and verdict.result in (FAILED, UNPARSED):
        return dataclasses.replace(verdict, result=TRUNCATED)
    return verdict


def make_record(sample: Sample, verdict: Verdict) -> Record:
    """Return a sample as the ledger has it."""
    return {
        "item": sample.item.id,
        "sample": sample.number,
        "parts": sample.parts,
        "extracted": verdict.extracted,
        "score": float(verdict.score),
        "result": verdict.result,
        "reason": verdict.reason,
        "numbers": {name: float(value) for name, value in verdict.numbers.items()},
    }


def read_verdicts(records: Mapping[Key, Record], keys: Sequence[Key]) -> dict[str, list[Verdict]]:
    """Return the verdicts of a ledger's records, by item."""
    verdicts: dict[str, list[Verdict]] = {}
    for key in keys:
        record = records[key]
        verdicts.setdefault(key[0], []).append(
            Verdict(
                record["score"],
                record["result"],
                record["extracted"],
                record["reason"],
                record["numbers"],
            )
        )
    return verdicts


def summarise(
    task: Task, verdicts: Mapping[str, Sequence[Verdict]], settings: TaskSettings
) -> dict[str, Any]:
    """Return all numbers of a task."""
    return statistics.summarise(verdicts, settings.pass_at) | task.summarise(verdicts)
