"""Sick steps in a run: logged, skipped or rewound, and a run without hope ends in one line."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import changed, damage, events, losses, state, state_of, terminating

from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, RunConfig, to_json
from k2jax.data import Batches
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics
from k2jax.training.recovery import Order
from k2jax.training.replay import replay


def test_an_order_is_all_batches_in_turn_but_those_left_out():
    for left_out in ((), (0,), (3, 4, 5), (9, 2, 2, 0), range(0, 30, 3)):
        kept = [i for i in range(60) if i not in set(left_out)][:20]
        assert [Order(left_out).find_batch(step) for step in range(20)] == kept


def test_leaving_out_steps_leaves_out_their_batches():
    order = Order([2, 5]).leave_out(3, 5)
    assert order.left_out == [2, 4, 5, 6]
    assert [order.find_batch(step) for step in range(6)] == [0, 1, 3, 7, 8, 9]


def test_steps_that_cannot_be_taken_end_the_run_in_one_line_and_the_batch_is_kept(run, again):
    hot = changed(run, "optim", learning_rate=1e30)
    hot = changed(changed(hot, "train", steps=20), "health", patience=4)
    with pytest.raises(ConfigError) as error:
        train(hot, again, say=lambda line: None)
    file = again / "replay/step-7.npz"
    assert re.fullmatch(
        rf"4 steps in a row were skipped, up to step 7 with loss \d\.\d+; lower"
        rf" optim.learning_rate, or look at the batch \({file}\)",
        str(error.value),
    )
    assert [line["skipped"] for line in read_metrics(again)] == [0, 0, 0, 1, 1, 1, 1]
    assert [line["event"] for line in events(again)] == ["skipped"] * 4 + ["stopped"]
    found, before = state(run, again, 6), state(run, again, 3)
    for name in (name for name in before if "params" in name):
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    kept = dict(np.load(file))
    assert (kept["step"], kept["index"], kept["seed"]) == (7, 6, run.data.seed)
    assert kept["tokens"].shape == (8, 32)
    assert replay(again, 7)["skipped"] == 1
    assert replay(again, 7)["loss"] == pytest.approx(losses(again)[6], rel=1e-6)
    with pytest.raises(ConfigError, match=r"no file .*; there are: step-7\.npz"):
        replay(again, 6)


def test_a_weight_that_is_not_finite_is_named(run, tmp_path):
    sick = state_of(run, tmp_path / "sick")
    sick["params"]["dense.mlp.up"] = sick["params"]["dense.mlp.up"].at[0, 3, 5].set(np.nan)
    with Checkpoints(tmp_path / "sick") as saved:
        saved.save(2, sick, {"config": to_json(run), "data": {"step": 2}})
    with pytest.raises(ConfigError) as error:
        train(changed(run, "health", patience=2), tmp_path / "sick", say=lambda line: None)
    says = "2 steps in a row were skipped, up to step 4 with loss nan; weight 'dense.mlp.up' is not"
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


SICK = 33  # index of the batch that is spoilt


@pytest.fixture(scope="module")
def longer(run) -> RunConfig:
    """So many steps that a spike can be told; checkpoints of steps 30 and 36 come around it."""
    run = changed(run, "train", steps=44, eval_every=0, eval_rows=8, save_every=6)
    return changed(run, "health", window=20)


def spoil(monkeypatch, sick: int = SICK) -> None:
    """The targets of batch `sick` become a token that hardly ever comes."""
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        return rows | {"targets": np.full_like(rows["targets"], 575)} if index == sick else rows

    monkeypatch.setattr(Batches, "batch", batch)


def leave_out(monkeypatch, first: int, last: int) -> None:
    """There never are batches `first` to `last`."""
    whole = Batches.batch

    def moved(index):
        return index + (index >= first) * (last - first + 1)

    monkeypatch.setattr(
        Batches, "batch", lambda self, index, **hosts: whole(self, moved(index), **hosts)
    )


def same_state(run: RunConfig, one: Path, other: Path, step: int) -> None:
    found, right = state(run, one, step), state(run, other, step)
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_spike_is_logged_and_learned_from_by_default(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    lines = []
    train(longer, tmp_path / "out", say=lines.append)
    (event,) = events(tmp_path / "out")
    assert (event["event"], event["step"], event["batch"]) == ("spike", SICK + 1, SICK)
    assert event["loss"] > event["limit"]
    assert any(re.fullmatch(r"step 34: loss \d\.\d+ is a spike", line) for line in lines)
    assert not any(line["skipped"] for line in read_metrics(tmp_path / "out"))


def test_a_spike_is_skipped_and_a_run_stopped_after_it_goes_on_alike(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    skipping = changed(longer, "health", on_spike="skip")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(skipping, whole, say=lambda line: None)
    lines = list(read_metrics(whole))
    assert [line["step"] for line in lines if line["skipped"]] == [SICK + 1]
    # The schedule counts steps that were taken.
    assert lines[SICK]["learning_rate"] == lines[SICK + 1]["learning_rate"]
    assert lines[-1]["learning_rate"] < lines[-2]["learning_rate"]
    train(skipping, stopped, say=terminating(SICK + 4, []))
    train(skipping, stopped, say=lambda line: None)
    assert losses(stopped) == losses(whole)
    same_state(longer, stopped, whole, 44)
    meta = Checkpoints(stopped).meta(44)
    assert meta["health"]["skipped"] == 1
    assert meta["health"]["spikes"] == 1
    assert meta["data"] == {"step": 44, "left_out": []}


@pytest.mark.slow
def test_a_rewound_run_is_the_one_that_never_had_those_batches(longer, tmp_path, monkeypatch):
    rewinding = changed(longer, "health", on_spike="rewind")
    found, before, after, right = (
        tmp_path / name for name in ("found", "before", "after", "right")
    )
    with monkeypatch.context() as patch:
        spoil(patch)
        lines = []
        train(rewinding, found, say=lines.append)
        # Stopped before the spike, with a checkpoint that `found` has not, and after it.
        train(rewinding, before, say=terminating(SICK, []))
        train(rewinding, after, say=terminating(31, [], after="back to"))
        assert Checkpoints(after).latest() == 31
        for out in (before, after):
            train(rewinding, out, say=lambda line: None)
    assert f"back to step 30; batches 30 to {SICK} are left out" in lines
    assert [(e["event"], e["step"]) for e in events(found)] == [("spike", 34), ("rewound", 34)]
    assert events(found)[1]["left_out"] == [30, SICK]
    leave_out(monkeypatch, 30, SICK)
    train(rewinding, right, say=lambda line: None)
    for out in (found, before, after):
        assert losses(out) == losses(right)
        assert [line["step"] for line in read_metrics(out)] == list(range(1, 45))
        same_state(longer, out, right, 44)
        assert Checkpoints(out).meta(44)["data"]["left_out"] == [30, 31, 32, 33]


def test_a_rewind_to_a_damaged_checkpoint_goes_to_the_one_before(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    out, lines = tmp_path / "out", []

    def say(line: str) -> None:
        lines.append(line)
        if line.endswith("is a spike"):
            while not (out / "checkpoints/30").exists():  # it is being written
                time.sleep(0.05)
            damage(out / "checkpoints/30/params")

    train(changed(longer, "health", on_spike="rewind"), out, say=say)
    assert f"back to step 24; batches 24 to {SICK} are left out" in lines
    assert (out / "checkpoints/30.damaged").is_dir()
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 45))


def test_a_run_that_spikes_after_every_rewind_ends_in_one_line(longer, tmp_path, monkeypatch):
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        return rows | {"targets": np.full_like(rows["targets"], 575)} if index >= SICK else rows

    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(ConfigError) as error:
        rewinding = changed(longer, "health", on_spike="rewind", patience=2)
        train(rewinding, tmp_path / "out", say=lambda line: None)
    says = "the loss spiked after each of 2 rewinds to step 30: other batches do not help;"
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_steps_without_a_finite_loss_are_left_out_of_everything(longer, tmp_path, monkeypatch):
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        if index in (3, 4):
            rows["weights"][1, 2] = np.nan
        return rows

    monkeypatch.setattr(Batches, "batch", batch)
    train(longer, tmp_path / "out", say=(lines := []).append)
    found = list(read_metrics(tmp_path / "out"))
    assert [line["step"] for line in found if line["skipped"]] == [4, 5]
    assert found[3]["loss"] is None  # JSON has no NaN
    assert found[-1]["loss"] < found[0]["loss"]
    assert "step 4: loss nan is not finite: step skipped" in lines
