"""What a run notices of itself between two steps: speed, memory, sick steps, a profile."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from k2jax.config import ConfigError, RunConfig, one_line
from k2jax.params.arrays import Params
from k2jax.params.counts import count_flops
from k2jax.runtime.hardware import peak_of
from k2jax.training.health import Events, Health, Order
from k2jax.training.metrics import Speed
from k2jax.training.saver import Saves

EVENTS = "events.jsonl"
REPLAY = "replay"
PROFILE = "profile"


def speed_of(run: RunConfig) -> Speed:
    """How a run's seconds become rates, on the devices that are here."""
    peak = peak_of(jax.devices()[0].device_kind) * run.mesh.devices
    work = count_flops(run.model, run.data.context)
    return Speed(run.data.rows * run.data.context, work["train_flops_per_token"], peak)


class Watch:
    """The health of a run, and which batches it takes."""

    def __init__(self, run: RunConfig, out: Path, say: Callable[[str], None]):
        """Nothing is written before something happens."""
        self.run, self.out, self.say = run, out, say
        self.health, self.order = Health(run.health), Order()
        self.events = Events(out / EVENTS if jax.process_index() == 0 else None, say)
        self.back: int | None = None
        self._rewinds: Counter[int] = Counter()

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Go on from a checkpoint with this `meta`, or from nothing; what is left out stays so."""
        self.health = Health(self.run.health, meta.get("health"))
        saved = meta.get("data", {}).get("left_out", ())
        self.order = Order([*saved, *self.order.left_out])
        self.back = None

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        data = {"step": step, "left_out": self.order.left_out}
        return {"data": data, "health": self.health.state()}

    def judge(self, step: int, values: dict[str, Any]) -> str:
        """`Health.judge` of a step's metrics; what is sick is an event and a line."""
        limit, loss = self.health.threshold, values["loss"]
        found = self.health.judge(loss, bool(values["skipped"]))
        if found:
            batch = self.order.index(step - 1)
            norm = values["grad_norm"]
            self.events.add(step, found, loss=loss, limit=limit, grad_norm=norm, batch=batch)
            what = "is a spike" if loss > limit else "is finite, what it does to the weights is not"
            what = what if np.isfinite(loss) else "is not finite"
            done = ": step skipped" if found == "skipped" else ""
            self.say(f"step {step}: loss {loss:.4f} {what}{done}")
        return found

    def applied(self, step: int, verdict: str) -> int:
        """How many steps before `step` moved the weights."""
        return step - 1 - self.health.skipped + (verdict == "skipped")

    def goes_back(self, step: int, verdict: str, saves: Saves) -> bool:
        """Whether to go back to the checkpoint `back`, before the spike of `step`.

        All batches since then are left out, those before the spike too: what makes a spike is
        batches and the state they meet, and the state is what they made it [PaLM 5.1].

        Damaged ones above it are set aside.

        Raises:
            ConfigError: this was tried too often, or no checkpoint is intact.
        """
        if verdict != "spike" or self.run.health.on_spike != "rewind":
            return False
        saves.settle()
        newest = saves.checkpoints.recover(self.say)
        good = [done for done in saves.checkpoints.steps() if done < step]
        # One of a stopped run comes second: a run without that stop would not have it.
        back = max(good, key=lambda done: (done % self.run.train.save_every == 0, done), default=0)
        if jax.process_count() > 1:  # another process may have listed one that is being deleted
            back = int(multihost_utils.broadcast_one_to_all(np.int32(back)))
        if not back:
            self.say("no checkpoint to go back to yet")
            return False
        if back != newest:
            saves.checkpoints.check(back)  # before what came after it is deleted
        self._rewinds[back] += 1
        if self._rewinds[back] > self.run.health.patience:
            self.events.add(step, "stopped", to=back)
            raise ConfigError(
                f"the loss spiked after each of {self.run.health.patience} rewinds to step {back}:"
                " other batches do not help; lower optim.learning_rate"
            )
        left_out = [self.order.index(back), self.order.index(step - 1)]
        self.order = self.order.without(back, step)
        self.events.add(step, "rewound", to=back, left_out=left_out)
        self.say(f"back to step {back}; batches {left_out[0]} to {left_out[1]} are left out")
        saves.drop_after(back)
        self.back = back
        return True

    def lost(self, step: int, loss: float, params: Params, rows: Mapping[str, np.ndarray]) -> str:
        """Keep the batch, and say in one line why a run that skips step after step ends."""
        file = self._keep(step, rows)
        sick = not_finite(params)
        if sick:
            hint = f"weight {sick[0]!r} is not finite: go on from an older checkpoint"
        elif loss > self.health.threshold:
            hint = "is health.spike too low for this run?"
        else:
            hint = "lower optim.learning_rate, or look at the batch"
        self.events.add(step, "stopped", loss=loss, weights=sick, file=file)
        return (
            f"{self.health.in_a_row} steps in a row were skipped, up to step {step} with loss"
            f" {loss:.6g}; {hint} ({self.out / file})"
        )

    def _keep(self, step: int, rows: Mapping[str, np.ndarray]) -> str:
        """This host's rows, with what else a replay needs; the file's name in the run's folder."""
        host = f".host-{jax.process_index()}" if jax.process_count() > 1 else ""
        file = f"{REPLAY}/step-{step}{host}.npz"
        index, seed = self.order.index(step - 1), self.run.data.seed
        try:
            (self.out / REPLAY).mkdir(exist_ok=True)
            np.savez(self.out / file, step=step, index=index, seed=seed, **rows)  # type: ignore[arg-type]
        except OSError as error:
            self.say(f"the batch could not be kept: {error.strerror}")
        return file


def not_finite(params: Params) -> list[str]:
    """Names of the weights that hold a number that is not finite."""
    check = jax.jit(lambda tree: jax.tree.map(lambda w: jnp.isfinite(w).all(), tree))
    return [name for name, good in jax.device_get(check(params)).items() if not good]


def timed(rows: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Each item, and the seconds it was waited for."""
    while True:
        began = time.perf_counter()
        try:
            item = next(rows)
        except StopIteration:
            return
        yield item, time.perf_counter() - began


@contextlib.contextmanager
def profiler(run: RunConfig, out: Path, events: Events) -> Iterator[Any]:
    """What to call before each step: it starts and ends the trace of `train.profile`.

    Raises:
        ConfigError: another trace is being taken in this process.
    """
    window = run.train.profiled
    taken: list[int] = []

    def stop() -> None:
        jax.profiler.stop_trace()
        events.add(taken[-1], "profiled", file=PROFILE, steps=[taken[0], taken[-1]])
        taken.clear()

    def before(step: int) -> None:
        if taken and step not in window:
            stop()
        if not taken and step in window:
            try:
                jax.profiler.start_trace(out / PROFILE)
            except Exception as error:
                raise ConfigError(f"train.profile cannot start: {one_line(error)}") from error
        if step in window:
            taken.append(step)

    try:
        yield before
    finally:
        if taken:
            stop()
