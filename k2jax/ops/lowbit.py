"""Low-bit weights as they are published, and their values.

A weight that is resident in few bits is one of these pytrees where a plain one is an array. Values
are those of `weights.quant`, bit for bit: a float32 product, rounded to bfloat16.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import entry_axes
from k2jax.ops.limits import BLOCK, GROUP, PER_WORD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8:
    """FP8 with a scale for each block of 128 x 128.

    Attributes:
        code: float8_e4m3fn, [stack, in..., out...] as the plain weight.
        scale: float32 [stack, in / 128, out / 128] of the published matrix, rounded up; whole on
            every device but for the stack.
    """

    code: Any
    scale: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4:
    """INT4 with a scale for 32 neighbours along the input.

    Attributes:
        word: int32 [stack, in / 8, out]; the lowest 4 bits are those of the first input, plus 8.
        scale: bfloat16 [stack, in / 32, out].
    """

    word: Any
    scale: Any


LowBit = Fp8 | Int4


def decode(stored: LowBit, contracted: int = 1, spec: P = P()) -> jax.Array:  # noqa: B008
    """Values of a weight or a stack of them on one device, float32 that bfloat16 holds.

    Args:
        stored: the weight, or what this device has of it.
        contracted: how many dims after the stack meet the input.
        spec: layout of the codes, where this is a part of them.
    """
    if isinstance(stored, Int4):
        return decode_int4(stored)
    return decode_fp8(stored, contracted, spec)


def decode_int4(stored: Int4) -> jax.Array:
    """Values of INT4, float32 [stack, in, out]."""
    stack, out = stored.word.shape[:-2], stored.word.shape[-1]
    shift = jnp.arange(0, 4 * PER_WORD, 4, dtype=jnp.int32)[:, None]
    value = ((stored.word[..., None, :] >> shift) & 15) - 8
    # [stack, groups, words of a group, values of a word, out]
    value = value.reshape(*stack, -1, GROUP // PER_WORD, PER_WORD, out).astype(jnp.float32)
    value *= stored.scale[..., None, None, :].astype(jnp.float32)
    return round_to_bfloat16(value).reshape(*stack, -1, out)


def group_inputs(x_MK: jax.Array) -> jax.Array:
    """Rows as words have their inputs, [M, 8, K / 8]: the first inputs of all words first."""
    rows, width = x_MK.shape
    return x_MK.reshape(rows, width // PER_WORD, PER_WORD).swapaxes(1, 2)


def multiply_int4(x_MK: jax.Array, w: Int4) -> jax.Array:
    """Multiply rows by one matrix, float32. No product needs the values in the inputs' order."""
    x_PMJ = group_inputs(x_MK).swapaxes(0, 1)
    scale_JN = jnp.repeat(w.scale, GROUP // PER_WORD, axis=0).astype(jnp.float32)
    y_MN = jnp.zeros((x_MK.shape[0], w.word.shape[-1]), jnp.float32)
    for n in range(PER_WORD):
        value_JN = (((w.word >> (4 * n)) & 15) - 8).astype(jnp.float32) * scale_JN
        value_JN = round_to_bfloat16(value_JN).astype(x_MK.dtype)
        y_MN += jnp.dot(x_PMJ[n], value_JN, preferred_element_type=jnp.float32)
    return y_MN


def decode_fp8(stored: Fp8, contracted: int, spec: P) -> jax.Array:
    """Values of FP8 on one device, which `spec` gives a part of the codes.

    A part is split along the first dim of the input or of the output only, so its rows and columns
    are neighbours in the published matrix.
    """
    shape = stored.code.shape
    stacked = stored.scale.ndim - 2
    middle, scale = stacked + contracted, stored.scale
    spec = P(*spec, *[None] * (len(shape) - len(spec)))
    for axis, dims in ((-2, slice(stacked, middle)), (-1, slice(middle, None))):
        entries = spec[dims]
        assert not any(entries[1:]), "low-bit weights are split along the first dim only"
        scale = _repeat_scale(scale, axis, math.prod(shape[dims]), entry_axes(entries[0]))
    value = stored.code.astype(jnp.float32) * scale.reshape(shape)
    return round_to_bfloat16(value)


def _repeat_scale(scale: jax.Array, axis: int, size: int, names: Sequence[str]) -> jax.Array:
    """Repeat scales for each of `size` rows or columns, of the part that mesh axes split off."""
    scale = jnp.repeat(scale, BLOCK, axis=axis)
    if not names:
        return jax.lax.slice_in_dim(scale, 0, size, axis=axis)
    first = jax.lax.axis_index(tuple(names)) * size
    return jax.lax.dynamic_slice_in_dim(scale, first, size, axis=axis)


def round_to_bfloat16(value: jax.Array) -> jax.Array:
    """Round float32 to the nearest bfloat16; XLA may leave out a conversion there and back."""
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
