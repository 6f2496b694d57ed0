"""Reinforcement learning: samples by the weights that are trained, rewards, a step, and again.

The samples of a step are a function of the weights, the run's seed and the number of the step, so a
run that was killed at any moment ends, by the same command, with the same weights bit for bit.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax import cluster, sharding
from k2jax.checkpoint import Checkpoints, preload_orbax
from k2jax.config import ConfigError, RunConfig
from k2jax.data import Batches, open_data
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings
from k2jax.model import Model
from k2jax.params.arrays import Params
from k2jax.post.environment import Environment
from k2jax.post.rl_config import RlConfig, check_run
from k2jax.post.rl_objective import make_objective
from k2jax.post.rl_step import PolicySteps
from k2jax.post.rollouts import Sampler
from k2jax.post.samples import Tasks, hold_scores
from k2jax.runtime.files import write_atomic
from k2jax.runtime.signals import StopSignals
from k2jax.training import provenance, resume
from k2jax.training.callbacks import (
    Abort,
    Action,
    Callback,
    Recover,
    Save,
    ScoreHeldout,
    Stop,
    StopOnSignal,
    Track,
    WriteMetrics,
)
from k2jax.training.loop import ADAPTER, fit
from k2jax.training.metrics import METRICS
from k2jax.training.recovery import Recovery
from k2jax.training.saver import Saver
from k2jax.training.step import State, build
from k2jax.weights.source import OF_RUN, open_source

SETTINGS = "rl.json"  # of the run's folder
MOST_FAILURES = 20  # kinds that are printed
Say = Callable[[str], None]


def train_rl(
    run: RunConfig,
    rl: RlConfig,
    env: Environment,
    out: str | Path,
    *,
    init: str,
    say: Say = print,
) -> Model:
    """Train to `run.train.steps`, or resume from the newest checkpoint in `out`.

    Leaves in `out` what `k2jax train` leaves, but for the plot, and the settings as `rl.json`.

    Args:
        run: validated; `data.rows` are the samples of a step, `data.context` most tokens of one.
        rl: how it learns.
        env: what it learns.
        out: folder of the run.
        init: weights to start from, with their tokenizer; a checkpoint in `out` wins over it.
        say: is called with each line worth printing.

    Returns:
        The trained model, on the mesh of the run.

    Raises:
        ConfigError: the run cannot work here; nothing that was saved is lost.
    """
    check_run(run, rl)
    out = Path(out)
    # The loss of samples jumps with their rewards: only what is not finite is a bad step.
    run = dataclasses.replace(run, health=dataclasses.replace(run.health, spike=0.0))
    with jax.set_mesh(sharding.make_mesh(run.mesh)), resume.name_outside_errors(out):
        return _RlRun(run, rl, env, out, say).run_to_end(init)


class _RlRun:
    """One call of `train_rl`: what its parts share."""

    def __init__(self, run: RunConfig, rl: RlConfig, env: Environment, out: Path, say: Say):
        self.is_main = jax.process_index() == 0  # the others write nothing but checkpoints
        self.run, self.rl, self.env, self.out = run, rl, env, out
        self.say = say if self.is_main else lambda line: None
        self.program = build(run, make_objective(run, rl))  # type: ignore[arg-type]
        sharding.check_divisible(self.program.specs, run.mesh.sizes, run.data.context)
        self.recovery = Recovery(run, out, self.say)

    def run_to_end(self, init: str) -> Model:
        run, last = self.run, self.run.train.steps
        with (
            Checkpoints(self.out, run.train.keep, run.train.keep_every) as checkpoints,
            StopSignals() as signals,
            ThreadPoolExecutor(1) as pool,
            contextlib.closing(self.recovery.events),
        ):
            latest = resume.find_start(checkpoints, run, self.out, self.say)
            self._require_same_settings(latest is not None)
            source = open_source(self.out if latest is not None else init)
            tokenizer = source.tokenizer
            if tokenizer is None:
                raise ConfigError(f"{source.name} has no tokenizer")
            preload_orbax()
            self.base = resume.open_base(run, init, self.out, latest)
            self.program = resume.freeze_base(self.program, self.base)
            if latest is None:
                state = resume.initial_state(self.program, init, self.base)
                self._write_run_files(init)
            else:
                self.say(f"resuming from step {latest} in {self.out}")
                state = resume.restore_state(self.program, checkpoints, latest, self.base)
            step = latest or 0
            if step < last:
                self._introduce()
                provenance.record_start(run, self.out, step)
                model = Model(run.model, resume.plain_params(self.program, state), tokenizer)
                steps = self._prepare(model, pool)
                state, step = self._fit(state, step, steps, checkpoints, signals)
            if step < last:
                self.say(f"stopped and saved at step {step}; rerun the same command to resume")
            else:
                self._finish(state, latest == last)
            return Model(run.model, resume.plain_params(self.program, state), tokenizer)

    def _require_same_settings(self, resumed: bool) -> None:
        """Refuse to resume with another environment or other settings, which change the samples.

        Raises:
            ConfigError: names the first that differs.
        """
        file = self.out / SETTINGS
        now = {"env": self.env.name} | dataclasses.asdict(self.rl)
        before = json.loads(file.read_text()) if resumed and file.is_file() else now
        for name, value in now.items():
            if before.get(name, value) != value:
                raise ConfigError(
                    f"{self.out} holds a run with {name} {before[name]}, not {value}; give another"
                    " --out"
                )

    def _write_run_files(self, init: str) -> None:
        if not self.is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        source = open_source(init)
        for name in source.companions:
            if name.startswith(OF_RUN) and source.folder != self.out:
                shutil.copyfile(source.folder / name, self.out / name)
        settings = {"env": self.env.name} | dataclasses.asdict(self.rl)
        write_atomic(self.out / SETTINGS, json.dumps(settings, indent=1) + "\n")
        provenance.write_config(self.run, self.out)

    def _introduce(self) -> None:
        """Say what learns and from what: the first step takes a while to come."""
        run, env = self.run, self.env
        self.say(
            f"{provenance.introduce(self.program)}; {env.name}: {env.count('train'):,} tasks,"
            f" {env.count('heldout'):,} held out; a step tries {run.data.rows // self.rl.group},"
            f" {self.rl.group} times each"
        )

    def _finish(self, state: State, was_finished: bool) -> None:
        """Write the adapter, if any, and say where everything is."""
        if self.base:
            resume.write_adapter(self.program, state.params, self.base, self.out / ADAPTER)
        if was_finished:
            step = self.run.train.steps
            self.say(f"{self.out} is finished: step {step}; raise --train.steps to train on")
        else:
            self.say(f"{self.out}: checkpoints, {METRICS}")

    def _prepare(self, model: Model, pool: ThreadPoolExecutor) -> PolicySteps:
        """Compile, and make an engine that holds a step's samples."""
        run, rl = self.run, self.rl
        longest = run.data.context + 1
        rows = run.data.rows
        # A row of the cache holds a sample, and what rounding up to pages takes.
        engine = Engine(
            model,
            EngineSettings(
                rows=rows,
                cache_tokens=rows * (longest + 32),
                prefill_share=1.0,
                deterministic=False,  # a step's requests come together, in the same order again
                experts=True,
            ),
        )
        if cluster.current().count > 1:
            engine.warm_up()  # within a step nobody waits long for another's compiler
        sampler = Sampler(engine, model.tokenizer, self.env, rl.budget, longest)
        curated = None
        if rl.ptx:
            data = open_data(run.data.path, str(self.out), run.model.vocab, progress=self.say)
            curated = Batches(data.train, rl.ptx_rows, run.data.context, run.data.seed)
        tasks = Tasks(self.env, run, rl)
        return PolicySteps(self.program, rl, sampler, tasks, curated, pool)

    def _fit(
        self,
        state: State,
        start: int,
        steps: PolicySteps,
        checkpoints: Checkpoints,
        signals: StopSignals,
    ) -> tuple[State, int]:
        run, recovery, saver = self.run, self.recovery, Saver(checkpoints, self.say)

        def checkpoint_meta(step: int) -> dict[str, Any]:
            return resume.checkpoint_meta(run, self.base) | recovery.checkpoint_meta(step)

        def number_steps(start: int) -> Iterable[dict[str, np.ndarray]]:
            return ({"number": np.asarray(n)} for n in range(start, run.train.steps))

        def score(params: Params) -> dict[str, float]:
            steps.set_weights(params)
            return hold_scores(steps.sampler, self.rl, run.data.seed)

        callbacks = [
            Recover(recovery, saver, self.program.schedule),
            ScoreHeldout(score, run.train.eval_every, run.train.steps),
            WriteMetrics(self.out / METRICS if self.is_main else None, self.say),
            _ShowSteps(run, steps.sampler, self.say),
            Track(run, self.out),
            Abort(recovery),
            _StopBetweenPolicies(signals, self.rl.updates),
            Save(saver, run.train.save_every, checkpoint_meta, self.program.to_save),
        ]
        return fit(state, steps.take, number_steps, callbacks, start=start)


class _StopBetweenPolicies(StopOnSignal):
    """Stops on a signal, but only where the next step draws new samples."""

    def __init__(self, signals: StopSignals, updates: int):
        super().__init__(signals)
        self.updates = updates

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        action = super().on_step(step, state, metrics)
        return (
            action
            if isinstance(action, Stop) and step % self.updates == 0
            else Callback.on_step(self, step, state, metrics)
        )


class _ShowSteps(Callback):
    """Prints a line every `train.log_every` steps, of every score, and of each kind of failure."""

    def __init__(self, run: RunConfig, sampler: Sampler, say: Say):
        self.run, self.sampler, self.say = run, sampler, say
        self.shown: set[str] = set()

    def on_step(self, step: int, state: Any, metrics: dict[str, Any]) -> Action:
        last = self.run.train.steps
        self._show_failures(step)
        scored = "heldout_sampled" in metrics
        if scored or step % self.run.train.log_every == 0 or step == last:
            line = (
                f"step {step}/{last}: reward {metrics['reward']:.3f}, right"
                f" {metrics['accuracy']:.3f}, truncated {metrics['truncated']:.3f},"
                f" {metrics['samples_per_second']:,.0f} samples/s"
            )
            if scored:
                line += (
                    f"; held out: sampled {metrics['heldout_sampled']:.3f}, greedy"
                    f" {metrics['heldout_greedy']:.3f}"
                )
            self.say(line)
        return super().on_step(step, state, metrics)

    def _show_failures(self, step: int) -> None:
        """Print what a sample failed of, once each: `failed` in the metrics only counts them."""
        for failure, count in self.sampler.failures.items():
            if failure not in self.shown and len(self.shown) < MOST_FAILURES:
                self.say(f"step {step}: samples without a reward: {count}, by {failure}")
                self.shown.add(failure)
