"""Means over nothing: rows without targets add nothing, are counted, and never make NaN."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import LENGTH, ROWS, RUN, rows

from k2jax.config import HealthConfig
from k2jax.evals.perplexity import HeldOut, total_loss
from k2jax.model.batch import Batch
from k2jax.params.arrays import initial
from k2jax.training.health import Health
from k2jax.training.step import build

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
KINDS = ("targets", "prompt only", "padding")


@functools.cache
def prepared():
    program = build(RUN)
    state = program.init(initial(program.specs, 0, RUN.model.init_std))
    return program, state, jax.jit(program.step)


def rows_of(kinds) -> Batch:
    """Rows of each kind: with targets, with tokens but none, with nothing at all."""
    batch = jax.tree.map(lambda a: np.array(a[0]), rows())
    for i, kind in enumerate(kinds):
        if kind != "targets":
            batch.weight[i] = 0
        if kind == "padding":
            for array in batch[:-1]:
                array[i] = 0
    return batch


@hypothesis.settings(deadline=None, derandomize=True, max_examples=25)
@hypothesis.given(st.lists(st.sampled_from(KINDS), min_size=ROWS, max_size=ROWS))
def test_a_step_over_any_rows_is_finite_and_moves_nothing_without_targets(kinds):
    _, state, step = prepared()
    batch = rows_of(kinds)
    after, metrics = step(state, jax.tree.map(lambda a: jnp.asarray(a[None]), batch))
    taught = "targets" in kinds
    assert metrics["targets"] == batch.weight.sum() == kinds.count("targets") * LENGTH
    assert metrics["skipped"] == (not taught)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(after.params))
    same = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    ]
    assert taught or all(same)


def test_rows_without_targets_do_not_change_the_mean():
    _, state, _ = prepared()
    full = rows_of(["targets"] * ROWS)
    half = jax.tree.map(lambda a: a[: ROWS // 2], full)
    padded = rows_of(["targets"] * (ROWS // 2) + ["padding"] * (ROWS // 2))
    means = []
    for batch in (half, padded):
        nll, count = total_loss(state.params, batch, RUN.model, "float32")
        means.append(HeldOut(float(nll), float(count), 1).nats_per_token)
    assert math.isclose(*means, rel_tol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "expert": 2}])
def test_on_a_mesh_too(mesh, axes):
    from k2jax.model.batch import to_devices

    mesh(**axes)
    program = build(RUN)
    state = program.init(initial(program.specs, 0, RUN.model.init_std))
    names = ("tokens", "targets", "weights", "segments", "positions")
    for kinds in (["padding"] * ROWS, ["prompt only"] * ROWS, ["targets", *["padding"] * 3]):
        batch = dict(zip(names, rows_of(kinds)[:5], strict=True))
        _, metrics = jax.jit(program.step)(state, to_devices(batch, 1))
        assert metrics["skipped"] == ("targets" not in kinds)
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])


def test_an_evaluation_of_nothing_is_0_over_0_tokens():
    nothing = HeldOut(0.0, 0.0, 0)
    assert (nothing.nats_per_token, nothing.bits_per_byte) == (0.0, 0.0)


def test_batches_without_targets_are_counted_and_never_end_a_run():
    """They say nothing about the learning rate."""
    health = Health(HealthConfig())
    for _ in range(10 * health.config.patience):
        assert health.judge(0.0, True, 0.0) == "untaught"
    assert health.skipped == 10 * health.config.patience and not health.should_abort
    assert not health.losses
