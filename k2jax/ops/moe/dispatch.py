"""Send tokens to the devices that hold their experts, and the results back, in two ways.

Everything here runs on one device (`shard_map`). Along the mesh axis `expert` each device holds
`E / P` experts, in order, and a share of the tokens.

* `dispatch_allgather`: every device gathers the tokens of all of them, runs its experts on those
  that chose them, and the sums are scattered back. Bytes per token grow with the axis.
* `dispatch_alltoall`: one row per (token, choice) is sent to the expert's device and back, whatever
  the size of the axis. How many rows a device receives is known only once the router has chosen, so
  they are exchanged in rounds of a fixed buffer: as many as the fullest device needs, the same
  number everywhere. One round in all but badly balanced steps, and nothing is ever dropped, unless
  the kind is `alltoall_capacity`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.ops.collectives import RowSlices, all_gather, ragged_exchange, scatter_sum
from k2jax.ops.limits import ALIGNED, ONE_ROUND
from k2jax.ops.moe.experts import expert_mlp, sorted_expert_mlp
from k2jax.ops.moe.permute import (
    permute_rows,
    permute_tokens,
    sort_by_expert,
    unpermute_and_sum,
)
from k2jax.ops.moe.weights import Weights

AXIS = "expert"


class Dispatch(NamedTuple):
    """How tokens reach their experts; the fields of `TrainConfig`."""

    kind: str = "allgather"
    buffer: float = 2.0


def choose_dispatch() -> Dispatch:
    """Choose the dispatch that needs less memory on the mesh in use, for training's token counts.

    With all-gather a device has rows for the tokens of every device along `expert`; with
    all-to-all, `buffer` times its own share.
    """
    default, mesh = Dispatch(), jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape[AXIS]
    return default._replace(kind="alltoall") if devices > default.buffer else default


def dispatch_allgather(
    x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, weights: Weights
) -> jax.Array:
    """Run this device's tokens through their experts. `weights` are those of its own experts."""
    x_ND, expert_NK, weight_NK = (all_gather(a, AXIS) for a in (x_ND, expert_NK, weight_NK))
    first = jax.lax.axis_index(AXIS) * weights[0].shape[0]
    y_ND = expert_mlp(x_ND, expert_NK - first, weight_NK, weights)
    return scatter_sum(y_ND, AXIS, 0)


def dispatch_alltoall(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    weight_NK: jax.Array,
    weights: Weights,
    dispatch: Dispatch,
) -> tuple[jax.Array, jax.Array]:
    """Run this device's tokens through their experts.

    An output is weighted on its expert's device, and a token's outputs are summed in float32 on the
    token's, so that the backward pass need not send outputs back again.

    Returns:
        The tokens' sums, and the share of choices that was dropped.
    """
    devices = jax.lax.axis_size(AXIS)
    experts = weights[0].shape[0] * devices
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, experts)
    size_PE = jax.lax.all_gather(size_E, AXIS)
    length = buffer_rows(order_M.shape[0], devices, dispatch.buffer)
    if dispatch.kind == "alltoall_capacity":
        sent_PE, rounds = _limit_sizes(size_PE, devices, length), jnp.int32(1)
    else:
        sent_PE, rounds = size_PE, _count_rounds(size_PE, devices, length)
    x_MD = permute_tokens(x_ND, order_M, place_M)
    weight_M1 = permute_rows(weight_NK.reshape(-1, 1), order_M, place_M)
    plan = SendPlan(_exclusive_sum(size_PE, 1), sent_PE, rounds)
    y_MD = _run_in_rounds(x_MD, weight_M1, weights, plan, length)
    return unpermute_and_sum(
        y_MD, order_M, place_M, x_ND.shape[0]
    ), 1 - sent_PE.sum() / size_PE.sum()


def dispatch_to_resident(
    x_ND: jax.Array,
    expert_NK: jax.Array,
    weight_NK: jax.Array,
    experts: int,
    run: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Run this device's tokens through their experts by all-to-all; it has no gradient.

    Args:
        x_ND: tokens.
        expert_NK: int32; a token that chooses expert `experts` or above is sent nowhere, and is 0.
        weight_NK: float32.
        experts: of all devices.
        run: this device's experts, from rows sorted by expert, their weights and the rows of each.
    """
    devices = 1 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_size(AXIS)
    order_M, place_M, size_E, weight_NK = sort_by_expert(expert_NK, weight_NK, experts)
    x_MD = permute_tokens(x_ND, order_M, place_M)
    weight_M1 = permute_rows(weight_NK.reshape(-1, 1), order_M, place_M)
    if devices == 1:
        chosen_M = jnp.arange(x_MD.shape[0]) < size_E.sum()
        y_MD = jnp.where(chosen_M[:, None], run(x_MD, weight_M1, size_E), 0)
    else:
        size_PE = jax.lax.all_gather(size_E, AXIS)
        length = buffer_rows(order_M.shape[0], devices, Dispatch().buffer)
        length = max(length, min(ONE_ROUND, order_M.shape[0] * devices))
        rounds = _count_rounds(size_PE, devices, length)
        plan = SendPlan(_exclusive_sum(size_PE, 1), size_PE, rounds)
        y_MD = _run_rounds(x_MD, weight_M1, plan, length, run)
    return unpermute_and_sum(y_MD, order_M, place_M, x_ND.shape[0])


def buffer_rows(pairs: int, devices: int, buffer: float) -> int:
    """Count the rows a device receives in a round: `buffer` times its share, at most all rows."""
    aligned = -(-int(pairs * buffer) // ALIGNED) * ALIGNED
    return min(aligned, pairs * devices)


class SendPlan(NamedTuple):
    """Rows that every device sends to every expert, [senders, experts], and in how many rounds."""

    start: jax.Array  # first row of an expert, on the sender
    sent: jax.Array  # rows that are sent
    rounds: jax.Array


def _exclusive_sum(size: jax.Array, axis: int) -> jax.Array:
    """Sum along an axis the sizes before each."""
    return jnp.cumsum(size, axis=axis) - size


def _count_received(size_PE: jax.Array, devices: int) -> jax.Array:
    """Count the rows for each device."""
    return size_PE.sum(axis=0).reshape(devices, -1).sum(axis=1)


def _count_rounds(size_PE: jax.Array, devices: int, length: int) -> jax.Array:
    """Count the rounds that the fullest device of all needs: loops with exchanges run in step."""
    fullest = _count_received(size_PE, devices).max()
    everywhere = tuple(jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.pmax(-(-fullest // length), everywhere)


def _limit_sizes(size_PE: jax.Array, devices: int, length: int) -> jax.Array:
    """Limit sizes to the buffer: a device over it takes the same share for each of its experts."""
    share_P = jnp.minimum(length / jnp.maximum(_count_received(size_PE, devices), 1), 1)
    share_E = jnp.repeat(share_P, size_PE.shape[1] // devices)
    kept_E = jnp.floor(size_PE.sum(axis=0) * share_E).astype(size_PE.dtype)
    return jnp.clip(kept_E - _exclusive_sum(size_PE, 0), 0, size_PE)


def _slices_of_round(plan: SendPlan, length: int, index: jax.Array) -> tuple[RowSlices, jax.Array]:
    """Find the slices that are sent in a round, and the rows for each expert of this device.

    The rows for a device, expert after expert and for each sender after sender, are a sequence;
    round i carries its rows from `i length` to `(i + 1) length`.
    """
    sent_PE = plan.sent
    devices = sent_PE.shape[0]
    begin_E = _exclusive_sum(sent_PE.sum(axis=0).reshape(devices, -1), 1).reshape(-1)
    place_PE = begin_E + _exclusive_sum(sent_PE, 0) - index * length
    low_PE = jnp.clip(-place_PE, 0, sent_PE)
    high_PE = jnp.clip(length - place_PE, 0, sent_PE)
    slices = RowSlices(plan.start + low_PE, high_PE - low_PE, place_PE + low_PE)
    return slices, slices.size.sum(axis=0).reshape(devices, -1)[jax.lax.axis_index(AXIS)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _run_in_rounds(
    x_MD: jax.Array, weight_M1: jax.Array, weights: Weights, plan: SendPlan, length: int
) -> jax.Array:
    """Run sorted rows through their experts; the backward pass repeats the rounds.

    It recomputes what it needs of each.
    """

    def run(x_LD, weight_L1, size_E):
        return sorted_expert_mlp(x_LD, weight_L1, weights, size_E)

    return _run_rounds(x_MD, weight_M1, plan, length, run)


def _run_rounds(x_MD: jax.Array, weight_M1: jax.Array, plan: SendPlan, length: int, run):
    """Send rows, run them and send them back, a round at a time; those that are not sent give 0."""

    def one(index, y):
        slices, size_E = _slices_of_round(plan, length, index)
        x_LD, weight_L1 = _send((rows, weight_M1), slices, length)
        y_LD = run(x_LD, weight_L1, size_E)
        return ragged_exchange(_split_rows(y_LD), slices, y, AXIS, back=True)

    rows = _split_rows(x_MD)
    return _merge_rows(jax.lax.fori_loop(0, plan.rounds, one, jnp.zeros_like(rows)))


def _send(rows: tuple[jax.Array, ...], slices: RowSlices, length: int) -> list[jax.Array]:
    """Send rows to their experts; rows of the buffer that nobody sends are 0."""
    buffers = [jnp.zeros((length, *a.shape[1:]), a.dtype) for a in rows]
    return [
        _merge_rows(ragged_exchange(a, slices, buffer, AXIS))
        for a, buffer in zip(rows, buffers, strict=True)
    ]


def _split_rows(a_MD: jax.Array) -> jax.Array:
    """Split each row in two, which is how TPUs exchange them: a bfloat16 row is then contiguous.

    Loops carry rows in this form, so that no round copies all of them into it and back.
    """
    return a_MD.reshape(a_MD.shape[0], math.gcd(2, a_MD.shape[1]), -1)


def _merge_rows(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0], -1)


def _rounds_forward(x_MD, weight_M1, weights, plan, length):
    saved = (x_MD, weight_M1, weights, plan)
    return _run_in_rounds(*saved, length), saved


def _rounds_backward(length, saved, dy_MD):
    x_MD, weight_M1, weights, plan = saved

    def one(index, grads):
        dx, dweight_M1, dweights = grads
        slices, size_E = _slices_of_round(plan, length, index)
        x_LD, weight_L1, dy_LD = _send((rows, weight_M1, drows), slices, length)
        recompute = functools.partial(sorted_expert_mlp, size_E=size_E)
        dx_LD, dweight_L1, more = jax.vjp(recompute, x_LD, weight_L1, weights)[1](dy_LD)
        return (
            ragged_exchange(_split_rows(dx_LD), slices, dx, AXIS, back=True),
            ragged_exchange(dweight_L1, slices, dweight_M1, AXIS, back=True),
            jax.tree.map(lambda a, b: a + b.astype(a.dtype), dweights, more),
        )

    # A row gets its gradient in one round only; an expert in each, so those add up in float32.
    dweights = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
    rows, drows = _split_rows(x_MD), _split_rows(dy_MD)
    start = (jnp.zeros_like(rows), jnp.zeros_like(weight_M1), dweights)
    dx, dweight_M1, dweights = jax.lax.fori_loop(0, plan.rounds, one, start)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return _merge_rows(dx), dweight_M1, dweights, None


_run_in_rounds.defvjp(_rounds_forward, _rounds_backward)
