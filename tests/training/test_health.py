"""Spikes and counts of skipped steps, from recent losses."""

import json
import math
import random
import statistics

import pytest

from k2jax.config import HealthConfig
from k2jax.training.health import Health, spike_threshold


def noisy(seed: int, count: int, level: float = 3.0, noise: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, noise) for _ in range(count)]


def test_the_threshold_is_the_median_and_deviations_over_it():
    losses = [2.0, 2.1, 1.9, 2.4, 1.6] * 4
    middle = sorted(losses)[len(losses) // 2]
    spread = statistics.median(abs(x - middle) for x in losses)
    assert middle == 2.0
    assert spike_threshold(losses, 5.0) == pytest.approx(middle + 5 * 1.4826 * spread)


def test_one_wild_loss_hardly_moves_the_threshold():
    losses = noisy(0, 100)
    calm, wild = spike_threshold(losses, 6.0), spike_threshold([*losses[:-1], 1e6], 6.0)
    assert wild == pytest.approx(calm, rel=0.01)


def test_losses_that_are_alike_leave_room_for_half_a_percent_each_deviation():
    assert spike_threshold([2.0] * 50, 6.0) == pytest.approx(2.0 + 6 * 0.01)


def test_there_is_no_threshold_before_20_losses_or_when_off():
    assert spike_threshold(noisy(0, 19), 6.0) == math.inf
    assert spike_threshold(noisy(0, 20), 6.0) < math.inf
    assert spike_threshold(noisy(0, 20), 0.0) == math.inf


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
    assert not health.should_abort
    assert health.judge(math.nan, True) == "skipped"
    assert health.should_abort
    assert health.threshold == before
    assert (health.skipped, health.spikes) == (2, 1)
    health.judge(3.0, False)
    assert not health.should_abort


def test_a_saved_state_goes_on_alike_but_for_steps_skipped_in_a_row():
    config = HealthConfig(window=30)
    whole, losses = Health(config), noisy(3, 80)
    for loss in losses[:50]:
        whole.judge(loss, False)
    whole.judge(math.nan, True)
    resumed = Health(config, json.loads(json.dumps(whole.state())))
    assert (resumed.skipped_in_a_row, whole.skipped_in_a_row) == (0, 1)
    for loss in losses[50:]:
        assert resumed.threshold == whole.threshold
        assert resumed.judge(loss, False) == whole.judge(loss, False)
    assert resumed.state() == whole.state()
