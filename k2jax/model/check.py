"""Before training on an accelerator: do its kernels compute what their references do?

A kernel may compile and still be wrong on a chip, a driver or a version that nobody tried; a run
would then learn something else without a sign of it.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from k2jax.config import ConfigError
from k2jax.model.dispatch import AXIS, Dispatch, exchanged, gathered
from k2jax.ops.grouped import grouped
from k2jax.sharding import BATCH, meshless

# Of the largest right value. bfloat16 rounds by 2^-9; what is wrong is off by far more.
LIMIT = 0.02
PARTS = ("values", "gradients of the rows", "gradients of the matrices")
ROWS, WIDTH, HIDDEN = 1_024, 256, 512
TOKENS, NARROW = 24, 128  # of the exchange, a device
SIZES = (300, 0, 514, 130)  # a group may be empty, and the last rows are nobody's


def check_kernels(dispatch: Dispatch) -> None:
    """Run each kernel that the mesh in use would train with beside its reference.

    Raises:
        ConfigError: values or gradients differ.
    """
    _agree("grouped products", *_products())
    if not meshless() and dispatch.kind != "gather" and jax.sharding.get_mesh().shape[AXIS] > 1:
        _agree("the exchange of tokens", *_layer(dispatch))


def _agree(name: str, fast: Callable, slow: Callable, args: Sequence[jax.Array]) -> None:
    """Compare values and gradients."""

    @jax.jit
    def errors(*args):
        found, right = (_differentiated(run, args) for run in (fast, slow))
        far = lambda a, b: jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-6)
        wide = lambda a: a.astype(jnp.float32)
        return jnp.stack([far(wide(a), wide(b)) for a, b in zip(found, right, strict=True)])

    for part, error in zip(PARTS, jax.device_get(errors(*args)), strict=True):
        if not error <= LIMIT:  # not a number is wrong too
            raise ConfigError(
                f"{name}: wrong {part} on {jax.devices()[0].device_kind}, off by {error:.1%};"
                " another version of jax or of the driver may be right, this one must not train"
            )


def _differentiated(run: Callable, args: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Values, and gradients by two arguments for an output gradient that is not constant."""
    y, back = jax.vjp(run, *args)
    return y, *back(jnp.cos(y))


def _drawn(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) / shape[-2] ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


def _products():
    """Products of groups, and the same by masks."""
    ends = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    row_M1 = np.arange(ROWS)[:, None]

    def masked(x_MK, w_EKN):
        own = [(row_M1 >= e - n) & (row_M1 < e) for e, n in zip(ends, SIZES, strict=True)]
        parts = [jnp.where(mine, x_MK @ w_KN, 0) for mine, w_KN in zip(own, w_EKN, strict=True)]
        return sum(parts[1:], parts[0])

    def by_groups(x_MK, w_EKN):
        y_MN = grouped(x_MK, w_EKN, jnp.array(SIZES, jnp.int32))
        return jnp.where(row_M1 < ends[-1], y_MN, 0)

    args = _drawn((ROWS, WIDTH), (len(SIZES), WIDTH, HIDDEN))
    if meshless():
        return by_groups, masked, args
    alone = functools.partial(jax.shard_map, in_specs=P(), out_specs=P(), check_vma=False)
    return alone(by_groups), alone(masked), args


def _layer(dispatch: Dispatch):
    """Tokens exchanged, and gathered; two experts a device, one of which gets a third."""
    mesh = jax.sharding.get_mesh()
    experts = 2 * mesh.shape[AXIS]

    def on_mesh(run):
        def one(x_ND, w_EDF):
            row_N = jnp.arange(x_ND.shape[0]) + jax.lax.axis_index(AXIS)
            first_N = jnp.where(row_N % 3 == 0, 0, row_N % experts)
            expert_NK = jnp.stack([first_N, (first_N + 1 + row_N % (experts - 1)) % experts], 1)
            weight_NK = jnp.stack([jnp.sin(row_N), jnp.cos(row_N)], 1).astype(jnp.float32)
            weights = (w_EDF, 2 * w_EDF, w_EDF.swapaxes(1, 2))
            return run(x_ND, expert_NK.astype(jnp.int32), weight_NK, weights)

        return jax.shard_map(one, in_specs=(spread, held), out_specs=spread, check_vma=False)

    spread, held = P((*BATCH, "context", "model")), P(AXIS)
    x_ND, w_EDF = _drawn((TOKENS * mesh.size, NARROW), (experts, NARROW, NARROW))
    placed = jax.reshard(x_ND, spread), jax.reshard(w_EDF, held)
    # Nothing may be dropped here, so that both are the same.
    dropless = dispatch._replace(kind="exchange")

    def by_exchange(x_ND, expert_NK, weight_NK, weights):
        return exchanged(x_ND, expert_NK, weight_NK, weights, dropless)[0]

    return on_mesh(by_exchange), on_mesh(gathered), placed
