"""Spikes, counts of skipped steps, the order of batches without some, events."""

import json
import math
import random
import statistics

import pytest

from k2jax.config import HealthConfig
from k2jax.training.health import Events, Health, Order, threshold


def noisy(seed: int, count: int, level: float = 3.0, noise: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, noise) for _ in range(count)]


def test_the_threshold_is_the_median_and_deviations_over_it():
    losses = [2.0, 2.1, 1.9, 2.4, 1.6] * 4
    middle = sorted(losses)[len(losses) // 2]
    spread = statistics.median(abs(x - middle) for x in losses)
    assert middle == 2.0
    assert threshold(losses, 5.0) == pytest.approx(middle + 5 * 1.4826 * spread)


def test_one_wild_loss_hardly_moves_the_threshold():
    losses = noisy(0, 100)
    assert threshold([*losses[:-1], 1e6], 6.0) == pytest.approx(threshold(losses, 6.0), rel=0.01)


def test_losses_that_are_alike_leave_room_for_half_a_percent_each_deviation():
    assert threshold([2.0] * 50, 6.0) == pytest.approx(2.0 + 6 * 0.01)


def test_there_is_no_threshold_before_20_losses_or_when_off():
    assert threshold(noisy(0, 19), 6.0) == math.inf
    assert threshold(noisy(0, 20), 6.0) < math.inf
    assert threshold(noisy(0, 20), 0.0) == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_the_default_is_quiet_on_noise_and_on_falling_losses_and_fires_on_a_jump(seed):
    draw = random.Random(seed)
    falling = [8 * (step + 1) ** -0.2 + draw.gauss(0, 0.1) for step in range(2_000)]
    for losses in (noisy(seed, 2_000), falling):
        health = Health(HealthConfig())
        assert not any(health.judge(loss, False) for loss in losses)
        assert health.judge(losses[-1] + 1.5, False) == "spike"
        assert health.spikes == 1


def test_only_skip_refuses_steps():
    for kind in ("log", "skip", "rewind"):
        health = Health(HealthConfig(on_spike=kind))
        assert health.ceiling == math.inf
        for loss in noisy(0, 50):
            health.judge(loss, False)
        assert (health.ceiling == health.threshold) == (kind == "skip")


def test_the_loss_of_a_refused_step_counts_for_nothing():
    health = Health(HealthConfig(patience=2))
    for loss in noisy(0, 50):
        health.judge(loss, False)
    before = health.threshold
    assert health.judge(9.0, True) == "skipped"
    assert not health.lost
    assert health.judge(math.nan, True) == "skipped"
    assert health.lost
    assert health.threshold == before
    assert (health.skipped, health.spikes) == (2, 1)
    health.judge(3.0, False)
    assert not health.lost


def test_a_saved_state_goes_on_alike_but_for_steps_in_a_row():
    config = HealthConfig(window=30)
    whole, losses = Health(config), noisy(3, 80)
    for loss in losses[:50]:
        whole.judge(loss, False)
    whole.judge(math.nan, True)
    resumed = Health(config, json.loads(json.dumps(whole.state())))
    assert (resumed.in_a_row, whole.in_a_row) == (0, 1)
    for loss in losses[50:]:
        assert resumed.threshold == whole.threshold
        assert resumed.judge(loss, False) == whole.judge(loss, False)
    assert resumed.state() == whole.state()


def test_an_order_is_all_batches_in_turn_but_those_left_out():
    for left_out in ((), (0,), (3, 4, 5), (9, 2, 2, 0), range(0, 30, 3)):
        kept = [i for i in range(60) if i not in set(left_out)][:20]
        assert [Order(left_out).index(step) for step in range(20)] == kept


def test_leaving_out_steps_leaves_out_their_batches():
    order = Order([2, 5]).without(3, 5)
    assert order.left_out == [2, 4, 5, 6]
    assert [order.index(step) for step in range(6)] == [0, 1, 3, 7, 8, 9]


def test_events_are_lines_of_json_without_nan(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.add(3, "skipped", loss=math.nan, limit=math.inf, batch=2)
    events.add(4, "spike", loss=9.5)
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert first.pop("time") > 0
    assert first == {"step": 3, "event": "skipped", "loss": None, "limit": None, "batch": 2}
    assert (second["event"], second["loss"]) == ("spike", 9.5)
    Events(None).add(1, "spike")
