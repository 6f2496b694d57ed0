"""Losses part by part of the vocabulary are losses of whole logits."""

import functools

import jax
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig, ModelConfig
from k2jax.model import Policy
from k2jax.model import logits as module
from k2jax.params.arrays import bind
from k2jax.params.declare import Declare

ROWS, LENGTH, WIDTH, VOCAB = 4, 6, 8, 48


class Head:
    def __init__(self):
        self.head = Declare(ModelConfig(vocab=VOCAB, embed=WIDTH))("embed vocab", 1, "head")


def drawn():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    w = rng.standard_normal((WIDTH, VOCAB)).astype(np.float32) * 3
    target = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    return w, x, target, rng.standard_normal((ROWS, LENGTH)).astype(np.float32)


def differentiated(w, x, target, dy):
    policy = Policy("float32")

    def losses(w, x):
        return module.losses(bind(Head(), {"head": w}).head, x, target, policy)

    y, back = jax.vjp(losses, w, x)
    return [y, *back(dy)]


@pytest.mark.parametrize("config", [None, MeshConfig(data=2, expert=2, model=2)], ids=str)
def test_parts_give_the_losses_and_gradients_of_the_whole(config, monkeypatch):
    inputs = drawn()
    right = jax.device_get(jax.jit(differentiated)(*inputs))
    rows = 1 if config else ROWS
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * rows * LENGTH * 8)
    if config is None:
        found = jax.jit(functools.partial(differentiated))(*inputs)
    else:
        axes = (module.WEIGHT, (*module.ROWS, None), module.ROWS, module.ROWS)
        with jax.set_mesh(sharding.make_mesh(config)):

            def place(a):
                return jax.NamedSharding(jax.sharding.get_mesh(), sharding.storage_spec(a))

            placed = [jax.device_put(a, place(dims)) for a, dims in zip(inputs, axes, strict=True)]
            assert module._chunks(placed[1], placed[0]) == 3
            found = jax.jit(functools.partial(differentiated))(*placed)
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert np.abs(np.asarray(a) - b).max() <= 2e-6 * np.abs(b).max(), i


def test_parts_are_the_fewest_of_one_size_that_fit(monkeypatch):
    w, x, _, _ = drawn()
    for limit, parts in [
        (2**29, 1),
        (4 * ROWS * LENGTH * 47, 2),
        (4 * ROWS * LENGTH * 7, 8),
        (1, 48),
    ]:
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        assert module._chunks(x, w) == parts
