"""The training loop, and the run around it: from text and a config to checkpoints and metrics."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from k2jax import cluster, sharding
from k2jax.checkpoint import Checkpoints, preload_orbax
from k2jax.config import RunConfig
from k2jax.data import Batches, Data, Mixture, check, compressors, open_data, prefetch
from k2jax.evals.perplexity import heldout_loss
from k2jax.model import Model
from k2jax.model.batch import own_parts, to_devices
from k2jax.model.kernel_check import check_kernels
from k2jax.runtime.signals import Interrupted, StopSignals
from k2jax.training import identity, provenance, resume, trackers
from k2jax.training.callbacks import (
    Abort,
    Action,
    Callback,
    CompileEarly,
    Continue,
    MeasureSpeed,
    Profile,
    Recover,
    RewindTo,
    Save,
    ScoreHeldout,
    ShowProgress,
    Stop,
    StopOnSignal,
    Track,
    WriteMetrics,
)
from k2jax.training.compile import InReserve, Programs, cast_model, wait_until_all_compiled
from k2jax.training.dashboard import Dashboard
from k2jax.training.metrics import METRICS, metrics_to_host, plot_metrics
from k2jax.training.profiling import Profiler, make_speed, time_waits
from k2jax.training.recovery import Recovery
from k2jax.training.saver import Saver
from k2jax.training.step import State, build
from k2jax.weights.source import open_source

Say = Callable[[str], None]
AnyState = TypeVar("AnyState")
PLOT = "loss.png"  # the last file that a run leaves
ADAPTER = "adapter"  # folder of PEFT's files, of a run that learns adapters alone


def fit(
    state: AnyState,
    step: Callable[[AnyState, Any], tuple[AnyState, dict[str, Any]]],
    batches: Callable[[int], Iterable[Any]],
    callbacks: Sequence[Callback],
    *,
    start: int = 0,
    restore: Callable[[int], AnyState] | None = None,
) -> tuple[AnyState, int]:
    """Take steps until the batches end or a callback stops them.

    The metrics of a step are those that `step` returns, on the host, with `seconds` that it took
    and `input_seconds` that its batch was waited for.

    Args:
        state: after `start` steps; donated.
        step: from a state and a batch to the next state and its metrics.
        batches: called with the number of steps taken; the batches of the steps after it. What it
            returns is closed if it has a `close`.
        callbacks: called in this order around every step; see `Callback`.
        start: steps taken before.
        restore: called with a step to rewind to; the state after it. Needed for `RewindTo`.

    Returns:
        The last state, and its step.
    """
    while True:
        with contextlib.ExitStack() as stack:
            for callback in callbacks:
                callback.begin(start)
                stack.callback(callback.close)
            upcoming = batches(start)
            if hasattr(upcoming, "close"):
                stack.callback(upcoming.close)
            state, start, action = _take_steps(state, step, upcoming, callbacks, start)
            if not isinstance(action, RewindTo):
                for callback in callbacks:
                    callback.end(start, state)
                return state, start
        if restore is None:
            raise ValueError("a callback rewinds, and fit has no `restore`")
        _delete(state)  # there is no room for two
        state, start = restore(action.step), action.step


def _take_steps(
    state: Any,
    take: Callable[..., Any],
    upcoming: Iterable[Any],
    callbacks: Sequence[Callback],
    step: int,
) -> tuple[Any, int, Action]:
    for batch, waited in time_waits(upcoming):
        step += 1
        for callback in callbacks:
            callback.before_step(step, batch)
        began = time.perf_counter()
        state, on_devices = take(state, batch)
        metrics = metrics_to_host(on_devices)
        metrics |= {"seconds": time.perf_counter() - began, "input_seconds": waited}
        action: Action = Continue()
        for callback in callbacks:
            wanted = callback.on_step(step, state, metrics)
            if isinstance(wanted, RewindTo):
                return state, step, wanted
            action = wanted if isinstance(wanted, Stop) else action
        if isinstance(action, Stop):
            return state, step, action
    return state, step, Continue()


def _delete(state: Any) -> None:
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def train(
    run: RunConfig,
    out: str | Path,
    *,
    init: str = "",
    say: Say = print,
    began: float | None = None,
    closing: Callable[[Model], None] | None = None,
) -> Model:
    """Train to `run.train.steps`, or resume from the newest checkpoint in `out`.

    Leaves in `out`: `checkpoints/`, `metrics.jsonl` (one line a step), `loss.png`, `config.json`,
    `run.json` (one entry a start), `tiktoken.model`. SIGTERM saves and returns.

    Args:
        run: validated.
        out: folder of the run.
        init: weights to start from; a checkpoint in `out` wins over it.
        say: is called with each line worth printing.
        began: when the command started, on `time.perf_counter`'s clock; default: now.
        closing: called with the trained model in the compute dtype, on all processes, when the run
            has come to its end and before its plot is drawn. Undone, it is done on a resume.

    Returns:
        The trained model, on the mesh of the run.

    Raises:
        ConfigError: the run cannot work here; nothing that was saved is lost.
    """
    out = Path(out)
    began = time.perf_counter() if began is None else began
    with jax.set_mesh(sharding.make_mesh(run.mesh)), resume.name_outside_errors(out):
        return _Training(run, out, say, began).run_to_end(init, closing)


class _Training:
    """One call of `train`: what its parts share."""

    def __init__(self, run: RunConfig, out: Path, say: Say, began: float):
        self.run, self.out, self.began = run, out, began
        self.is_main = jax.process_index() == 0  # the others write nothing but checkpoints
        self.say = say if self.is_main else lambda line: None
        self.program = build(run)
        sharding.check_divisible(self.program.specs, run.mesh.sizes, run.data.context)
        trackers.require_packages(run)
        self.recovery = Recovery(run, out, self.say)

    def run_to_end(self, init: str, closing: Callable[[Model], None] | None) -> Model:
        run, last = self.run, self.run.train.steps
        with (
            Checkpoints(self.out, run.train.keep, run.train.keep_every) as checkpoints,
            StopSignals() as signals,
            ThreadPoolExecutor(1) as pool,
            contextlib.closing(self.recovery.events),
        ):
            latest = resume.find_start(checkpoints, run, self.out, self.say)
            named = identity.choose_tokenizer(run, self.out, init, latest is not None, self.say)
            self._preflight(init, latest, named)
            self.base = resume.open_base(run, init, self.out, latest)
            self.program = resume.freeze_base(self.program, self.base)
            # Compiling takes longest, so it starts first, and the data is read meanwhile.
            programs = Programs(self.program, pool)
            preload_orbax()
            data = self._open_data(named)
            if latest is not None:
                identity.require_same_data(data, self.out)
            self._write_run_files(data, init, latest is not None, trained=not named)
            step = latest or 0
            if latest is None:
                state = resume.initial_state(self.program, init, self.base)
            else:
                state = self._restore(checkpoints, latest)
            if step < last:
                provenance.record_start(run, self.out, step)
                state, step = self._fit(state, step, data, programs, checkpoints, signals)
            model = Model(run.model, resume.plain_params(self.program, state), data.tokenizer)
            if step < last:
                self.say(f"stopped and saved at step {step}; rerun the same command to resume")
            elif step == latest and (self.out / PLOT).exists():
                self.say(f"{self.out} is finished: step {step}; raise --train.steps to train on")
            else:
                self._finish(state, model, data, programs, signals, closing)
            return model

    def _preflight(self, init: str, latest: int | None, tokenizer: str) -> None:
        """Find mistakes first: compiling cannot be interrupted."""
        check(self.run.data.path, tokenizer, self.run.model.vocab)
        if self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        if jax.default_backend() != "cpu":
            check_kernels(self.program.dispatch, self.run.model, self.run.data.context)
        if init and latest is None:
            open_source(init)
        elif init:
            self.say(f"--init {init} is not used: {self.out} has a checkpoint")

    def _open_data(self, tokenizer: str) -> Data:
        """Open the run's data alike on all processes: process 0 first, to fill a shared cache once.

        Raises:
            ConfigError: the data cannot be read, or processes see different data.
        """
        group = cluster.current()
        if group.number:
            group.tell("the data is prepared")
        run = self.run
        data = open_data(run.data.path, tokenizer, run.model.vocab, progress=self.say)
        if not group.number:
            group.tell("the data is prepared")
        size, heldout, digest = data.train.size, data.heldout.bytes, data.tokenizer.digest()[:12]
        facts = {"tokenizer": digest, "tokens to learn from": size, "bytes held out": heldout}
        group.require_equal("data", facts)
        return data

    def _write_run_files(self, data: Data, init: str, resumed: bool, trained: bool) -> None:
        if not self.is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if resumed:
            identity.complete(data, self.out)
        else:
            identity.record(data, self.out, init, trained and bool(data.heldout_names))
        provenance.write_config(self.run, self.out)
        self.say(
            f"{provenance.introduce(self.program)}; {data.train.size / 1e6:.2f}M tokens of"
            f" {data.title},"
            f" {data.heldout_bytes:,} bytes held out"
        )

    def _restore(self, checkpoints: Checkpoints, step: int) -> State:
        self.say(f"resuming from step {step} in {self.out}")
        return resume.restore_state(self.program, checkpoints, step, self.base)

    def _fit(
        self,
        state: State,
        start: int,
        data: Data,
        programs: Programs,
        checkpoints: Checkpoints,
        signals: StopSignals,
    ) -> tuple[State, int]:
        """Take steps until the last one or a signal; the state is saved at the end."""
        run, recovery, saver = self.run, self.recovery, Saver(checkpoints, self.say)
        compiled = InReserve(wait_until_all_compiled(programs.step, "compiled step"))

        def take(state: State, rows: dict[str, np.ndarray]) -> tuple[State, dict[str, jax.Array]]:
            batch = to_devices(rows, run.train.accumulate)
            return compiled(state, batch, np.float32(recovery.health.ceiling))

        def score(params: Any) -> dict[str, float]:
            return self._score(params, data, programs, run.train.eval_rows)

        def checkpoint_meta(step: int) -> dict[str, Any]:
            return resume.checkpoint_meta(run, self.base) | recovery.checkpoint_meta(step)

        def dashboard(start: int) -> Dashboard:
            return Dashboard(run, start, self.say, self.began)

        metrics_file = self.out / METRICS if self.is_main else None
        callbacks = [
            Profile(Profiler(run, self.out, recovery.events)),
            CompileEarly(programs.start_evaluation),
            MeasureSpeed(make_speed(run), saver),
            Recover(recovery, saver, programs.learning_rate),
            ScoreHeldout(score, run.train.eval_every, run.train.steps),
            WriteMetrics(metrics_file, self.say, run.train.loads_every),
            ShowProgress(dashboard, recovery),
            Track(run, self.out),
            Abort(recovery),
            StopOnSignal(signals),
            Save(saver, run.train.save_every, checkpoint_meta, self.program.to_save),
        ]
        with contextlib.closing(compiled):
            return fit(
                state,
                take,
                lambda start: self._read_batches(data, start),
                callbacks,
                start=start,
                restore=lambda step: self._restore(checkpoints, step),
            )

    def _read_batches(self, data: Data, start: int) -> Iterator[dict[str, np.ndarray]]:
        """Prefetch, in a thread, the batches after `start`, skipping those left out."""
        run, order = self.run, self.recovery.order
        batches = Batches(data.train, run.data.rows, run.data.context, run.data.seed)
        if isinstance(data.train, Mixture):
            epochs = batches.epochs(order.find_batch(run.train.steps))
            parts = (f"{name} {n:.2f}" for name, n in zip(data.train.names, epochs, strict=True))
            self.say("epochs in all: " + ", ".join(parts))
        own = own_parts(run.train.accumulate)  # here: the thread has no mesh

        def fetch(step: int) -> dict[str, np.ndarray]:
            return batches.batch(order.find_batch(step), **own)

        return prefetch(fetch, start, run.train.steps - start)

    def _score(
        self, params: Any, data: Data, programs: Programs, limit: int = 0
    ) -> dict[str, float]:
        """Score held-out rows, `limit` 0: all of them; nothing where they have no targets."""
        evaluate = wait_until_all_compiled(programs.start_evaluation(), "compiled evaluation")
        heldout = heldout_loss(
            functools.partial(evaluate, params),
            data.heldout,
            *self.program.micro_shape,
            data.tokenizer.byte_lengths(),
            limit=limit,
        )
        if not heldout.tokens:
            return {}
        return {
            "heldout_loss": heldout.nats_per_token,
            "heldout_bits_per_byte": heldout.bits_per_byte,
        }

    def _finish(
        self,
        state: State,
        model: Model,
        data: Data,
        programs: Programs,
        signals: StopSignals,
        closing: Callable[[Model], None] | None,
    ) -> None:
        """Report on the whole run, unless it is stopped meanwhile."""
        try:
            signals.interrupt_from_now_on()
            self._final_report(self._score(state.params, data, programs), data)
            if self.base:
                resume.write_adapter(self.program, state.params, self.base, self.out / ADAPTER)
            if closing:
                closing(model if self.base else cast_model(self.program, model))
            self._plot()
        except Interrupted:
            step = f"step {self.run.train.steps}"
            self.say(f"stopped; {step} is saved, and the same command scores and plots the run")

    def _final_report(self, score: dict[str, float], data: Data) -> None:
        """Compare the score of all held-out text with compressors."""
        if self.is_main and not score:
            self.say("held out: no token is to be learned, so none is scored")
        elif self.is_main:
            packed = compressors(data.heldout_texts())
            self.say(
                f"held out: {score['heldout_bits_per_byte']:.4f} bits per byte,"
                f" {score['heldout_loss']:.4f} nats per token"
                f" (gzip -9: {packed['gzip']:.4f}, xz -9: {packed['xz']:.4f} bits per byte)"
            )

    def _plot(self) -> None:
        if self.is_main:
            plot_metrics(self.out / METRICS, self.out / PLOT, self.run.name)
            seconds = time.perf_counter() - self.began
            self.say(f"{self.out}: checkpoints, {METRICS}, {PLOT} ({seconds:.0f} s in all)")
