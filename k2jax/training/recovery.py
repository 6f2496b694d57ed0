"""Acts on sick steps: leaves out batches, rewinds to a checkpoint, or ends the run in one line."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from k2jax.config import ConfigError, RunConfig
from k2jax.params.arrays import Params
from k2jax.training.compile import are_finite
from k2jax.training.events import EVENTS, Events
from k2jax.training.health import Health
from k2jax.training.saver import Saver

REPLAY = "replay"


class Order:
    """Which batch a step takes: all in turn, but those left out."""

    def __init__(self, left_out: Iterable[int] = ()):
        """Leave out the batches with these indices."""
        self.left_out = sorted(set(left_out))

    def find_batch(self, step: int) -> int:
        """Return the batch of `step` (0, 1, ...): the step-th of those not left out."""
        for out in self.left_out:
            step += out <= step
        return step

    def leave_out(self, first: int, last: int) -> "Order":
        """Return this order, less the batches of steps `first` to `last` - 1."""
        return Order([*self.left_out, *map(self.find_batch, range(first, last))])


class Recovery:
    """The health of a run, which batches it takes, and what it does about sick steps."""

    def __init__(self, run: RunConfig, out: Path, say: Callable[[str], None]):
        """Write nothing before something happens."""
        self.run, self.out, self.say = run, out, say
        self.health, self.order = Health(run.health), Order()
        self.events = Events(out / EVENTS if jax.process_index() == 0 else None, say)
        self._rewinds: Counter[int] = Counter()

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Resume from a checkpoint with this `meta`, or start anew; what is left out stays so."""
        self.health = Health(self.run.health, meta.get("health"))
        saved = meta.get("data", {}).get("left_out", ())
        self.order = Order([*saved, *self.order.left_out])

    def checkpoint_meta(self, step: int) -> dict[str, Any]:
        """Return what the checkpoint of a step keeps of this."""
        data = {"step": step, "left_out": self.order.left_out}
        return {"data": data, "health": self.health.state()}

    def judge(self, step: int, values: dict[str, Any]) -> str:
        """Return `Health.judge` of a step's metrics; a sick step is an event and a line."""
        limit, loss = self.health.threshold, values["loss"]
        targets = values.get("targets", 1.0)
        verdict = self.health.judge(loss, bool(values["skipped"]), targets)
        if verdict == "untaught":
            self.events.add(step, verdict, batch=self.order.find_batch(step - 1))
            self.say(f"step {step}: its batch has no targets, so it teaches nothing")
        elif verdict:
            batch = self.order.find_batch(step - 1)
            norm = values["grad_norm"]
            self.events.add(step, verdict, loss=loss, limit=limit, grad_norm=norm, batch=batch)
            what = "is a spike" if loss > limit else "is finite, what it does to the weights is not"
            what = what if np.isfinite(loss) else "is not finite"
            done = ": step skipped" if verdict == "skipped" else ""
            self.say(f"step {step}: loss {loss:.4f} {what}{done}")
        return verdict

    def count_applied(self, step: int, verdict: str) -> int:
        """Count the steps before `step` that moved the weights."""
        return step - 1 - self.health.skipped + (verdict in ("skipped", "untaught"))

    def maybe_rewind(self, step: int, verdict: str, saver: Saver) -> int | None:
        """Prepare to go back before the spike of `step`; return the step to restore, or None.

        All batches since then are left out, those before the spike too: what makes a spike is
        batches and the state they meet, and the state is what they made it [PaLM 5.1].

        Damaged checkpoints above that step are set aside, and intact ones deleted.

        Raises:
            ConfigError: this was tried too often, or no checkpoint is intact.
        """
        if verdict != "spike" or self.run.health.on_spike != "rewind":
            return None
        saver.settle()
        newest = saver.checkpoints.recover(self.say)
        good = [done for done in saver.checkpoints.steps() if done < step]
        # One of a stopped run comes second: a run without that stop would not have it.
        back = max(good, key=lambda done: (done % self.run.train.save_every == 0, done), default=0)
        if jax.process_count() > 1:  # another process may have listed one that is being deleted
            back = int(multihost_utils.broadcast_one_to_all(np.int32(back)))
        if not back:
            self.say("no checkpoint to go back to yet")
            return None
        if back != newest:
            saver.checkpoints.check(back)  # before what came after it is deleted
        self._rewinds[back] += 1
        if self._rewinds[back] > self.run.health.patience:
            self.events.add(step, "stopped", to=back)
            raise ConfigError(
                f"the loss spiked after each of {self.run.health.patience} rewinds to step {back}:"
                " other batches do not help; lower optim.learning_rate"
            )
        left_out = [self.order.find_batch(back), self.order.find_batch(step - 1)]
        self.order = self.order.leave_out(back, step)
        self.events.add(step, "rewound", to=back, left_out=left_out)
        self.say(f"back to step {back}; batches {left_out[0]} to {left_out[1]} are left out")
        saver.drop_after(back)
        return back

    def describe_failure(
        self, step: int, loss: float, params: Params, rows: Mapping[str, np.ndarray]
    ) -> str:
        """Keep the batch, and say in one line why a run that skips step after step ends."""
        file = self._keep(step, rows)
        sick = find_non_finite(params)
        if sick:
            hint = f"weight {sick[0]!r} is not finite: resume from an older checkpoint"
        elif loss > self.health.threshold:
            hint = "is health.spike too low for this run?"
        else:
            hint = "lower optim.learning_rate, or look at the batch"
        self.events.add(step, "stopped", loss=loss, weights=sick, file=file)
        return (
            f"{self.health.skipped_in_a_row} steps in a row were skipped, up to step {step} with"
            f" loss {loss:.6g}; {hint} ({self.out / file})"
        )

    def _keep(self, step: int, rows: Mapping[str, np.ndarray]) -> str:
        """Write this host's rows and what else a replay needs; return the file's name."""
        host = f".host-{jax.process_index()}" if jax.process_count() > 1 else ""
        file = f"{REPLAY}/step-{step}{host}.npz"
        index, seed = self.order.find_batch(step - 1), self.run.data.seed
        try:
            (self.out / REPLAY).mkdir(exist_ok=True)
            np.savez(self.out / file, step=step, index=index, seed=seed, **rows)  # type: ignore[arg-type]
        except OSError as error:
            self.say(f"the batch could not be kept: {error.strerror}")
        return file


def find_non_finite(params: Params) -> list[str]:
    """Return the names of the weights that hold a number that is not finite."""
    good = jax.device_get(jax.jit(are_finite)(params))
    return [name for name, is_good in good.items() if not is_good]
