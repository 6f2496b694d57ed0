"""Compare an accelerator's kernels with their references, before training on it.

A kernel may compile and still be wrong on a chip, a driver or a version that nobody tried; a run
would then learn something else without a sign of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from k2jax.config import ConfigError, ModelConfig
from k2jax.ops.attention import blockwise_attention
from k2jax.ops.limits import ATTENTION_BLOCK
from k2jax.ops.moe import (
    Dispatch,
    dispatch_allgather,
    dispatch_alltoall,
    fuse_gate_up,
    grouped_matmul,
)
from k2jax.ops.moe.dispatch import AXIS
from k2jax.ops.mosaic import SWITCH, is_chosen
from k2jax.sharding import BATCH, meshless

# Largest error over the largest correct value. bfloat16 rounds by 2^-9; a wrong kernel is off by
# far more.
LIMIT = 0.02
PARTS = ("values", "gradients of the rows", "gradients of the matrices")
MIXED = (
    "values",
    "largest logits",
    *(f"gradients of the {of}" for of in ("queries", "keys", "values")),
)
ROWS, WIDTH, HIDDEN = 1_024, 256, 512
TOKENS, NARROW = 24, 128  # of the exchange, a device
SIZES = (300, 0, 514, 130)  # a group may be empty, and the last rows have no group
LENGTH, ENDS = 1_100, (1_030, 1_080)  # of a row, and of its documents; the rest is padding
HEADS, SHARP = 2, 3.0  # the usual size of a logit


class KernelCheck(NamedTuple):
    """A kernel, and what it must agree with in values and gradients."""

    name: str
    parts: Sequence[str]  # of what is compared
    kernel: Callable
    reference: Callable
    draw: Callable[[], Sequence[jax.Array]]  # the arguments of both

    def kernel_errors(self, *args: jax.Array) -> jax.Array:
        """Return the largest error of each part, relative to its largest value."""
        pairs = zip(
            _differentiate(self.kernel, args), _differentiate(self.reference, args), strict=True
        )
        return jnp.stack([_relative_error(a, b) for a, b in pairs])


def list_checks(dispatch: Dispatch, cfg: ModelConfig, context: int) -> list[KernelCheck]:
    """List the kernels that the mesh in use would train with.

    Args:
        dispatch: how tokens reach their experts.
        cfg: widths of a head.
        context: tokens of a row.
    """
    checks = [KernelCheck("grouped products", PARTS, *_products())]
    if context > ATTENTION_BLOCK:
        checks.append(KernelCheck("attention", MIXED, *_attention(cfg)))
    if not meshless() and dispatch.kind != "allgather" and jax.sharding.get_mesh().shape[AXIS] > 1:
        checks.append(KernelCheck("the exchange of tokens", PARTS, *_dispatch(dispatch)))
    return checks


def check_kernels(dispatch: Dispatch, cfg: ModelConfig, context: int) -> None:
    """Compare each kernel of `list_checks` to its reference.

    Raises:
        ConfigError: values or gradients differ.
    """
    for check in list_checks(dispatch, cfg, context):
        _compare_kernel(check)


def _compare_kernel(check: KernelCheck) -> None:
    errors = jax.device_get(jax.jit(check.kernel_errors)(*check.draw()))
    remedy = f"; {SWITCH}=0 takes other kernels" if is_chosen() else ""
    for part, error in zip(check.parts, errors, strict=True):
        if not error <= LIMIT:  # not a number is wrong too
            raise ConfigError(
                f"{check.name}: wrong {part} on {jax.devices()[0].device_kind}, off by {error:.1%};"
                " another version of jax or of the driver may be right, this one must not train"
                + remedy
            )


def _relative_error(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-6)


def _differentiate(run: Callable, args: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Compute values, and gradients by all arguments for output gradients that vary."""
    values, back = jax.vjp(run, *args)
    return *jax.tree.leaves(values), *back(jax.tree.map(jnp.cos, values))


def _draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) / shape[-2] ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


def _products():
    """Products of groups by kernel, and by masks."""
    ends = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    row_M1 = np.arange(ROWS)[:, None]

    def masked(x_MK, w_EKN):
        own = [(row_M1 >= e - n) & (row_M1 < e) for e, n in zip(ends, SIZES, strict=True)]
        parts = [
            jnp.where(rows_M1, x_MK @ w_KN, 0) for rows_M1, w_KN in zip(own, w_EKN, strict=True)
        ]
        return sum(parts[1:], parts[0])

    def by_groups(x_MK, w_EKN):
        y_MN = grouped_matmul(x_MK, w_EKN, jnp.array(SIZES, jnp.int32))
        return jnp.where(row_M1 < ends[-1], y_MN, 0)

    def draw():
        return _draw((ROWS, WIDTH), (len(SIZES), WIDTH, HIDDEN))

    return _on_each_device(by_groups), _on_each_device(masked), draw


def _on_each_device(run: Callable) -> Callable:
    """Run the same on each device."""
    if meshless():
        return run
    return jax.shard_map(run, in_specs=P(), out_specs=P(), check_vma=False)


def _attention(cfg: ModelConfig):
    """Attention of several documents, by kernel and by scores."""
    order_T = np.arange(LENGTH)
    segment_BT = np.searchsorted(ENDS, order_T, side="right")[None] + 1
    segment_BT = np.where(order_T < ENDS[-1], segment_BT, 0).astype(np.int32)
    seen_BTS = segment_BT[:, :, None] == segment_BT[:, None]
    seen_BTS &= order_T[:, None] >= order_T
    wide, narrow = ((1, HEADS, LENGTH, width) for width in (cfg.size("qk"), cfg.value))
    # Entries were drawn smaller by the square roots of the lengths.
    scale = SHARP * LENGTH / cfg.size("qk") ** 0.5

    def by_kernel(q_BHTC, k_BHSC, v_BHSV):
        return blockwise_attention(q_BHTC, k_BHSC, v_BHSV, jnp.array(segment_BT), scale)

    def by_scores(q_BHTC, k_BHSC, v_BHSV):
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logit_BHTS = product("bhtc,bhsc->bhts", q_BHTC, k_BHSC) * scale
        logit_BHTS = jnp.where(seen_BTS[:, None], logit_BHTS, -jnp.inf)
        weight_BHTS = jax.nn.softmax(logit_BHTS).astype(v_BHSV.dtype)
        y_BHTV = product("bhts,bhsv->bhtv", weight_BHTS, v_BHSV).astype(v_BHSV.dtype)
        return y_BHTV, jax.lax.stop_gradient(logit_BHTS.max(axis=-1))

    def draw():
        return _draw(wide, wide, narrow)

    return _on_each_device(by_kernel), _on_each_device(by_scores), draw


def _dispatch(dispatch: Dispatch):
    """Tokens by all-to-all and by all-gather; two experts a device, one of which gets a third."""
    mesh = jax.sharding.get_mesh()
    experts = 2 * mesh.shape[AXIS]

    def on_mesh(run):
        def one(x_ND, w_EDF):
            row_N = jnp.arange(x_ND.shape[0]) + jax.lax.axis_index(AXIS)
            first_N = jnp.where(row_N % 3 == 0, 0, row_N % experts)
            expert_NK = jnp.stack([first_N, (first_N + 1 + row_N % (experts - 1)) % experts], 1)
            weight_NK = jnp.stack([jnp.sin(row_N), jnp.cos(row_N)], 1).astype(jnp.float32)
            weights = fuse_gate_up(w_EDF, 2 * w_EDF, w_EDF.swapaxes(1, 2))
            return run(x_ND, expert_NK.astype(jnp.int32), weight_NK, weights)

        return jax.shard_map(
            one, in_specs=(token_spec, expert_spec), out_specs=token_spec, check_vma=False
        )

    token_spec, expert_spec = P((*BATCH, "context", "model")), P(AXIS)

    def draw():
        x_ND, w_EDF = _draw((TOKENS * mesh.size, NARROW), (experts, NARROW, NARROW))
        return jax.reshard(x_ND, token_spec), jax.reshard(w_EDF, expert_spec)

    # Nothing may be dropped here, so that both are the same.
    dropless = dispatch._replace(kind="alltoall")

    def by_alltoall(x_ND, expert_NK, weight_NK, weights):
        return dispatch_alltoall(x_ND, expert_NK, weight_NK, weights, dropless)[0]

    return on_mesh(by_alltoall), on_mesh(dispatch_allgather), draw
