"""Read a weight and multiply by it: the one door to the parameters.

Whatever the network does with a parameter begins with `read_weight`: projections, the router, the
routed experts, the embedding table, the head, the gains of the norms, and decoding. How it reads
them is an explicit `Policy`. A parameter that is more than a plain float array (low-bit codes
with scales, a base with an adapter) is a pytree, and its type an entry of `WEIGHT_FORMATS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import Axes, all_gather, all_to_all, entry_axes, scatter_sum, sum_over
from k2jax.ops.lowbit import Fp8, Int4, LowBit, decode
from k2jax.ops.moe import Dispatch
from k2jax.params.adapters import declare_pair
from k2jax.params.spec import LAYER_AXES, ParamSpec
from k2jax.sharding import compute_spec, meshless, reshard, spec

if TYPE_CHECKING:
    from flax import nnx

PROJECTION = "projection"  # name of every product with a weight, for rematerialisation policies


def _decode(stored: LowBit, leaf: ParamSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return decode(stored, leaf.contracted)
    layout = specs_of(stored)
    codes = jax.tree.leaves(layout, is_leaf=lambda entry: isinstance(entry, P))[0]
    return jax.shard_map(
        lambda stored: decode(stored, leaf.contracted, codes),
        in_specs=(layout,),
        out_specs=codes,
        check_vma=False,
    )(stored)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight with an adapter: its values are `base + scale * a b`.

    Attributes:
        base: what is stored for the weight itself, float or low-bit; it does not learn.
        a: float32 [stack, in..., rank].
        b: float32 [stack, rank, out...].
        scale: alpha / rank.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


def _add_adapter(stored: Adapted, leaf: ParamSpec) -> jax.Array:
    """The values of a weight, whole: what reads it otherwise than by `project` needs them."""
    base = values(stored.base, leaf).astype(jnp.float32)
    letters = "abcdefgh"[: base.ndim]
    stack = letters[: base.ndim - (len(leaf.shape) - leaf.stacked)]
    ins = letters[len(stack) : len(stack) + leaf.contracted]
    outs = letters[len(stack) + leaf.contracted :]
    out_spec = None if meshless() else jax.typeof(base).sharding.spec
    product = _product(f"{stack}{ins}z,{stack}z{outs}->{letters}", stored.a, stored.b, out_spec)
    return base + stored.scale * product


# From what is stored for a parameter, or a slice of its stack, to its values as a float array; by
# its type. Anything else is the values themselves.
WEIGHT_FORMATS: dict[type, Callable[[Any, ParamSpec], jax.Array]] = {
    Fp8: _decode,
    Int4: _decode,
    Adapted: _add_adapter,
}


def values(stored: Any, leaf: ParamSpec) -> jax.Array:
    """The values of what is stored for a parameter, or for a slice of its stack."""
    form = WEIGHT_FORMATS.get(type(stored))
    return form(stored, leaf) if form else stored


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the network is computed: the settings that are neither a weight nor a size.

    Attributes:
        compute_dtype: of activations, and of weights while they are used.
        grad_dtype: in which gradients of weights are communicated; None: the compute dtype.
        remat: what the backward pass recomputes: "none", or a key of `kimi.REMAT_POLICIES`.
        dispatch: how tokens reach their experts.
    """

    compute_dtype: str
    grad_dtype: str | None = None
    remat: str = "none"
    dispatch: Dispatch = Dispatch()  # noqa: RUF009, a constant


def read_weight(
    w: "nnx.Variable", policy: Policy, dtype: str = "", index: tuple[Any, ...] = ()
) -> jax.Array:
    """The values of a parameter, in the layout in which it is stored.

    Args:
        w: parameter of one layer, or a whole stack with an `index` into it.
        policy: how weights are read.
        dtype: of the result; "": the compute dtype.
        index: of the leading dims; only this slice is read.
    """
    stored = w.get_value()
    if index:
        stored = jax.tree.map(lambda a: a[index], stored)
    return values(stored, w.get_metadata("spec")).astype(dtype or policy.compute_dtype)


def read_stack(w: "nnx.Variable", policy: Policy) -> Any:
    """A parameter for `ops.moe`, which decodes low-bit ones itself, a tile at a time."""
    stored = w.get_value()
    return stored if isinstance(stored, LowBit) else read_weight(w, policy)


def specs_of(tree: Any) -> Any:
    """Layouts of arrays on a mesh."""
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)


def gather_weight(w: "nnx.Variable", policy: Policy) -> jax.Array:
    """One layer's parameter in the compute dtype, gathered over the axes that only store it.

    It is cast before it is sent; its gradient comes back in the compute dtype too.
    """
    return _gather(read_weight(w, policy), gathered_spec_of(w))


def gathered_spec_of(w: "nnx.Variable") -> P | None:
    """Layout of one layer's parameter while it is used."""
    return _gathered_spec(w.get_metadata("spec"))


def _gathered_spec(leaf: ParamSpec) -> P | None:
    axes = [axis for axis in leaf.axes if axis not in LAYER_AXES]
    return None if meshless() else compute_spec(axes)


def _gather(value: jax.Array, gathered_spec: P | None) -> jax.Array:
    return value if gathered_spec is None else jax.reshard(value, gathered_spec)


def project(
    einsum: str, x: jax.Array, w: "nnx.Variable", axes: tuple[str | None, ...], policy: Policy
) -> jax.Array:
    """Contract `x` with a parameter in the compute dtype; `axes` name the result's dims."""
    stored, leaf, out_spec = w.get_value(), w.get_metadata("spec"), spec(*axes)
    base = stored.base if isinstance(stored, Adapted) else stored
    weight = values(base, leaf).astype(policy.compute_dtype)
    y = sharded_einsum(einsum, out_spec, gathered_spec_of(w), policy.grad_dtype, x, weight)
    if isinstance(stored, Adapted):
        y += _project_by_adapter(einsum, x, stored, leaf, out_spec, policy)
    return checkpoint_name(y, PROJECTION)


def _project_by_adapter(
    einsum: str, x: jax.Array, stored: Adapted, leaf: ParamSpec, out_spec: P | None, policy: Policy
) -> jax.Array:
    """What an adapter adds to `project`: two narrow products; the weight itself is not made."""
    inputs, y_dims = einsum.split("->")
    x_dims, w_dims = inputs.split(",")
    ins, outs = w_dims[: leaf.contracted], w_dims[leaf.contracted :]
    tokens = "".join(dim for dim in x_dims if dim not in ins)
    # fmt: off
    steps = (
        (f"{x_dims},{ins}z->{tokens}z", spec("batch", "length", None), stored.a),
        (f"{tokens}z,z{outs}->{y_dims}", out_spec, stored.b),
    )
    # fmt: on
    for (step, layout, matrix), declared in zip(
        steps, declare_pair(leaf, stored.a.shape[-1]), strict=True
    ):
        gathered_spec = _gathered_spec(declared)
        x = sharded_einsum(
            step, layout, gathered_spec, policy.grad_dtype, x, matrix.astype(policy.compute_dtype)
        )
    return x * stored.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def sharded_einsum(
    einsum: str,
    out_spec: P | None,
    gathered_spec: P | None,
    grad_comm_dtype: str | None,
    x: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """An einsum of activations and a weight, accumulated in float32.

    Args:
        einsum: subscripts, those of the activations first.
        out_spec: layout of the result; None where there is no mesh, or inside of `shard_map`.
        gathered_spec: layout of the weight while it is used.
        grad_comm_dtype: in which the weight's gradient is communicated; None: as the activations.
        x: activations.
        w: weight, as it is stored.

    The gradient is written out. The weight's is reduce-scattered to the layout in which the weight
    is stored. And its product has the activations first: XLA's CPU backend would else transpose
    the larger factor in memory.
    """
    return _einsum(einsum, x, _gather(w, gathered_spec), out_spec)


def _einsum(einsum: str, a: jax.Array, b: jax.Array, out_spec: P | None) -> jax.Array:
    return _product(einsum, a, b, out_spec).astype(a.dtype)


def _product(einsum: str, a: jax.Array, b: jax.Array, out_spec: P | None) -> jax.Array:
    return jnp.einsum(einsum, a, b, out_sharding=out_spec, preferred_element_type=jnp.float32)


def _forward(einsum, out_spec, gathered_spec, grad_comm_dtype, x, w):
    return sharded_einsum(einsum, out_spec, gathered_spec, grad_comm_dtype, x, w), (x, w)


def _backward(einsum: str, out_spec, gathered_spec, grad_comm_dtype: str | None, saved, dy):
    x, w = saved
    inputs, y_dims = einsum.split("->")
    x_dims, w_dims = inputs.split(",")
    x_spec = None if out_spec is None else jax.typeof(x).sharding.spec
    dx = _einsum(f"{y_dims},{w_dims}->{x_dims}", dy, _gather(w, gathered_spec), x_spec)
    weight_einsum = f"{x_dims},{y_dims}->{w_dims}"
    if out_spec is None:
        return dx, _einsum(weight_einsum, x, dy, None)
    stored_spec = jax.typeof(w).sharding.spec
    return dx, _weight_gradient(weight_einsum, x, dy, stored_spec, grad_comm_dtype or x.dtype)


def _weight_gradient(
    einsum: str, x: jax.Array, dy: jax.Array, stored_spec: P, grad_comm_dtype: Any
) -> jax.Array:
    """A weight's gradient, summed over all devices' tokens, where the weight is stored.

    Each device first sums over its own tokens, in float32. Left to XLA, float32 would be sent
    whatever the dtype, and some of it by all-reduce.
    """
    x_spec, dy_spec = (jax.typeof(a).sharding.spec for a in (x, dy))
    x_dims, w_dims = einsum[: einsum.index(",")], einsum.split("->")[1]
    summed = [entry for dim, entry in zip(x_dims, x_spec, strict=True) if dim not in w_dims]

    def on_device(x: jax.Array, dy: jax.Array) -> jax.Array:
        dw = _product(einsum, x, dy, None).astype(grad_comm_dtype)
        return _sum_over(dw, summed, stored_spec).astype(x.dtype)

    return jax.shard_map(
        on_device, in_specs=(x_spec, dy_spec), out_specs=stored_spec, check_vma=False
    )(x, dy)


sharded_einsum.defvjp(_forward, _backward)


@jax.custom_vjp
def apply_norm_scale(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Multiply `x` by a gain along its last dim, in `x`'s dtype; each device has the whole gain.

    The gain's gradient is reduced as `sharded_einsum`'s weight's is, in float32.
    """
    return x * gain.astype(x.dtype)


def _norm_scale_backward(saved, dy: jax.Array):
    x, gain = saved

    def sum_tokens(x: jax.Array, dy: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32) * dy.astype(jnp.float32)
        return wide.sum(axis=tuple(range(x.ndim - 1)))

    if meshless():
        dgain = sum_tokens(x, dy)
    else:
        x_spec, gain_spec, dy_spec = (jax.typeof(a).sharding.spec for a in (x, gain, dy))
        dgain = jax.shard_map(
            lambda x, dy: _sum_over(sum_tokens(x, dy), x_spec[:-1], gain_spec),
            in_specs=(x_spec, dy_spec),
            out_specs=gain_spec,
            check_vma=False,
        )(x, dy)
    return dy * gain.astype(dy.dtype), dgain.astype(gain.dtype)


apply_norm_scale.defvjp(
    lambda x, gain: (apply_norm_scale(x, gain), (x, gain)), _norm_scale_backward
)


def _sum_over(dw: jax.Array, axes: Iterable[Axes | None], stored_spec: P) -> jax.Array:
    """Sum over the mesh axes that split tokens; each device keeps the part that it stores."""
    names = [name for entry in axes for name in entry_axes(entry)]
    for dim, entry in enumerate(stored_spec):
        for name in entry_axes(entry):
            if name in names:
                dw = scatter_sum(dw, name, dim)
                names.remove(name)
    # An axis at a time: the sum of two is the same in any order, so on axes of two devices it does
    # not depend on how many processes they are in.
    for name in names:
        dw = sum_over(dw, name)
    return dw


def look_up(w: "nnx.Variable", token: jax.Array, policy: Policy) -> jax.Array:
    """Take the tokens' rows of a table [vocab, embed], in the compute dtype.

    Returns:
        [batch, length, embed].
    """
    table, token = read_weight(w, policy), reshard(token, "batch", "length")
    if meshless():
        return table[token]
    table = reshard(table, *w.get_metadata("spec").axes)
    return _take_rows(policy.grad_dtype, token, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_rows(grad_comm_dtype: str | None, token: jax.Array, table: jax.Array) -> jax.Array:
    """`look_up` on a mesh, the table as it is stored.

    Devices with different columns of it exchange tokens for them: each looks up its own columns
    for the tokens of all. K2's table has 40 times the rows of a device's tokens. The gradient goes
    back the same way, and is summed in float32.
    """
    token_spec, table_spec = (jax.typeof(a).sharding.spec for a in (token, table))

    def on_device(token_BT: jax.Array, table_VX: jax.Array) -> jax.Array:
        columns = table_spec[1]
        if columns is None:  # a mesh for inference
            x_BTD = table_VX.at[_local_rows(token_BT, table_VX)].get(mode="fill", fill_value=0)
        else:
            row_EBT = _local_rows(all_gather(token_BT[None], columns), table_VX)
            x_EBTX = table_VX.at[row_EBT].get(mode="fill", fill_value=0)
            x_BTD = all_to_all(x_EBTX, columns, 0, 3)[0]
        return sum_over(x_BTD, "model")  # the axis of "vocab": others have zeros

    return jax.shard_map(
        on_device,
        in_specs=(token_spec, table_spec),
        out_specs=P(*token_spec, None),
        check_vma=False,
    )(token, table)


def _local_rows(token: jax.Array, table_VX: jax.Array) -> jax.Array:
    """Rows of this device's part of the table, for any tokens."""
    first = table_VX.shape[0] * jax.lax.axis_index("model")
    # Rows of other devices are out of bounds; below 0 would count from the end.
    return jnp.where(token >= first, token - first, table_VX.shape[0])


def _take_rows_backward(grad_comm_dtype: str | None, saved, dy: jax.Array):
    token, table = saved
    in_specs = tuple(jax.typeof(a).sharding.spec for a in (token, table, dy))
    token_spec, table_spec, _ = in_specs
    axis = table_spec[1]

    def on_device(token_BT: jax.Array, table_VX: jax.Array, dy_BTD: jax.Array) -> jax.Array:
        dy_EBTX = all_to_all(dy_BTD[None], axis, 3, 0).astype(jnp.float32)
        dtable_VX = jnp.zeros(table_VX.shape, jnp.float32)
        row_EBT = _local_rows(all_gather(token_BT[None], axis), table_VX)
        dtable_VX = dtable_VX.at[row_EBT].add(dy_EBTX, mode="drop")
        others = [name for entry in token_spec for name in entry_axes(entry) if name != axis]
        dtable_VX = dtable_VX.astype(grad_comm_dtype or dy.dtype)
        return _sum_over(dtable_VX, others, P()).astype(dy.dtype)

    dtable = jax.shard_map(on_device, in_specs=in_specs, out_specs=table_spec, check_vma=False)
    return None, dtable(token, table, dy)


_take_rows.defvjp(
    lambda grad_comm_dtype, token, table: (
        _take_rows(grad_comm_dtype, token, table),
        (token, table),
    ),
    _take_rows_backward,
)
