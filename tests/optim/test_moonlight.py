"""Twenty steps beside a transcription of Moonlight's published update, in NumPy and in PyTorch."""

import jax
import numpy as np
import optax
import pytest

from k2jax.optim import Matrices, muon, muonclip

STEPS, RATE, DECAY, MOMENTUM = 20, 2e-2, 0.1, 0.95
SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (16, 16)}


def problem() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(0)

    def draw():
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}

    return draw(), [draw() for _ in range(STEPS)]


def transcribed(weights, grads) -> dict[str, np.ndarray]:
    """Float64, one matrix after the other, as spec 2.1 restates toy_train.py."""
    found = {}
    for name, start in weights.items():
        w, m = start.astype(np.float64), 0.0
        for grad in grads:
            g = grad[name].astype(np.float64)
            m = MOMENTUM * m + g
            x = g + MOMENTUM * m
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / (np.linalg.norm(x) + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if x.shape != w.shape else x
            w = w * (1 - RATE * DECAY) - RATE * 0.2 * max(w.shape) ** 0.5 * x
        found[name] = w
    return found


def ours(tx, weights, grads):
    update, state = jax.jit(tx.update), tx.init(weights)
    for grad in grads:
        updates, state = update(grad, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


@pytest.mark.parametrize("make", [muon, muonclip])
def test_twenty_steps_are_those_of_the_published_update(make):
    weights, grads = problem()
    name = "dtype" if make is muon else "ns_dtype"
    found = ours(make(RATE, weight_decay=DECAY, **{name: "float32"}), weights, grads)
    for key, right in transcribed(weights, grads).items():
        np.testing.assert_allclose(found[key], right, atol=1e-5)


def test_a_stack_moves_as_its_matrices_do():
    weights, grads = problem()

    def stack(tree):
        return {"w": np.stack([tree["wide"], tree["tall"].T])}

    tx = muon(RATE, {"w": Matrices((1,), (2,), (0,))}, DECAY, dtype="float32")
    found = ours(tx, stack(weights), list(map(stack, grads)))["w"]
    right = transcribed(weights, grads)
    np.testing.assert_allclose(found, np.stack([right["wide"], right["tall"].T]), atol=1e-5)


def test_momentum_may_be_kept_in_bfloat16():
    weights, grads = problem()
    tx = muon(RATE, weight_decay=DECAY, dtype="float32", momentum_dtype="bfloat16")
    assert {m.dtype.name for m in jax.tree.leaves(tx.init(weights)) if m.ndim} == {"bfloat16"}
    found = ours(tx, weights, grads)
    for name, right in transcribed(weights, grads).items():
        gap = np.abs(found[name] - right).max()
        assert 1e-5 < gap < 2e-2, name  # three digits of momentum; weights moved by about 0.05


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps_are_those_of_pytorch(dtype):
    torch = pytest.importorskip("torch")
    weights, grads = problem()
    found = ours(muon(RATE, weight_decay=DECAY, dtype=dtype), weights, grads)
    for name in weights:
        w = torch.tensor(weights[name])
        m = torch.zeros_like(w)
        for grad in grads:
            g = torch.tensor(grad[name])
            m.mul_(MOMENTUM).add_(g)
            x = g.add(m, alpha=MOMENTUM).to(getattr(torch, dtype))
            x = x.T if x.size(0) > x.size(1) else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if x.shape != w.shape else x
            w.mul_(1 - RATE * DECAY).add_(x.float(), alpha=-RATE * 0.2 * max(w.shape) ** 0.5)
        # bfloat16 rounds in another order: both keep two to three digits of each update.
        np.testing.assert_allclose(found[name], w, atol=1e-5 if dtype == "float32" else 1e-2)
