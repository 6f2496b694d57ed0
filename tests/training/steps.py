"""Steps of one small model, which several files of tests compare."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import sharding
from k2jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from k2jax.model.batch import to_devices
from k2jax.params.arrays import initial
from k2jax.training.step import State, build

# Max abs difference over max abs of that array. Sums in another order are all that differs.
TOLERANCE = 1e-5
ROWS, LENGTH, STEPS = 8, 16, 2
RUN = RunConfig(
    model=ModelConfig(
        vocab=320,
        embed=16,
        dense_layers=1,
        moe_layers=1,
        heads=2,
        q_rank=8,
        kv_rank=8,
        nope=4,
        rope=4,
        value=4,
        ffw=16,
        experts=4,
        expert_ffw=8,
        experts_per_token=2,
        context=32,
        init_std=0.2,
    ),
    data=DataConfig(rows=ROWS, context=LENGTH),
    # tau is low, so that heads are clipped too.
    optim=OptimConfig(learning_rate=1e-2, warmup=1, ns_dtype="float32", tau=0.5, aux_loss=0.1),
    train=TrainConfig(steps=10, dtype="float32", remat="none"),
)
BIAS = "layers.moe.bias"


def changed(section: str, **fields) -> RunConfig:
    return dataclasses.replace(
        RUN, **{section: dataclasses.replace(getattr(RUN, section), **fields)}
    )


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of two documents; the second half of the rows ends in padding of unequal length."""
    rng = np.random.default_rng(step)
    token = rng.integers(0, RUN.model.vocab, (ROWS, LENGTH + 1), np.int32)
    segment, position = np.zeros((2, ROWS, LENGTH), np.int32)
    weight = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        cut, end = 5 + row % 4, LENGTH - (row - 3 if row >= ROWS // 2 else 0)
        for number, (first, last) in enumerate([(0, cut), (cut, end)], start=1):
            segment[row, first:last] = number
            position[row, first:last] = np.arange(last - first)
            weight[row, first : last - 1] = 1.0
    return {
        "tokens": token[:, :-1],
        "targets": token[:, 1:],
        "weights": weight,
        "segments": segment,
        "positions": position,
    }


def first_state(program) -> State:
    params = initial(program.specs, 3, RUN.model.init_std)
    # Biases that start at 0 could not show a decay.
    params[BIAS] = params[BIAS] + jnp.float32([0.25, -0.5, 0.125, 0.75])
    return jax.jit(program.init)(params)


@functools.cache
def stepping(run: RunConfig):
    return jax.jit(build(run).step)


def trained(run: RunConfig) -> list[dict[str, np.ndarray]]:
    """Metrics and weights after each step; `run.mesh` is used if it splits anything."""

    def steps():
        state, step, found = first_state(build(run)), stepping(run), []
        for number in range(STEPS):
            rows = to_devices(batch(number), run.train.accumulate)
            state, metrics = step(state, rows, jnp.inf)
            found.append(jax.tree.map(np.asarray, metrics | state.params))
        return found

    if run.mesh.devices == 1:
        return steps()
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        return steps()


@functools.cache
def right() -> list[dict[str, np.ndarray]]:
    return trained(RUN)


def assert_close(found, wanted=None) -> None:
    errors = {
        (step + 1, name): np.abs(found[step][name] - value).max() / max(np.abs(value).max(), 1e-9)
        for step, values in enumerate(wanted or right())
        for name, value in values.items()
    }
    assert np.isfinite(list(errors.values())).all()
    worst = max(errors, key=errors.get)
    sys.stdout.write(f"\n{errors[worst]:.1e} step, name = {worst}")  # shown with pytest -s
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


def learned(run: RunConfig) -> State:
    """The state after a step, so that no momentum is zero."""
    rows = to_devices(batch(0), run.train.accumulate)
    return stepping(run)(first_state(build(run)), rows, jnp.inf)[0]
