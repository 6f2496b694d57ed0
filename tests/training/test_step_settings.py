"""What the settings of a run change in a step, and what they must not."""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import LENGTH, ROWS, RUN, STEPS, assert_close, batch, changed, first_state, trained

from k2jax.config import NS_POLYNOMIALS
from k2jax.data import Batches
from k2jax.data.store import read, write
from k2jax.model.batch import to_devices
from k2jax.optim import POLYNOMIALS
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.training.step import State, build

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
    write(
        tmp_path / "store",
        [text[at : at + 4_000] for at in range(0, len(text), 4_000)],
        byte_tokenizer,
    )
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
