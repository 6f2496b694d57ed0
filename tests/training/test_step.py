"""One training step: the same on any mesh and in any cut of the batch, or refused bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import (
    BIAS,
    RUN,
    assert_close,
    batch,
    changed,
    first_state,
    learned,
    right,
    stepping,
    trained,
)

from k2jax.config import MeshConfig, RunConfig
from k2jax.model.batch import to_devices
from k2jax.training.step import build, load_entropy

# Compiling takes seconds a mesh; tests/model/test_mesh.py has the gradients on more of them.
MESHES = [
    MeshConfig(data=2, expert=2, model=2),
    MeshConfig(replica=2, expert=2, context=2),
    *(
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in (
            MeshConfig(data=2),
            MeshConfig(expert=4),
            MeshConfig(model=2),
            MeshConfig(replica=2, data=2, context=2),
            MeshConfig(data=2, expert=2, context=2),
        )
    ),
]


def test_the_steps_move_every_weight_clip_heads_and_miss_some_targets():
    start = jax.tree.map(np.asarray, first_state(build(RUN)).params)
    for name, value in start.items():
        assert np.abs(right()[0][name] - value).max() > 0, name
    assert 0 < right()[0]["clipped"] <= 1
    assert right()[0]["loss"] > 0


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses_and_updated_weights_are_those_of_one_device_on(mesh):
    assert_close(trained(dataclasses.replace(RUN, mesh=mesh)))


def test_two_micro_batches_are_one_batch():
    found = trained(changed("train", accumulate=2))
    assert_close(found)
    for step, values in enumerate(right()):
        # A maximum and a sum: neither is changed by the cut.
        np.testing.assert_array_equal(found[step]["expert_load"], values["expert_load"])
        np.testing.assert_allclose(found[step]["logit_max"], values["logit_max"], rtol=1e-6)


def test_router_bias_moves_by_the_centred_rule_alone():
    before = np.asarray(first_state(build(RUN)).params[BIAS])
    for values in right():
        load = values["expert_load"]
        sign = np.sign(load.mean(axis=-1, keepdims=True) - load)
        moved = RUN.optim.bias_rate * (sign - sign.mean(axis=-1, keepdims=True))
        np.testing.assert_array_equal(values[BIAS], before + moved.astype(np.float32))
        before = values[BIAS]


def test_every_choice_of_a_token_is_counted_once():
    tokens = (batch(0)["segments"] > 0).sum()
    load = right()[0]["expert_load"]
    np.testing.assert_array_equal(load.sum(axis=-1), tokens * RUN.model.experts_per_token)


def spoilt(run: RunConfig, how: str):
    """A state, rows and a ceiling with which the next step must be refused."""
    state, rows, ceiling = learned(run), batch(1), jnp.inf
    if how == "loss":  # one target among many, in the first micro-batch
        rows["weights"][0, 0] = np.nan
    if how == "gradient":  # its square is beyond float32, the loss is not
        state = state._replace(params=state.params | {"head": state.params["head"] * 1e30})
    if how == "weight":  # of a token that no row has: nothing else shows it
        token = np.setdiff1d(np.arange(RUN.model.vocab), rows["tokens"])[0]
        embed = state.params["embed"].at[token, 3].set(np.nan)
        state = state._replace(params=state.params | {"embed": embed})
    if how == "ceiling":
        ceiling = 1.0
    return state, to_devices(rows, run.train.accumulate), ceiling


@pytest.mark.parametrize("how", ["loss", "gradient", "weight", "ceiling"])
@pytest.mark.parametrize(
    "run",
    [
        RUN,
        changed("train", accumulate=2),
        changed("optim", name="adamw"),
        changed("optim", name="adamw", weight_decay=0.0),
    ],
    ids=["muonclip", "two micro-batches", "adamw", "no decay"],
)
def test_a_step_that_must_not_be_taken_leaves_every_bit_of_the_state(run, how):
    state, rows, ceiling = spoilt(run, how)
    after, metrics = stepping(run)(state, rows, ceiling)
    assert metrics["skipped"] == 1
    assert np.isfinite(metrics["loss"]) == (how != "loss")
    assert np.isfinite(metrics["grad_norm"]) == (how in ("weight", "ceiling"))
    for (path, old), new in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(after), strict=True
    ):
        same = np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert same, jax.tree_util.keystr(path)
    if how == "loss":  # and the next one is as if nothing had been
        good = to_devices(batch(2), run.train.accumulate)
        further, metrics = stepping(run)(after, good, jnp.inf)
        wanted, _ = stepping(run)(state, good, jnp.inf)
        assert metrics["skipped"] == 0
        jax.tree.map(np.testing.assert_array_equal, further, wanted)


def test_weights_stay_where_a_finite_gradient_would_throw_them_out_of_range():
    run = changed("optim", name="adamw", learning_rate=1e30)
    state = first_state(build(run))
    after, metrics = jax.jit(build(run).step)(state, to_devices(batch(0), 1))
    assert metrics["skipped"] == 1 and np.isfinite(metrics["grad_norm"])
    assert np.isinf(metrics["update_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_norms_clip_rates_and_the_entropy_of_the_load_are_what_numpy_says():
    state = learned(RUN)
    after, metrics = stepping(RUN)(state, to_devices(batch(1), 1), jnp.inf)
    moved = [np.asarray(after.params[name]) - w for name, w in state.params.items() if name != BIAS]
    norm = np.sqrt(sum((np.float64(u) ** 2).sum() for u in moved))
    # Differences of rounded weights are not quite what was added.
    np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-4)
    size = sum(u.size for u in moved)
    np.testing.assert_allclose(metrics["update_rms"], norm / size**0.5, rtol=1e-4)
    np.testing.assert_allclose(metrics["clipped_layers"].mean(), metrics["clipped"], rtol=1e-6)
    assert metrics["clipped_layers"].shape == (RUN.model.layers,)
    (load,) = np.float64(metrics["expert_load"])
    share = load[load > 0] / load.sum()
    entropy = -(share * np.log(share)).sum() / np.log(RUN.model.experts)
    np.testing.assert_allclose(metrics["load_entropy"], entropy, rtol=1e-6)


def test_load_entropy_is_1_where_even_and_0_with_one_expert():
    load = jnp.float32([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(load_entropy(load), [1, 0, 0.5, 0], atol=1e-7)
