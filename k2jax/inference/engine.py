"""The engine: requests come at any time, and get their tokens step by step beside each other.

Everything but `submit`, `abort` and `stats` happens in one thread: the engine's own between `start`
and `close`, else the one that calls `step` or `run`. In several processes all make the same engine;
process 0 gets the requests, the others `follow` (`run` does on its own).
"""

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

from k2jax import cluster
from k2jax.config import ConfigError, one_line
from k2jax.inference.broadcast import TeamExecutor
from k2jax.inference.executor import Executor, RunnerLike
from k2jax.inference.request import (
    EngineSettings,
    EngineStats,
    QueueFull,
    Request,
    Result,
    check_request,
)
from k2jax.inference.scheduler import Scheduler, Shape
from k2jax.inference.sequence import OnOutput, Sequence
from k2jax.inference.stepper import Stepper
from k2jax.inference.stops import TextCutter
from k2jax.model import Model
from k2jax.text.interface import TokenizerLike

Work = TypeVar("Work")

PAGE = 16  # tokens
LONGEST = 4_096  # tokens of a row that the cache has room for by default


class Engine:
    """Continues prompts, many at once. Its sequences share one cache and one compiled model."""

    def __init__(
        self,
        model: Model,
        settings: EngineSettings = EngineSettings(),  # noqa: B008, a constant
        runner: RunnerLike | None = None,
    ):
        """Reserve the cache; nothing is compiled before `warm_up` or the first step.

        Args:
            model: on the mesh on which to compute.
            settings: what to use.
            runner: computes the logits; None: one of this model.

        Raises:
            ConfigError: a setting is out of range.
        """
        check_settings(settings)
        self.settings, self.error = settings, ""
        runner = self._runner = runner or make_runner(model, settings)
        vocab = model.config.vocab
        self._tokenizer: TokenizerLike | None = model.tokenizer
        self._vocab = vocab
        allowed = min(self._tokenizer.vocab, vocab) if self._tokenizer else vocab
        checked = runner.row_sizes[-1] if runner.drafts else 0
        sizes = runner.page, runner.block, runner.pages, runner.rows
        shape = Shape(*sizes, runner.shards, runner.wanted, checked)
        self._scheduler = Scheduler(shape, settings.prefix_cache, settings.deterministic)
        # Most tokens of a prompt and its answer: of the model, and of the cache.
        self.context = min(runner.context, model.config.context, self._scheduler.room)
        self._stats = EngineStats(rows=runner.rows, pages_total=runner.pages - runner.shards)
        group = cluster.current()
        self._team = TeamExecutor(group, runner, vocab, allowed) if group.count > 1 else None
        self._follows, self._leads = group.number > 0, False
        self._executor = self._team or Executor(runner, vocab, allowed)
        self._stepper = Stepper(self._executor, self._scheduler, settings, self._stats)
        self._inbox: deque[Sequence | int] = deque()  # submitted ones, numbers of aborted ones
        self._open: dict[int, Sequence] = {}
        self._count = 0
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._closing = False

    # From any thread.

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """Take a request; its number.

        Args:
            request: what is asked for.
            on_output: called by the engine's thread with every event; it returns at once.

        Raises:
            ConfigError: the request cannot be computed; one line says why.
            QueueFull: too many wait, or the engine takes no more.
        """
        with self._news:
            if self.error or self._closing or self._draining:
                raise QueueFull(self.error or "the engine takes no more requests")
            waiting = len(self._scheduler.waiting) + len(self._inbox)
            if waiting >= self.settings.queue:
                raise QueueFull(f"{waiting} requests wait already; try again later")
        return self._enter(request, on_output).number

    def _enter(self, request: Request, on_output: OnOutput | None) -> Sequence:
        self._check(request)
        if request.constraint is not None:
            request.constraint.start(request.max_new_tokens)
        cutter = TextCutter(self._tokenizer, request.stop) if self._tokenizer else None
        with self._news:
            self._count += 1
            sequence = Sequence(self._count, request, on_output, cutter)
            self._open[sequence.number] = sequence
            self._inbox.append(sequence)
            self._news.notify_all()
        return sequence

    def _check(self, request: Request) -> None:
        check_request(request, self._vocab, self.context, self._tokenizer is not None)

    def abort(self, number: int) -> None:
        """End a request soon, with the reason "abort"; one that has ended stays as it is."""
        with self._news:
            self._inbox.append(number)
            self._news.notify_all()

    def stats(self) -> EngineStats:
        """Return what the engine has and has done."""
        parts = self._scheduler.parts
        idle, available = sum(p.idle for p in parts), sum(p.available for p in parts)
        return dataclasses.replace(
            self._stats,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._inbox),
            pages_used=self._stats.pages_total - available,
            pages_cached=idle,
            preemptions_total=self._scheduler.preemptions,
        )

    # Without a thread.

    def warm_up(self) -> None:
        """Compile all that any request may need."""
        self._executor.warm_up()

    def step(self) -> bool:
        """Compute one step; False: there is nothing to do."""
        try:
            self._read_inbox()
            return self._stepper.step(self._close_ended)
        except BaseException as error:
            self._fail(one_line(error, typed=True))
            raise

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Compute requests to their end; results in their order, whatever the queue's limit.

        Raises:
            ConfigError: one of them cannot be computed.
        """
        sequences: list[Sequence] = []
        if self._follows:
            for request in requests:
                self._check(request)
            return self.follow()
        try:
            for request in requests:
                sequences.append(self._enter(request, None))
        except ConfigError:
            for sequence in sequences:
                self.abort(sequence.number)
            raise
        if self._thread:
            with self._news:
                self._news.wait_for(lambda: all(s.result for s in sequences))
        while any(s.result is None for s in sequences):
            self.step()
        results = [s.result for s in sequences if s.result]
        if self._team and not self._thread and not self._leads:
            self._team.end(results)
        return results

    def lead(self, work: Callable[[], Work]) -> Work | None:
        """Do what runs requests any number of times; every process must call this alike.

        Args:
            work: called in process 0 alone. The others compute along.

        Returns:
            What `work` returns; None in the other processes.
        """
        if self._follows:
            self.follow()
            return None
        self._leads = True
        try:
            return work()
        finally:
            self._leads = False
            self.dismiss()

    def set_weights(self, params: dict[str, jax.Array]) -> None:
        """Compute with other weights of the same model; every process must call this alike.

        The arrays are not copied where each of the engine's devices has its part already, but for
        layers of shallow stacks; from another mesh they are laid out anew. They must live until the
        next call. Call it where no request is open.

        Raises:
            RuntimeError: a request is open.
        """
        if self._open or self._inbox:
            raise RuntimeError("weights cannot change while requests are open")
        self._runner.set_weights(params)
        self._scheduler.forget()  # latents of the old weights

    def follow(self) -> list[Result]:
        """Compute what process 0 schedules, in any other one; return when it closes or has run."""
        return self._team.follow() if self._team else []

    def dismiss(self) -> None:
        """Let the other processes return from `follow`; this one computes no more."""
        if self._team and not self._follows:
            self._team.end([])

    def _read_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                self._scheduler.waiting.append(item)
            elif sequence := self._open.get(item):
                self._stepper.end(sequence, "abort")
                self._close_ended([sequence])

    def _close_ended(self, sequences: Iterable[Sequence]) -> None:
        with self._news:
            for sequence in sequences:
                self._open.pop(sequence.number, None)
            self._news.notify_all()

    def _fail(self, line: str) -> None:
        """The device or we are broken: end everything."""
        self.error = line
        with contextlib.suppress(Exception):
            self._read_inbox()
        for sequence in list(self._open.values()):
            with contextlib.suppress(Exception):
                self._stepper.end(sequence, "error", error=line)
        self._close_ended(list(self._open.values()))

    # With a thread.

    def start(self) -> "Engine":
        """Compile, then step in a thread of its own whenever there is something to do."""
        self.warm_up()
        self._thread = threading.Thread(target=self._loop, name="k2jax-engine", daemon=True)
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._closing:
            try:
                if not self.step():
                    with self._news:
                        self._news.wait_for(lambda: self._inbox or self._closing)
            except Exception:
                return

    def drain(self) -> None:
        """Take no more requests; return when those that are here have ended."""
        self._draining = True
        if self._thread:
            with self._news:
                self._news.wait_for(lambda: not self._open)
        while self._open:
            self.step()

    def close(self) -> None:
        """End all requests with the reason "abort", and the thread."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        if self._thread:
            self._thread.join()
            self._thread = None
            if self._team:
                self._team.end([])
        if not self.error:
            for number in list(self._open):
                self.abort(number)
            self._read_inbox()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()


def check_settings(settings: EngineSettings) -> None:
    """Refuse what no engine can have.

    Raises:
        ConfigError: names the first.
    """
    for name in ("rows", "queue"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.cache_tokens < 0:
        raise ConfigError(f"cache_tokens is {settings.cache_tokens}; it must be 0 or more")
    if not 0 < settings.prefill_share <= 1:
        raise ConfigError(
            f"prefill_share is {settings.prefill_share}; it must be above 0 and at most 1"
        )


def make_runner(model: Model, settings: EngineSettings) -> RunnerLike:
    """Return a runner of a model that holds what the settings ask for."""
    from k2jax.inference.runner import Runner

    parts, rows = count_parts(model), fill_parts(model, settings.rows)
    tokens = settings.cache_tokens or rows * min(model.config.context, LONGEST)
    pages = parts * (-(-tokens // (PAGE * parts)) + 1)  # each part has a scratch page of its own
    runner = Runner(model, rows=rows, pages=pages, page=PAGE, block=PAGE, drafts=settings.drafts)
    if not settings.deterministic:
        runner.widen()
    if settings.experts:
        runner.keep_experts()
    return runner


def count_parts(model: Model) -> int:
    """Count the parts of the cache: each device of a mesh has one, and a sequence lies in one."""
    return model.params["head"].sharding.num_devices


def fill_parts(model: Model, rows: int) -> int:
    """`rows` rounded up, so that each part of the cache has as many."""
    parts = count_parts(model)
    return -(-rows // parts) * parts


def each_choice(request: Request, count: int) -> Iterator[Request]:
    """Yield `count` requests for one prompt that differ in their draws alone.

    Submitted together, the prompt is computed once.
    """
    from k2jax.inference.request import derive_seed

    for number in range(count):
        seed = derive_seed(request.sampling.seed, number)
        yield dataclasses.replace(
            request, sampling=dataclasses.replace(request.sampling, seed=seed)
        )
