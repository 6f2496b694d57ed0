"""Bring tokens to the devices that hold their experts, and the results back: two ways.

Everything here sees one device (`shard_map`). Along the mesh axis `expert` each device holds
`E / P` experts, in order, and a share of the tokens.

* `dispatch_allgather`: every device sees the tokens of all of them, runs its experts on those that
  chose them, and the sums are scattered back. Bytes a token grow with the axis.
* `dispatch_alltoall`: one row per (token, choice) is sent to the expert's device and back, whatever
  the size of the axis. How many rows a device receives is known only once the router has chosen, so
  they are exchanged in rounds of a fixed buffer: as many as the fullest device needs, the same
  number everywhere. One round in all but badly balanced steps, and nothing is ever dropped, unless
  the kind is `alltoall_capacity`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.ops.collectives import Pieces, exchange, scatter_sum
from k2jax.ops.moe.expert_mlp import (
    Weights,
    expert_mlp,
    permute_rows,
    permute_tokens,
    sort_by_expert,
    sorted_mlp,
    unpermute_and_sum,
)

AXIS = "expert"
ALIGNED = 8  # rows of a buffer are a multiple of this


class Dispatch(NamedTuple):
    """How tokens meet their experts; the fields of `TrainConfig`."""

    kind: str = "allgather"
    buffer: float = 2.0


def choose_dispatch() -> Dispatch:
    """The exchange that needs less memory on the mesh in use, for as many tokens as in training.

    Gathered, a device has rows for the tokens of every device along `expert`; exchanged, `buffer`
    times its own share.
    """
    default, mesh = Dispatch(), jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape[AXIS]
    return default._replace(kind="alltoall") if devices > default.buffer else default


def dispatch_allgather(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """This device's tokens through their experts. `weights` are those of its own experts."""
    gather = lambda a: jax.lax.all_gather(a, AXIS, tiled=True)
    first = jax.lax.axis_index(AXIS) * weights[0].shape[0]
    y_ND = expert_mlp(gather(x_ND), gather(expert_NK) - first, gather(weight_NK), weights)
    return scatter_sum(y_ND, AXIS, 0)


def dispatch_alltoall(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights,
    dispatch: Dispatch,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The same, and the share of choices that was dropped.

    A choice's output is weighted where its expert is, and a token's are added up in float32 where
    it came from, so that the backward pass need not bring outputs back again.
    """
    devices = jax.lax.axis_size(AXIS)
    experts = weights[0].shape[0] * devices
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, experts)
    size_PE = jax.lax.all_gather(size_E, AXIS)
    length = buffer_rows(order_M.shape[0], devices, dispatch.buffer)
    if dispatch.kind == "alltoall_capacity":
        sent_PE, rounds = _within(size_PE, devices, length), jnp.int32(1)
    else:
        sent_PE, rounds = size_PE, _rounds(size_PE, devices, length)
    x_MD = permute_tokens(x_ND, order_M, place_M)
    weight_M1 = permute_rows(weight_NK.reshape(-1, 1), order_M, place_M)
    sizes = Sizes(_begin(size_PE, 1), sent_PE, rounds)
    y_MD = _in_rounds(x_MD, weight_M1, weights, sizes, length)
    return unpermute_and_sum(
        y_MD, order_M, place_M, x_ND.shape[0]
    ), 1 - sent_PE.sum() / size_PE.sum()


def buffer_rows(pairs: int, devices: int, buffer: float) -> int:
    """Rows a device receives in a round: `buffer` times its share, at most all there are."""
    aligned = -(-int(pairs * buffer) // ALIGNED) * ALIGNED
    return min(aligned, pairs * devices)


class Sizes(NamedTuple):
    """What every device sends to every expert, [senders, experts], and in how many rounds."""

    first: jax.Array  # row of the sender where an expert's begin
    sent: jax.Array  # how many of them travel
    rounds: jax.Array


def _begin(size: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(size, axis=axis) - size


def _received(size_PE: jax.Array, devices: int) -> jax.Array:
    """Rows for each device."""
    return size_PE.sum(axis=0).reshape(devices, -1).sum(axis=1)


def _rounds(size_PE: jax.Array, devices: int, length: int) -> jax.Array:
    """How many the fullest device anywhere needs: loops with exchanges in them run in step."""
    fullest = _received(size_PE, devices).max()
    everywhere = tuple(jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.pmax(-(-fullest // length), everywhere)


def _within(size_PE: jax.Array, devices: int, length: int) -> jax.Array:
    """What fits: a device that gets too much takes the same share for each of its experts."""
    share_P = jnp.minimum(length / jnp.maximum(_received(size_PE, devices), 1), 1)
    share_E = jnp.repeat(share_P, size_PE.shape[1] // devices)
    kept_E = jnp.floor(size_PE.sum(axis=0) * share_E).astype(size_PE.dtype)
    return jnp.clip(kept_E - _begin(size_PE, 0), 0, size_PE)


def _round(sizes: Sizes, length: int, turn: jax.Array) -> tuple[Pieces, jax.Array]:
    """What is sent in a round, and the rows that each expert of this device gets.

    The rows for a device, expert after expert and for each sender after sender, are a sequence;
    round i carries its rows from `i length` to `(i + 1) length`.
    """
    sent_PE = sizes.sent
    devices = sent_PE.shape[0]
    begin_E = _begin(sent_PE.sum(axis=0).reshape(devices, -1), 1).reshape(-1)
    place_PE = begin_E + _begin(sent_PE, 0) - turn * length
    low_PE = jnp.clip(-place_PE, 0, sent_PE)
    high_PE = jnp.clip(length - place_PE, 0, sent_PE)
    pieces = Pieces(sizes.first + low_PE, high_PE - low_PE, place_PE + low_PE)
    return pieces, pieces.size.sum(axis=0).reshape(devices, -1)[jax.lax.axis_index(AXIS)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_rounds(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, sizes: Sizes, length: int
) -> jax.Array:
    """Sorted rows through their experts; those that do not travel give 0.

    Rows go there, through the experts and back into their places, a round at a time. The backward
    pass goes through the rounds again and makes what it needs of each anew.
    """

    def one(turn, y):
        pieces, size_E = _round(sizes, length, turn)
        x_LD, weight_L1 = _there((rows, weight_M1), pieces, length)
        y_LD = sorted_mlp(x_LD, weight_L1, weights, size_E)
        return exchange(_apart(y_LD), pieces, y, AXIS, back=True)

    rows = _apart(x_MD)
    return _flat(jax.lax.fori_loop(0, sizes.rounds, one, jnp.zeros_like(rows)))


def _there(rows: tuple[jax.Array, ...], pieces: Pieces, length: int) -> list[jax.Array]:
    """Rows where their experts are; 0 where nobody sends."""
    empty = lambda a: jnp.zeros((length, *a.shape[1:]), a.dtype)
    return [_flat(exchange(a, pieces, empty(a), AXIS)) for a in rows]


def _apart(a_MD: jax.Array) -> jax.Array:
    """Rows as TPUs exchange them: with a dim of 2 between, a bfloat16 row is one stretch of memory.

    Where loops carry them like this, no round copies all rows into that form and back.
    """
    return a_MD.reshape(a_MD.shape[0], math.gcd(2, a_MD.shape[1]), -1)


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0], -1)


def _rounds_forward(x_MD, weight_M1, weights, sizes, length):
    saved = (x_MD, weight_M1, weights, sizes)
    return _in_rounds(*saved, length), saved


def _rounds_backward(length, saved, dy_MD):
    x_MD, weight_M1, weights, sizes = saved

    def one(turn, grads):
        dx, dweight_M1, dweights = grads
        pieces, size_E = _round(sizes, length, turn)
        x_LD, weight_L1, dy_LD = _there((rows, weight_M1, drows), pieces, length)
        again = lambda x, weight, weights: sorted_mlp(x, weight, weights, size_E)
        dx_LD, dweight_L1, more = jax.vjp(again, x_LD, weight_L1, weights)[1](dy_LD)
        return (
            exchange(_apart(dx_LD), pieces, dx, AXIS, back=True),
            exchange(dweight_L1, pieces, dweight_M1, AXIS, back=True),
            jax.tree.map(lambda a, b: a + b.astype(a.dtype), dweights, more),
        )

    # A row gets its gradient in one round only; an expert in each, so those add up in float32.
    dweights = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    rows, drows = _apart(x_MD), _apart(dy_MD)
    start = (jnp.zeros_like(rows), jnp.zeros_like(weight_M1), dweights)
    dx, dweight_M1, dweights = jax.lax.fori_loop(0, sizes.rounds, one, start)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return _flat(dx), dweight_M1, dweights, None


_in_rounds.defvjp(_rounds_forward, _rounds_backward)
