"""Multiply by a parameter where it rests split: gather it, cast it, contract."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import all_to_all, scatter_sum
from k2jax.params.spec import LAYER_AXES
from k2jax.sharding import compute_spec, meshless, reshard, spec

if TYPE_CHECKING:
    from flax import nnx

Entry = str | tuple[str, ...] | None  # of a PartitionSpec
PROJECTION = "projection"  # name of every product with a weight, for rematerialisation policies


def gather_weight(w: "nnx.Variable", dtype: jnp.dtype) -> jax.Array:
    """The parameter of one layer in the compute dtype, gathered over what only stores it.

    It is cast before it travels; its gradient travels back in the compute dtype too.
    """
    return _gathered(w[...].astype(dtype), used_spec(w))


def used_spec(w: "nnx.Variable") -> P | None:
    """Layout of one layer's parameter while it is used."""
    axes = [axis for axis in w.get_metadata("spec").axes if axis not in LAYER_AXES]
    return None if meshless() else compute_spec(axes)


def _gathered(value: jax.Array, layout: P | None) -> jax.Array:
    return value if layout is None else jax.reshard(value, layout)


def project(
    einsum: str, x: jax.Array, w: "nnx.Variable", axes: tuple[str | None, ...]
) -> jax.Array:
    """`x` contracted with a parameter, in `x`'s dtype, laid out by the result's logical `axes`."""
    layout, travels = spec(*axes), w.get_metadata("grad_dtype", None)
    y = contract(einsum, layout, used_spec(w), travels, x, w[...].astype(x.dtype))
    return checkpoint_name(y, PROJECTION)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def contract(
    einsum: str, layout: P | None, whole: P | None, travels: str | None, x: jax.Array, w: jax.Array
) -> jax.Array:
    """An einsum of activations and weights, accumulated in float32.

    Args:
        einsum: activations first.
        layout: of the result; None where there is no mesh, or inside of `shard_map`.
        whole: of the weight while it is used; it is gathered for that.
        travels: dtype of the weight's gradient between devices; None: that of the activations.
        x: activations.
        w: weight, as it rests.

    Its gradient is written out. The weight's is scattered as it is summed, to where the weight
    rests. And it has the activations first: XLA's CPU backend would else transpose the larger
    factor in memory.
    """
    return _einsum(einsum, x, _gathered(w, whole), layout)


def _einsum(einsum: str, a: jax.Array, b: jax.Array, layout: P | None) -> jax.Array:
    return _product(einsum, a, b, layout).astype(a.dtype)


def _product(einsum: str, a: jax.Array, b: jax.Array, layout: P | None) -> jax.Array:
    return jnp.einsum(einsum, a, b, out_sharding=layout, preferred_element_type=jnp.float32)


def _forward(einsum, layout, whole, travels, x, w):
    return contract(einsum, layout, whole, travels, x, w), (x, w)


def _backward(einsum: str, layout: P | None, whole: P | None, travels: str | None, saved, dy):
    x, w = saved
    inputs, y_dims = einsum.split("->")
    x_dims, w_dims = inputs.split(",")
    rests = (lambda a: None) if layout is None else (lambda a: jax.typeof(a).sharding.spec)
    dx = _einsum(f"{y_dims},{w_dims}->{x_dims}", dy, _gathered(w, whole), rests(x))
    of_weight = f"{x_dims},{y_dims}->{w_dims}"
    if layout is None:
        return dx, _einsum(of_weight, x, dy, None)
    return dx, _summed(of_weight, x, dy, jax.typeof(w).sharding.spec, travels or x.dtype)


def _summed(einsum: str, x: jax.Array, dy: jax.Array, rests: P, travels: Any) -> jax.Array:
    """A weight's gradient, summed over all devices' tokens to where the weight rests.

    Each device first sums over its own tokens, in float32. Left to XLA, float32 would travel
    whatever the dtype, and some of it by all-reduce.
    """
    x_spec, dy_spec = (jax.typeof(a).sharding.spec for a in (x, dy))
    x_dims, w_dims = einsum[: einsum.index(",")], einsum.split("->")[1]
    over = [entry for dim, entry in zip(x_dims, x_spec, strict=True) if dim not in w_dims]

    def own(x: jax.Array, dy: jax.Array) -> jax.Array:
        dw = _product(einsum, x, dy, None).astype(travels)
        return _sum_over(dw, over, rests).astype(x.dtype)

    return jax.shard_map(own, in_specs=(x_spec, dy_spec), out_specs=rests, check_vma=False)(x, dy)


@jax.custom_vjp
def apply_norm_scale(x: jax.Array, gain: jax.Array) -> jax.Array:
    """`x` times a gain along its last dim, in `x`'s dtype; each device has the whole gain.

    The gain's gradient is summed as `contract`'s are, in float32.
    """
    return x * gain.astype(x.dtype)


def _gained_backward(saved, dy: jax.Array):
    x, gain = saved
    wide = lambda a: a.astype(jnp.float32)
    own = lambda x, dy: (wide(x) * wide(dy)).sum(axis=tuple(range(x.ndim - 1)))
    if not meshless():
        rows, last = jax.typeof(x).sharding.spec[:-1], jax.typeof(gain).sharding.spec
        share = lambda x, dy: _sum_over(own(x, dy), rows, last)
        layouts = tuple(jax.typeof(a).sharding.spec for a in (x, dy))
        dgain = jax.shard_map(share, in_specs=layouts, out_specs=last, check_vma=False)(x, dy)
    else:
        dgain = own(x, dy)
    return dy * gain.astype(dy.dtype), dgain.astype(gain.dtype)


apply_norm_scale.defvjp(lambda x, gain: (apply_norm_scale(x, gain), (x, gain)), _gained_backward)


def _sum_over(dw: jax.Array, over: Iterable[Entry], rests: P) -> jax.Array:
    """The sum over the mesh axes `over`, which split tokens: each device what rests on it."""
    names = [name for entry in over for name in _names(entry)]
    for dim, entry in enumerate(rests):
        for name in _names(entry):
            if name in names:
                dw = scatter_sum(dw, name, dim)
                names.remove(name)
    # An axis at a time: the sum of two is the same in any order, so on axes of two devices it does
    # not depend on how many processes they are in.
    for name in names:
        dw = jax.lax.psum(dw, name)
    return dw


def _names(entry: Entry) -> tuple[str, ...]:
    """Its mesh axes."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


contract.defvjp(_forward, _backward)


def look_up(w: "nnx.Variable", token: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table [vocab, embed], in `dtype`: [batch, length, embed]."""
    table, token = w[...].astype(dtype), reshard(token, "batch", "length")
    if meshless():
        return table[token]
    table = reshard(table, *w.get_metadata("spec").axes)
    return _rows(w.get_metadata("grad_dtype", None), token, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(travels: str | None, token: jax.Array, table: jax.Array) -> jax.Array:
    """`look_up` on a mesh, the table where it rests.

    Devices with different columns of it exchange tokens for them: each looks up its own columns
    for the tokens of all. K2's table has 40 times the rows of a device's tokens. The gradient goes
    back the same way, and is summed in float32.
    """
    tokens, rests = (jax.typeof(a).sharding.spec for a in (token, table))

    def own(token_BT: jax.Array, table_VX: jax.Array) -> jax.Array:
        at_EBT = _places(token_BT, table_VX, rests[1])
        x_EBTX = table_VX.at[at_EBT].get(mode="fill", fill_value=0)
        x_BTD = all_to_all(x_EBTX, rests[1], 0, 3)[0]
        return jax.lax.psum(x_BTD, "model")  # the axis of "vocab": others have zeros

    into = P(*tokens, None)
    rows = jax.shard_map(own, in_specs=(tokens, rests), out_specs=into, check_vma=False)
    return rows(token, table)


def _places(token_BT: jax.Array, table_VX: jax.Array, axis: str) -> jax.Array:
    """Rows of this device's part of the table, for the tokens of all devices of the axis."""
    first = table_VX.shape[0] * jax.lax.axis_index("model")
    token_EBT = jax.lax.all_gather(token_BT, axis)
    # What others have is out of bounds; below 0 would count from the end.
    return jnp.where(token_EBT >= first, token_EBT - first, table_VX.shape[0])


def _rows_backward(travels: str | None, saved, dy: jax.Array):
    token, table = saved
    specs = tokens, rests, _ = [jax.typeof(a).sharding.spec for a in (token, table, dy)]
    axis = rests[1]

    def own(token_BT: jax.Array, table_VX: jax.Array, dy_BTD: jax.Array) -> jax.Array:
        dy_EBTX = all_to_all(dy_BTD[None], axis, 3, 0).astype(jnp.float32)
        dtable_VX = jnp.zeros(table_VX.shape, jnp.float32)
        dtable_VX = dtable_VX.at[_places(token_BT, table_VX, axis)].add(dy_EBTX, mode="drop")
        others = [name for entry in tokens for name in _names(entry) if name != axis]
        return _sum_over(dtable_VX.astype(travels or dy.dtype), others, P()).astype(dy.dtype)

    dtable = jax.shard_map(own, in_specs=tuple(specs), out_specs=rests, check_vma=False)
    return None, dtable(token, table, dy)


_rows.defvjp(
    lambda travels, token, table: (_rows(travels, token, table), (token, table)),
    _rows_backward,
)
