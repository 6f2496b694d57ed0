"""One training step: the same on any mesh, in any cut of the batch, with any rematerialisation."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import (
    NS_POLYNOMIALS,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from k2jax.data import Batches
from k2jax.data.store import read, write
from k2jax.model.batch import to_devices
from k2jax.optim import POLYNOMIALS
from k2jax.params.arrays import initial
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.training.step import State, build, load_entropy

# Max abs difference over max abs of that array. Sums in another order are all that differs.
TOLERANCE = 1e-5
ROWS, LENGTH, STEPS = 8, 16, 2
RUN = RunConfig(
    model=ModelConfig(
        vocab=320, embed=16, dense_layers=1, moe_layers=1, heads=2, q_rank=8, kv_rank=8, nope=4,
        rope=4, value=4, ffw=16, experts=4, expert_ffw=8, experts_per_token=2, context=32,
        init_std=0.2,
    ),
    data=DataConfig(rows=ROWS, context=LENGTH),
    # tau is low, so that heads are clipped too.
    optim=OptimConfig(learning_rate=1e-2, warmup=1, ns_dtype="float32", tau=0.5, aux_loss=0.1),
    train=TrainConfig(steps=10, dtype="float32", remat="none"),
)  # fmt: skip
BIAS = "layers.moe.bias"
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
        "tokens": token[:, :-1], "targets": token[:, 1:], "weights": weight, "segments": segment,
        "positions": position,
    }  # fmt: skip


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


def learned(run: RunConfig) -> State:
    """The state after a step, so that no momentum is zero."""
    rows = to_devices(batch(0), run.train.accumulate)
    return stepping(run)(first_state(build(run)), rows, jnp.inf)[0]


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


QUERIES, KEYS = "dense.attention.q_up", "dense.attention.kv_up"


def attention_step(logit_max: float = 0.0, **fields) -> dict[str, np.ndarray]:
    """What two steps of the optimizer add to two matrices of ones."""
    program = build(changed("optim", **fields))
    rng = np.random.default_rng(5)
    params = {name: jnp.ones(program.specs[name].shape) for name in (QUERIES, KEYS)}
    grads = {name: jnp.asarray(rng.standard_normal(w.shape)) for name, w in params.items()}
    top = jnp.full((RUN.model.layers, RUN.model.heads), logit_max)
    state = program.tx.init(params)
    for _ in range(2):  # the second one rests on the momentum that was kept
        updates, state = program.tx.update(grads, state, params, logit_max=top)
    return jax.tree.map(np.asarray, updates)


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [
        # Relative differences of the update; the first is the same thing computed otherwise.
        ({"ns_method": "gram"}, 0, 1e-5),
        ({"momentum_dtype": "bfloat16"}, 1e-5, 1e-2),
        ({"ns_polynomial": "polar_express"}, 0.05, 1),
        ({"matrix_view": "per_head"}, 0.05, 1),
    ],
    ids=str,
)
def test_a_setting_of_muon_changes_its_step_as_much_as_it_should(fields, least, most):
    assert set(NS_POLYNOMIALS) == set(POLYNOMIALS)
    plain, found = attention_step(), attention_step(**fields)
    for name, wanted in plain.items():
        gap = np.abs(found[name] - wanted).max() / np.abs(wanted).max()
        assert least <= gap <= most, (name, gap)


def test_alpha_is_the_share_of_the_shrinking_that_queries_take():
    gamma, nope, free = 1 / 8, RUN.model.nope, attention_step()
    for alpha in (0.0, 0.25):
        found = attention_step(RUN.optim.tau / gamma, alpha=alpha)
        for name, share in ((QUERIES, alpha), (KEYS, 1 - alpha)):
            ratio = (1 + found[name])[..., :nope] / (1 + free[name])[..., :nope]
            np.testing.assert_allclose(ratio, gamma**share, rtol=1e-5)


@functools.cache
def adam_step(clip_norm: float = 0.0):
    """AdamW's step, with the weight of the balance loss as its first argument."""

    def step(weight, state, rows):
        fields = {"name": "adamw", "clip_norm": clip_norm, "aux_loss": weight}
        return build(changed("optim", **fields)).step(state, rows)

    program = build(changed("optim", name="adamw", clip_norm=clip_norm))
    return jax.jit(step), first_state(program)


def gradients(state: State) -> dict[str, np.ndarray]:
    """Of the first step, as AdamW's first moment has them."""
    (moments,) = [
        leaf.mu
        for leaf in jax.tree.leaves(state.opt, is_leaf=lambda node: hasattr(node, "mu"))
        if hasattr(leaf, "mu")
    ]
    return {name: np.asarray(mu) / (1 - RUN.optim.b1) for name, mu in moments.items()}


@pytest.mark.parametrize("remat", ["full", "offload", pytest.param("dots", marks=pytest.mark.slow)])
def test_rematerialisation_changes_nothing(remat):
    adam = changed("optim", name="adamw")  # compiles faster
    step, state = adam_step()
    wanted = []
    for number in range(STEPS):
        state, metrics = step(adam.optim.aux_loss, state, to_devices(batch(number), 1))
        wanted.append(jax.tree.map(np.asarray, metrics | state.params))
    train = dataclasses.replace(adam.train, remat=remat)
    assert_close(trained(dataclasses.replace(adam, train=train)), wanted)


def test_offloading_sends_the_inputs_of_layers_to_the_host_and_nothing_else():
    def program(remat: str) -> str:
        train = dataclasses.replace(RUN.train, remat=remat)
        found = build(dataclasses.replace(RUN, train=train))
        return str(jax.make_jaxpr(found.step)(first_state(found), to_devices(batch(0), 1)))

    assert program("offload").count("MemorySpace.Host") == 2  # of the dense stack and of the other
    assert "MemorySpace.Host" not in program("full")


def test_adamw_learns_the_rows_it_sees_again():
    step, state = adam_step()
    losses = []
    for _ in range(10):
        state, metrics = step(0.0, state, to_devices(batch(0), 1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert "clipped" not in metrics


def test_clip_norm_caps_the_gradient_and_its_metric_is_before_the_cap():
    free, cap = adam_step()[0], 0.25
    step, state = adam_step(cap)
    after, metrics = step(0.0, state, to_devices(batch(0), 1))
    _, unclipped = free(0.0, adam_step()[1], to_devices(batch(0), 1))
    norm = np.sqrt(sum((g**2).sum() for g in gradients(after).values()))
    np.testing.assert_allclose(norm, cap, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], unclipped["grad_norm"], rtol=1e-6)
    assert metrics["grad_norm"] > cap


def test_balance_loss_adds_its_weight_times_its_gradient_and_nothing_behind_the_router():
    step, state = adam_step()
    rows = to_devices(batch(0), 1)
    (zero, plain), (one, with_loss), (two, _) = (step(c, state, rows) for c in (0.0, 1.0, 2.0))
    assert plain["loss"] == with_loss["loss"]  # what is reported is the cross entropy
    grads = [gradients(after) for after in (zero, one, two)]
    added = grads[1]["layers.moe.router"] - grads[0]["layers.moe.router"]
    twice = grads[2]["layers.moe.router"] - grads[0]["layers.moe.router"]
    np.testing.assert_allclose(twice, 2 * added, atol=1e-5 * np.abs(twice).max())
    for name in ("head", "norm", "layers.moe.experts.gate", "layers.moe.shared.down"):
        np.testing.assert_array_equal(grads[0][name], grads[1][name])

    def aux(shift: float) -> float:
        router = state.params["layers.moe.router"]
        moved = state.params | {"layers.moe.router": router + shift * jnp.asarray(direction)}
        return float(step(0.0, State(moved, state.opt), rows)[1]["aux_loss"])

    direction = added / np.linalg.norm(added)
    slope = (aux(1e-3) - aux(-1e-3)) / 2e-3  # no choice changes over so short a way
    np.testing.assert_allclose(np.linalg.norm(added), slope, rtol=0.01)


@pytest.mark.slow
def test_bf16_learns_real_text_as_f32_does(tmp_path):
    text = Path(argparse.__file__).read_text()
    byte_tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    write(tmp_path / "store", [text[at : at + 4_000] for at in range(0, len(text), 4_000)],
          byte_tokenizer)  # fmt: skip
    batches = Batches(read(tmp_path / "store"), ROWS, LENGTH, 0)
    last = {}
    for dtype in ("float32", "bfloat16"):
        optim = dataclasses.replace(RUN.optim, tau=100.0, warmup=10, ns_dtype=dtype)
        train = dataclasses.replace(RUN.train, steps=200, dtype=dtype)
        program = build(dataclasses.replace(RUN, optim=optim, train=train))
        state, step, losses = first_state(program), jax.jit(program.step), []
        for number in range(200):
            state, metrics = step(state, to_devices(batches.batch(number), 1))
            losses.append(float(metrics["loss"]))
        last[dtype] = np.mean(losses[-20:])
        assert last[dtype] < losses[0] - 1
    sys.stdout.write(f"\n{last}")
    assert abs(last["bfloat16"] / last["float32"] - 1) < 0.01
