"""A kernel that is wrong is refused before a run trains with it."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from k2jax import sharding
from k2jax.config import ConfigError, MeshConfig, ModelConfig
from k2jax.model import kernel_check as check
from k2jax.ops.limits import ATTENTION_BLOCK
from k2jax.ops.moe import dispatch
from k2jax.ops.moe.dispatch import Dispatch

ALLTOALL = Dispatch("alltoall", 0.5)
CFG = ModelConfig(nope=16, rope=8, value=16)


@pytest.fixture
def mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=4))):
        yield


def test_right_kernels_pass(mesh):
    check.check_kernels(ALLTOALL, CFG, ATTENTION_BLOCK)


def test_wrong_products_are_refused(monkeypatch):
    @jax.custom_vjp
    def wrong(x, w, size):
        return right(x, w, size)

    right = check.grouped_matmul
    wrong.defvjp(
        lambda x, w, size: (right(x, w, size), (x, w)),
        lambda saved, dy: (dy @ saved[1][0].T, jnp.zeros_like(saved[1]), None),
    )
    monkeypatch.setattr(check, "grouped_matmul", wrong)
    with pytest.raises(ConfigError, match="grouped products: wrong gradients of the rows on cpu"):
        check.check_kernels(Dispatch(), CFG, ATTENTION_BLOCK)


def test_an_exchange_that_loses_rows_is_refused(mesh, monkeypatch):
    right = dispatch.ragged_exchange

    def lossy(rows, slices, into, axis, back=False):
        return right(rows, slices._replace(size=slices.size // 2), into, axis, back)

    monkeypatch.setattr(dispatch, "ragged_exchange", lossy)
    with pytest.raises(ConfigError, match="the exchange of tokens: wrong values on cpu"):
        check.check_kernels(ALLTOALL, CFG, ATTENTION_BLOCK)


@pytest.fixture
def no_products(monkeypatch):
    monkeypatch.setattr(check, "_products", lambda: (jnp.dot, jnp.dot, lambda: [jnp.ones(2)] * 2))


@pytest.mark.parametrize("config", [None, MeshConfig(data=2)], ids=str)
def test_right_attention_passes(config, no_products):
    with jax.set_mesh(sharding.make_mesh(config)) if config else contextlib.nullcontext():
        check.check_kernels(Dispatch(), CFG, ATTENTION_BLOCK + 1)


def steeper(y, top):
    return 2 * y - jax.lax.stop_gradient(y), top


@pytest.mark.parametrize(
    ("part", "wrong"),
    [("largest logits", lambda y, top: (y, 1.1 * top)), ("gradients of the queries", steeper)],
)
def test_wrong_attention_is_refused(part, wrong, no_products, monkeypatch):
    right = check.blockwise_attention
    monkeypatch.setattr(check, "blockwise_attention", lambda *args: wrong(*right(*args)))
    with pytest.raises(ConfigError, match=f"attention: wrong {part} on cpu"):
        check.check_kernels(Dispatch(), CFG, ATTENTION_BLOCK + 1)
