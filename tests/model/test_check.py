"""A kernel that is wrong is refused before a run trains with it."""

import jax
import jax.numpy as jnp
import pytest

from k2jax import sharding
from k2jax.config import ConfigError, MeshConfig
from k2jax.model import check, dispatch
from k2jax.model.dispatch import Dispatch

EXCHANGE = Dispatch("exchange", 0.5)


@pytest.fixture
def mesh():
    with jax.set_mesh(sharding.make(MeshConfig(data=2, expert=4))):
        yield


def test_right_kernels_pass(mesh):
    check.check_kernels(EXCHANGE)


def test_wrong_products_are_refused(monkeypatch):
    @jax.custom_vjp
    def wrong(x, w, size):
        return check_grouped(x, w, size)

    check_grouped = check.grouped
    wrong.defvjp(
        lambda x, w, size: (check_grouped(x, w, size), (x, w)),
        lambda saved, dy: (dy @ saved[1][0].T, jnp.zeros_like(saved[1]), None),
    )
    monkeypatch.setattr(check, "grouped", wrong)
    with pytest.raises(ConfigError, match="grouped products: wrong gradients of the rows on cpu"):
        check.check_kernels(Dispatch())


def test_an_exchange_that_loses_rows_is_refused(mesh, monkeypatch):
    right = dispatch.exchange

    def lossy(rows, pieces, into, axis, back=False):
        return right(rows, pieces._replace(size=pieces.size // 2), into, axis, back)

    monkeypatch.setattr(dispatch, "exchange", lossy)
    with pytest.raises(ConfigError, match="the exchange of tokens: wrong values on cpu"):
        check.check_kernels(EXCHANGE)
