"""FP8 blocks and INT4 groups, exactly as the releases store them, both ways.

FP8 [DSV3 kernel.py]: one float32 scale for each block of 128 x 128, a multiplier despite the name
`weight_scale_inv`; blocks at the right and lower edge are partial. INT4 [CT]: eight nibbles in an
int32, the lowest first, each offset by 8, one bfloat16 scale for 32 neighbours along the input.
A decoded weight is bfloat16: float32 product, rounded once. `Grid` says how INT4 is encoded.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 128
GROUP = 32
PER_WORD = 8
FP8_MAX = 448.0
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 14  # groups that are searched at a time
# XLA flushes subnormal numbers to zero. Scales between these give none.
NORMAL = (2.0**-100, 2.0**100)


@functools.cache
def _host() -> jax.sharding.Mesh:
    cpu = jax.local_devices(backend="cpu")[:1]
    return jax.sharding.Mesh(np.array(cpu), ("host",), axis_types=(jax.sharding.AxisType.Auto,))


def on_host(function: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
    """The function compiled for the CPU, whatever devices and mesh are in use."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args: np.ndarray) -> np.ndarray:
        with jax.set_mesh(_host()):
            return np.asarray(compiled(*args))

    return call


def blocks(n: int) -> int:
    """How many blocks cover `n` rows or columns."""
    return -(-n // BLOCK)


def decode_fp8(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bfloat16 [rows, columns] of float8 values.

    Args:
        q: float8_e4m3fn [rows, columns], from the first row of a block on.
        scale: float32, one for each block, partial ones included.
    """
    size = np.abs(scale)
    fast = ((size == 0) | ((size >= NORMAL[0]) & (size <= NORMAL[1]))).all()
    if not fast:
        return reference_fp8(q, scale)
    return _decode_fp8(q.view(np.uint8), np.ascontiguousarray(scale))


def reference_fp8(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The formula of `decode_fp8`, slow: each scale repeated along both axes, then cropped."""
    rows, columns = q.shape
    each = np.repeat(np.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[:rows, :columns]
    with np.errstate(over="ignore", invalid="ignore"):
        return (q.astype(np.float32) * each).astype(BF16)


@on_host
def _decode_fp8(q: jax.Array, scale: jax.Array) -> jax.Array:
    # The bits of a float8, moved up by 7, are those of a float16 that is 2^8 times smaller: one
    # machine instruction from float32, subnormals included. Only NaN must be put right.
    code = q.astype(jnp.uint16)
    sign, size = (code & 0x80) << 8, code & 0x7F
    bits = sign | jnp.where(size == 0x7F, 0x7E00, size << 7).astype(jnp.uint16)
    value = jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    return _times_blocks(value, scale * 2.0**8).astype(jnp.bfloat16)


def _times_blocks(value: jax.Array, scale: jax.Array) -> jax.Array:
    """Each block times its scale."""
    rows, columns = value.shape
    if rows % BLOCK or columns % BLOCK:
        each = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)
        return value * each[:rows, :columns]
    cut = value.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return (cut * scale[:, None, :, None]).reshape(rows, columns)


def encode_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float8 values and float32 scales of a matrix; the inverse of `decode_fp8` up to rounding.

    A scale is the block's largest size over 448, 1 for a block of zeros. Source: [DSV3 kernel.py]
    for activations; for weights by analogy.
    """
    scale = fp8_scales(weight)
    return _encode_fp8(weight, scale).astype(FP8), scale


def fp8_scales(weight: np.ndarray) -> np.ndarray:
    """The scales of `encode_fp8` alone."""
    # Divided by NumPy: XLA may multiply by a rounded 1 / 448 instead.
    amax = _block_max(weight)
    return np.where(amax > 0, amax / np.float32(FP8_MAX), 1).astype(np.float32)


@on_host
def _block_max(weight: jax.Array) -> jax.Array:
    rows, columns = weight.shape
    size = jnp.pad(jnp.abs(weight.astype(jnp.float32)), ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    cut = size.reshape(blocks(rows), BLOCK, blocks(columns), BLOCK)
    return cut.max(axis=(1, 3))


@on_host
def _encode_fp8(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The nearest float8 value, ties to even, still as float16 (which holds each exactly)."""
    rows, columns = weight.shape
    each = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[:rows, :columns]
    value = weight.astype(jnp.float32) / each
    # XLA would round twice on the way to float8. 3 bits of fraction, exponents from -6.
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    exponent = jnp.clip((bits >> 23) & 0xFF, 127 - 6, 254)
    step = jax.lax.bitcast_convert_type((exponent - 3) << 23, jnp.float32)
    rounded = jnp.round(value / step) * step
    return jnp.clip(rounded, -FP8_MAX, FP8_MAX).astype(jnp.float16)


def decode_int4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bfloat16 [out, in] of int32 words [out, in / 8] and bfloat16 scales [out, in / 32]."""
    return _decode_int4(packed, np.ascontiguousarray(scale))


@on_host
def _decode_int4(packed: jax.Array, scale: jax.Array) -> jax.Array:
    rows = len(packed)
    shifts = jnp.arange(0, 4 * PER_WORD, 4, dtype=jnp.uint32)
    word = jax.lax.bitcast_convert_type(packed, jnp.uint32)
    q = ((word[:, :, None] >> shifts) & 15).astype(jnp.int32) - 8
    grouped = q.reshape(rows, -1, GROUP).astype(jnp.float32)
    return (grouped * scale.astype(jnp.float32)[:, :, None]).astype(jnp.bfloat16).reshape(rows, -1)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a group of 32 weights becomes a scale and values from `low` to 7.

    Attributes:
        top: a scale is the group's largest size over it.
        low: smallest value.
        floor: smallest scale.
        exact: look for a scale near the rule's that gives the weights back as they are.
    """

    top: float
    low: int
    floor: float
    exact: bool


# The releases' grid [spec 9.1]. Weights that were decoded from it give back its scales and values.
KIMI = Grid(7.0, -7, 1e-5, exact=True)
# The same for weights that something was added to: no scale gives them back, and none is sought.
KIMI_RULE = dataclasses.replace(KIMI, exact=False)
# Of the symmetric min-max observer [CT qparams].
MINMAX = Grid(7.5, -8, float(np.finfo(np.float32).eps), exact=False)
GRIDS = {"int4": KIMI, "int4-minmax": MINMAX}


def encode_int4(weight: np.ndarray, grid: Grid = KIMI) -> tuple[np.ndarray, np.ndarray]:
    """int32 words and bfloat16 scales of a matrix [out, in]; `in` divides by 32.

    Scales are rounded to bfloat16 before they are used.
    """
    scale = int4_scales(weight, grid)
    return _pack_int4(_round_int4(weight, scale, np.float32(grid.low))), scale


def int4_scales(weight: np.ndarray, grid: Grid = KIMI) -> np.ndarray:
    """The scales of `encode_int4` alone."""
    amax = _group_max(weight)
    # Divided by NumPy: XLA may multiply by a rounded reciprocal instead.
    rule = np.maximum(amax / np.float32(grid.top), np.float32(grid.floor)).astype(BF16)
    if not grid.exact:
        return rule
    groups, sizes, scale = weight.reshape(-1, GROUP), amax.reshape(-1), rule.reshape(-1)
    candidates = _with_neighbours(scale)
    fitting = _first_fit(groups, candidates)
    scale = candidates[fitting % len(candidates), np.arange(len(scale))]
    missing = np.flatnonzero(fitting == len(candidates))
    for at in range(0, len(missing), CHUNK):
        _search_smaller(groups, sizes, scale, missing[at : at + CHUNK])
    return scale.reshape(rule.shape)


def _search_smaller(
    groups: np.ndarray, amax: np.ndarray, scale: np.ndarray, index: np.ndarray
) -> None:
    """Replace scales of groups whose largest value is below 7, where one fits exactly.

    The least largest value is taken: a multiple of it fits too, but needs all to be multiples. Of
    weights that were never quantised a few show that no scale fits.
    """
    for width in (4, GROUP):
        padded = np.resize(index, CHUNK)
        over = np.arange(1, 7, dtype=np.float32)[:, None]
        candidates = np.concatenate(
            [_with_neighbours(rule) for rule in (amax[padded] / over).astype(BF16)]
        )
        fitting = _first_fit(groups[padded, :width], candidates)[: len(index)]
        fits = np.flatnonzero(fitting < len(candidates))
        if not len(fits):
            return
        fitting, index = fitting[fits], index[fits]
    scale[index] = candidates[fitting, fits]


def _with_neighbours(scale: np.ndarray) -> np.ndarray:
    """bfloat16 [3, groups]: scales, and the numbers just below and above them."""
    bits = scale.view(np.uint16)
    return np.stack([bits, bits - np.uint16(1), bits + np.uint16(1)]).view(BF16)


@on_host
def _first_fit(groups: jax.Array, candidates: jax.Array) -> jax.Array:
    """Number of the first scale that gives each group back bit for bit; that of all if none does.

    Args:
        groups: [groups, values].
        candidates: bfloat16 [scales, groups].
    """
    value, count = groups.astype(jnp.float32), len(candidates)
    fitting = jnp.full(len(groups), count, jnp.int8)
    for number in reversed(range(count)):
        scale = candidates[number].astype(jnp.float32)[:, None]
        back = jnp.clip(jnp.round(value * (1 / scale)), -7, 7) * scale
        same = back.astype(jnp.bfloat16).astype(jnp.float32) == value
        fitting = jnp.where(same.all(axis=1), jnp.int8(number), fitting)
    return fitting


@on_host
def _group_max(weight: jax.Array) -> jax.Array:
    return jnp.abs(weight.astype(jnp.float32)).reshape(len(weight), -1, GROUP).max(axis=-1)


@on_host
def _round_int4(weight: jax.Array, scale: jax.Array, low: jax.Array) -> jax.Array:
    grouped = weight.astype(jnp.float32).reshape(len(weight), -1, GROUP)
    q = jnp.round(grouped / scale.astype(jnp.float32)[:, :, None])
    return jnp.clip(q, low, 7).astype(jnp.int32).reshape(weight.shape)


@on_host
def _pack_int4(q: jax.Array) -> jax.Array:
    nibbles = (q + 8).astype(jnp.uint32).reshape(len(q), -1, PER_WORD)
    shifts = jnp.arange(0, 4 * PER_WORD, 4, dtype=jnp.uint32)
    words = functools.reduce(jnp.bitwise_or, jnp.moveaxis(nibbles << shifts, -1, 0))
    return jax.lax.bitcast_convert_type(words, jnp.int32)
