"""What a step minimises can be any function of weights and a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps

from k2jax.config import DataConfig, OptimConfig, TrainConfig
from k2jax.model import Kimi, Policy, hidden, losses
from k2jax.model.batch import Batch
from k2jax.params.arrays import bind, initial
from k2jax.training.step import build, make_step

ROWS, LENGTH, STEPS = 4, 12, 8
RUN = dataclasses.replace(
    steps.RUN,
    model=dataclasses.replace(steps.RUN.model, vocab=64, init_std=0.1),
    data=DataConfig(rows=ROWS, context=LENGTH),
    optim=OptimConfig(name="adamw", learning_rate=2e-2, warmup=1),
    train=TrainConfig(steps=100, dtype="float32", remat="none"),
)
POLICY = Policy("float32")


def rows(micros: int = 1) -> Batch:
    """Rows of one document each; every target counts."""
    token = np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH + 1), np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    batch = Batch(token[:, :-1], token[:, 1:], ones.astype(np.float32), ones, place)
    return jax.tree.map(lambda a: jnp.asarray(a.reshape(micros, -1, LENGTH)), batch)


def even_places(params, batch: Batch):
    """Cross-entropy of the tokens at even places, and the accuracy of what is predicted."""
    w = bind(Kimi(RUN.model), params)
    x_BTD, aux = hidden(w, batch, RUN.model, POLICY)
    nll_BT = losses(w.head, x_BTD, batch.target, POLICY)
    weight_BT = batch.weight * (batch.position % 2 == 0)
    total = batch.weight.sum() if batch.total is None else batch.total
    sure = ((nll_BT < 0.69) * weight_BT).sum() / (total / 2)
    return (nll_BT * weight_BT).sum() / (total / 2), aux._replace(metrics={"sure": sure})


@functools.cache
def first_state():
    program = build(RUN)
    return jax.jit(program.init)(initial(program.specs, 3, RUN.model.init_std))


@functools.cache
def stepping(micros: int):
    run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, accumulate=micros))
    program = build(run)
    return jax.jit(make_step(even_places, program.tx, run, program.specs))


def test_a_second_objective_trains_through_the_same_step():
    state, step, seen = first_state(), stepping(1), []
    for _ in range(STEPS):
        state, metrics = step(state, rows())
        seen.append({name: float(metrics[name]) for name in ("loss", "sure", "skipped")})
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.3
    assert not any(one["skipped"] for one in seen)
    # What is reported is what was differentiated, where an objective reports no `loss` of its own.
    loss, aux = jax.jit(even_places)(state.params, jax.tree.map(lambda a: a[0], rows()))
    _, metrics = step(state, rows())
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["sure"], aux.metrics["sure"], rtol=1e-6)


def test_only_what_it_scores_changes_its_gradient():
    """Targets at odd places are not in this objective, so the step is the same bit for bit."""
    odd = rows()._replace(target=rows().target.at[..., 1::2].set(0))
    after, other = (stepping(1)(first_state(), batch)[0] for batch in (rows(), odd))
    jax.tree.map(np.testing.assert_array_equal, after.params, other.params)


def test_micro_batches_add_up_to_a_batch_for_any_objective():
    whole, parts = (stepping(micros)(first_state(), rows(micros))[1] for micros in (1, 2))
    assert whole.keys() == parts.keys()
    for name in ("loss", "sure", "grad_norm", "logit_max"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, err_msg=name)


def test_a_step_of_any_objective_can_be_refused():
    state, step = first_state(), stepping(1)
    after, metrics = step(state, rows(), 0.5)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_objective_of_pretraining_minimises_the_weighted_sum_of_what_it_reports():
    model = dataclasses.replace(RUN.model, mtp_layers=1)
    optim = dataclasses.replace(RUN.optim, aux_loss=0.1, mtp_loss=0.5)
    program = build(dataclasses.replace(RUN, model=model, optim=optim))
    params = initial(program.specs, 3, RUN.model.init_std)
    loss, aux = jax.jit(program.objective)(params, jax.tree.map(lambda a: a[0], rows()))
    parts = aux.metrics["loss"] + 0.1 * aux.aux_loss + 0.5 * aux.metrics["mtp_loss"]
    np.testing.assert_allclose(loss, parts, rtol=1e-6)
    for name in ("loss", "mtp_loss"):
        assert aux.metrics[name] == pytest.approx(np.log(64), rel=0.2)
