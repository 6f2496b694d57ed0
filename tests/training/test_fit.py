"""The loop itself, with steps that only count: its callbacks, and what they can ask for."""

import jax.numpy as jnp
import pytest

from k2jax.training.callbacks import Callback, Continue, RewindTo, Stop
from k2jax.training.loop import fit


def add(state: float, batch: float) -> tuple[float, dict]:
    """A step that adds its batch to the state."""
    return state + batch, {"loss": state + batch}


def batches(start: int):
    """Five in all; the batch of step n is n."""
    return iter(range(start + 1, 6))


class Record(Callback):
    """Writes down every call."""

    def __init__(self, name: str = "", calls: list | None = None):
        self.name = name
        self.calls = [] if calls is None else calls

    def begin(self, step):
        self.calls.append((f"begin{self.name}", step))

    def before_step(self, step, batch):
        self.calls.append((f"before{self.name}", step, batch))

    def on_step(self, step, state, metrics):
        self.calls.append((f"step{self.name}", step, state))
        return Continue()

    def end(self, step, state):
        self.calls.append((f"end{self.name}", step, state))

    def close(self):
        self.calls.append((f"close{self.name}",))


class StopWhen(Callback):
    """Stops as soon as the loss is as large as this."""

    def __init__(self, loss: float):
        self.loss = loss

    def on_step(self, step, state, metrics):
        return Stop() if metrics["loss"] >= self.loss else Continue()


class RewindOnce(Callback):
    """Goes back from one step to another, the first time."""

    def __init__(self, at: int, to: int):
        self.at, self.to = at, to
        self.done = False

    def on_step(self, step, state, metrics):
        if step != self.at or self.done:
            return Continue()
        self.done = True
        return RewindTo(self.to)


def steps(record: Record) -> list[int]:
    return [call[1] for call in record.calls if call[0] == "step"]


def test_it_takes_a_step_for_every_batch():
    record = Record()
    assert fit(0, add, batches, [record]) == (15, 5)
    assert steps(record) == [1, 2, 3, 4, 5]
    assert [call for call in record.calls if call[0] not in ("step", "before")] == [
        ("begin", 0),
        ("end", 5, 15),
        ("close",),
    ]
    assert record.calls[1:3] == [("before", 1, 1), ("step", 1, 1)]


def test_it_starts_where_it_is_asked_to():
    record = Record()
    assert fit(6, add, batches, [record], start=3) == (15, 5)
    assert steps(record) == [4, 5] and record.calls[0] == ("begin", 3)


def test_a_callback_stops_it_and_the_others_still_see_that_step():
    before, after = Record(), Record()
    assert fit(0, add, batches, [before, StopWhen(6), after]) == (6, 3)
    assert steps(before) == steps(after) == [1, 2, 3]
    assert after.calls[-2:] == [("end", 3, 6), ("close",)]


def test_a_callback_rewinds_it_and_the_ones_after_it_never_see_the_undone_step():
    before, after, restored = Record(), Record(), []

    def restore(step: int) -> float:
        restored.append(step)
        return {2: 3.0}[step]

    assert fit(0, add, batches, [before, RewindOnce(4, 2), after], restore=restore) == (15, 5)
    assert restored == [2]
    assert steps(before) == [1, 2, 3, 4, 3, 4, 5]
    assert steps(after) == [1, 2, 3, 3, 4, 5]
    begins = [call for call in after.calls if call[0] in ("begin", "end", "close")]
    assert begins == [("begin", 0), ("close",), ("begin", 2), ("end", 5, 15), ("close",)]


def test_a_rewind_takes_the_batches_that_it_asks_for_then():
    """What a callback leaves out when it rewinds is left out: batches are asked for anew."""
    left_out: set[int] = set()

    class LeaveOut(RewindOnce):
        def on_step(self, step, state, metrics):
            action = super().on_step(step, state, metrics)
            if isinstance(action, RewindTo):
                left_out.update((3, 4))
            return action

    def kept(start: int):
        return iter([n for n in range(1, 6) if n not in left_out][start:])

    state, step = fit(0, add, kept, [LeaveOut(4, 2)], restore=lambda step: 3.0)
    assert (state, step) == (1 + 2 + 5, 3)


def test_a_rewind_that_cannot_be_restored_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="no `restore`"):
        fit(0, add, batches, [RewindOnce(2, 1)])


def test_the_state_that_a_rewind_leaves_is_freed_before_the_other_is_read():
    last = {}

    def keep(state, batch):
        last["state"] = state + batch
        return last["state"], {"loss": 0.0}

    def restore(step: int):
        assert last["state"].is_deleted()
        return jnp.float32(1)

    state, _ = fit(jnp.float32(0), keep, batches, [RewindOnce(3, 1)], restore=restore)
    assert state == 15


def test_an_error_closes_every_callback_and_the_input_and_ends_none():
    calls: list = []

    class Fail(Callback):
        def on_step(self, step, state, metrics):
            raise RuntimeError("no")

    class Input:
        def __iter__(self):
            return batches(0)

        def close(self):
            calls.append(("closed input",))

    with pytest.raises(RuntimeError, match="no"):
        fit(0, add, lambda start: Input(), [Record("A", calls), Record("B", calls), Fail()])
    assert calls[-3:] == [("closed input",), ("closeB",), ("closeA",)]
    assert not any(call[0].startswith("end") for call in calls)


def test_a_callback_sees_what_the_ones_before_it_added_and_how_long_the_step_took():
    seen: list[dict] = []

    class Add(Callback):
        def on_step(self, step, state, metrics):
            metrics["twice"] = 2 * metrics["loss"]
            return Continue()

    class Look(Callback):
        def on_step(self, step, state, metrics):
            seen.append(dict(metrics))
            return Continue()

    fit(0, add, batches, [Add(), Look()])
    assert [one["twice"] for one in seen] == [2, 6, 12, 20, 30]
    assert all(one["seconds"] >= 0 and one["input_seconds"] >= 0 for one in seen)


def test_callbacks_need_no_hook_that_they_do_not_use():
    assert fit(0, add, batches, [Callback()]) == (15, 5)
