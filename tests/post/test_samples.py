"""Rewards of a step, and the rows that its samples become."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from small_model import SIZES

from k2jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainConfig
from k2jax.post.environment import SingleTurn
from k2jax.post.rl_config import RlConfig, check_run, configure_rl, split_settings
from k2jax.post.rollouts import Rollout
from k2jax.post.samples import (
    Tasks,
    add_curated,
    compute_rewards,
    describe_rewards,
    find_temperature,
    hold_scores,
    lay_out,
)
from k2jax.post.toy_tasks import sum2

RUN, HALVED = (
    RunConfig(
        model=ModelConfig(**SIZES),
        data=DataConfig(rows=4, context=6),
        train=TrainConfig(accumulate=accumulate),
    )
    for accumulate in (1, 2)
)


def rollout(reward=0.0, length=2, **fields):
    ids = [5, 6, *range(10, 10 + length)]
    own = [False, False] + [True] * length
    parts = {"reward": reward}
    return Rollout(ids, own, [-0.5 - i for i in range(length)], parts, **fields)


def test_truncated_samples_get_the_penalty_and_failed_ones_nothing():
    rl = RlConfig(group=2, truncation_penalty=0.5)
    rollouts = [rollout(1.0), rollout(1.0, is_truncated=True), rollout(0.5, failure="x"), rollout()]
    reward = compute_rewards(rollouts, rl, 0, 0)
    np.testing.assert_array_equal(reward, [[1.0, -0.5], [np.nan, 0.0]])
    metrics = describe_rewards(rollouts, reward)
    assert metrics["failed"] == 1 and metrics["groups_that_teach"] == 0.5


def test_metrics_leave_failed_samples_out_where_all_of_them_fail_too():
    rl = RlConfig(group=2)
    good, bad = rollout(1.0, notes={"disagreement": 0.5}), rollout(0.0, failure="x")
    good.parts["form"], bad.parts["form"] = 0.5, 0.0
    metrics = describe_rewards([good, bad], compute_rewards([good, bad], rl, 0, 0))
    assert (metrics["reward_form"], metrics["reward_reward"]) == (0.5, 1.0)
    assert (metrics["reward"], metrics["env_disagreement"]) == (1.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = describe_rewards([bad, bad], compute_rewards([bad, bad], rl, 0, 0))
    assert np.isnan(metrics["reward"]) and metrics["groups_that_teach"] == 0


def test_toggle_takes_the_reward_of_long_answers_in_every_second_phase_where_most_are_right():
    rl = RlConfig(group=4, toggle=2, toggle_accuracy=0.7, toggle_share=0.5)
    good = [rollout(1.0, n) for n in (1, 2, 3, 9)]
    poor = [rollout(1.0, 9), rollout(1.0, 1), rollout(), rollout()]
    on, off = (compute_rewards(good + poor, rl, step, 0) for step in (1, 2))
    np.testing.assert_array_equal(on, [[1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(off, [[1, 1, 1, 1], [1, 1, 0, 0]])


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    rl = RlConfig(group=2, control="shuffled_rewards")
    rollouts = [rollout(float(i)) for i in range(8)]
    shuffled = compute_rewards(rollouts, rl, 3, 0).ravel()
    assert sorted(shuffled) == list(range(8)) and list(shuffled) != list(range(8))


def test_a_row_is_a_sample_shifted_by_one():
    rows = lay_out(
        [rollout(1.0, 2), rollout(0.0, 3)], np.array([[1.0, 0.0]]), RlConfig(group=2), RUN, 0.7
    )
    np.testing.assert_array_equal(rows["token"][0], [5, 6, 10, 0, 0, 0])
    np.testing.assert_array_equal(rows["target"][0], [6, 10, 11, 0, 0, 0])
    np.testing.assert_array_equal(rows["weight"][1], [0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["sampled"][1], [0, -0.5, -1.5, -2.5, 0, 0])
    np.testing.assert_array_equal(rows["segment"][1], [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(rows["advantage"], [0.5, -0.5])
    np.testing.assert_allclose(rows["share"], [0.5, 0.5])
    np.testing.assert_allclose(rows["temperature"], 0.7)
    assert (rows["expert"] == -1).all()


def test_a_row_has_the_experts_of_all_tokens_but_the_last():
    chosen = np.arange(6, dtype=np.int16).reshape(3, 1, 2)
    rows = lay_out([rollout(experts=chosen)] * 2, np.zeros((1, 2)), RlConfig(group=2), RUN, 1.0)
    np.testing.assert_array_equal(rows["expert"][1, :3], chosen)
    assert (rows["expert"][:, 3:] == -1).all()


def test_curated_rows_are_in_every_micro_batch_and_share_one_mean():
    rows = lay_out([rollout()] * 4, np.zeros((2, 2)), RlConfig(group=2), RUN, 1.0)
    names = ("tokens", "targets", "weights", "segments", "positions")
    curated = {name: np.ones((2, 6), np.int32) for name in names}
    joined = add_curated(rows, curated, HALVED)
    assert joined["token"].shape == (6, 6)
    np.testing.assert_allclose(joined["curated"], [0, 0, 1 / 12] * 2)


def test_temperature_falls_evenly():
    rl = RlConfig(temperature=1.0, final_temperature=0.5)
    assert [find_temperature(rl, step, 11) for step in (0, 5, 10)] == [1.0, 0.75, 0.5]


def test_an_empty_split_is_named_or_not_scored():
    empty = SingleTurn("none", 4, lambda split: [], lambda prompt, reply: 0.0)
    with pytest.raises(ConfigError, match="none has no tasks in its split 'train'"):
        Tasks(empty, RUN, RlConfig(group=2))
    assert hold_scores(SimpleNamespace(env=empty), RlConfig(), 0) == {}


def run_of(**train):
    model = ModelConfig(**SIZES)
    return RunConfig(model=model, data=DataConfig(rows=8, context=12), train=TrainConfig(**train))


def test_tasks_of_a_step_follow_from_its_number():
    tasks = Tasks(sum2(), run_of(), RlConfig(group=4))
    steps = [tasks.of_step(step) for step in range(20)]
    assert steps == [Tasks(sum2(), run_of(), RlConfig(group=4)).of_step(s) for s in range(20)]
    assert all(len({t.number for t in step}) == 2 and len(step) == 8 for step in steps)
    assert len({t.seed for step in steps for t in step}) == 160


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tua": "1"}, "did you mean 'tau'"),
        ({"loss": "ppo"}, "rl.loss"),
        ({"loss": "grpo", "tau": "1"}, "no effect"),
        ({"ptx_rows": "4"}, "no effect"),
        ({"group": "1"}, "at least 2"),
    ],
)
def test_mistakes_are_one_line(settings, words):
    with pytest.raises(ConfigError, match=words):
        configure_rl(settings)


def test_a_run_that_samples_do_not_fit_is_refused():
    for rl, words in (
        (RlConfig(group=3), "6 or 9"),
        (RlConfig(updates=3), "save_every"),
        (RlConfig(ptx=0.1, ptx_rows=3), "ptx_rows"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_run(run_of(accumulate=2), rl)
    rest, own = split_settings({"data.rows": "8", "rl.tau": "1"})
    assert (rest, own) == ({"data.rows": "8"}, {"tau": "1"})
