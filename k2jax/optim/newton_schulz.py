"""About the nearest orthogonal matrix, by products alone."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ConfigError, nearest
from k2jax.params.route import NS_STEPS

Polynomial = tuple[float, float, float]

# Polar Express: the minimax polynomial of each step for singular values from 0.001 to 1, then the
# one that keeps them at 1. Source: arXiv 2505.16932, algorithm 1.
_POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # values are taken for that much less, so that rounding cannot lift them past 1

# Odd polynomials a s + b s^3 + c s^5 of the singular values, one a step; the last one repeats.
POLYNOMIALS: dict[str, tuple[Polynomial, ...]] = {
    "moonlight": ((3.4445, -4.7750, 2.0315),),  # [ML 2.2]
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
}
RESTARTS = (3,)  # the best single one of the five steps; published: (2,)
HUGE = 2.0**48  # values whose squares, 2^30 of them, still have a sum in float32
BLOCKED = 128  # least rows of a block of a symmetric product


def schedule(polynomial: str | Sequence[Polynomial], steps: int) -> list[Polynomial]:
    """Coefficients of each step.

    Raises:
        ConfigError: no polynomial of that name, or no coefficients of each step.
    """
    if isinstance(polynomial, str) and polynomial not in POLYNOMIALS:
        raise ConfigError(f"no polynomial {polynomial!r}; {nearest(polynomial, POLYNOMIALS)}")
    each = POLYNOMIALS[polynomial] if isinstance(polynomial, str) else polynomial
    if not isinstance(each, Sequence) or not each or any(np.shape(abc) != (3,) for abc in each):
        raise ConfigError(f"polynomial must be a name or (a, b, c) of each step, not {polynomial}")
    return [each[min(step, len(each) - 1)] for step in range(steps)]


def newton_schulz(
    x: jax.Array,
    steps: int = NS_STEPS,
    dtype: str = "bfloat16",
    *,
    polynomial: str | Sequence[Polynomial] = "moonlight",
    gram: Sequence[int] | None = None,
    split: tuple[str, ...] = (),
) -> jax.Array:
    """About the nearest orthogonal matrix to each matrix of `x` [..., rows, columns].

    Each step maps a singular value s to a s + b s^3 + c s^5. Five steps of the standard polynomial
    take [0.01, 1] to [0.68, 1.14], which is near enough. As in Moonlight's code the matrix is cast
    first; the norm and all sums are float32. Zero matrices stay zero. Of any finite size the
    result is that of the same matrix at a usual size.

    With `gram` the steps are taken by the small matrix x xT: for sides a < b, 8 a^2 b + 28 a^3
    operations instead of 20 a^2 b + 10 a^3 (five steps, one restart). The 28 a^3 and half of the
    8 a^2 b are symmetric products, of which up to 3/8 are left out. Its rounding errors grow until
    x xT is made anew: a restart.

    Args:
        x: any float dtype. On an explicit mesh only the stack dims may be split.
        steps: how many.
        dtype: of the iteration.
        polynomial: a name of POLYNOMIALS, or (a, b, c) of each step; the last one repeats.
        gram: steps to restart the Gram iteration before: RESTARTS is the one to take,
            () never; None takes the standard iteration.
        split: mesh axes that split the rows, the longer side, within `shard_map`: every product
            is then divided over them. Standard iteration only.

    Returns:
        float32, of `x`'s shape.

    Source: [ML] section 2.1, toy_train.py; Gram Newton-Schulz (Zhang, Amsel, Chen, Dao 2026).
    """
    coefficients = schedule(polynomial, steps)
    if not coefficients:
        raise ValueError(f"newton_schulz needs at least one step, not {steps}")
    if x.ndim < 2:
        raise ValueError(f"newton_schulz takes [..., rows, columns], not an array of {x.shape}")
    if isinstance(gram, int | str):
        raise ValueError(f"`gram` lists the steps to restart before, as {RESTARTS}, not {gram!r}")
    if gram is not None and split:
        raise ValueError("newton_schulz takes `gram` or `split`, not both")
    wide = _without_overflow(x.astype(dtype).astype(jnp.float32), split)
    square = jnp.sum(wide * wide, axis=(-2, -1), keepdims=True)
    square = jax.lax.psum(square, split) if split else square
    y = (wide / (jnp.sqrt(square) + 1e-7)).astype(dtype)
    if gram is not None:
        return _by_gram(y, coefficients, tuple(gram)).astype(jnp.float32)
    return _standard(y, coefficients, split).astype(jnp.float32)


def _without_overflow(x: jax.Array, split: tuple[str, ...]) -> jax.Array:
    """`x`, or `x` over a power of two where the squares of a huge matrix would overflow.

    Usual matrices are multiplied by exactly 1. What is not finite stays so.
    """
    size = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0)
    size = jax.lax.pmax(size, split) if split else size
    # Where the size is 2^e, the bits of 2^-e: exponents are kept above what counts as subnormal.
    exponent = jnp.minimum(jax.lax.bitcast_convert_type(size, jnp.int32) >> 23, 253)
    inverse = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    return x * jnp.where(size > HUGE, inverse, 1.0)


def _standard(x: jax.Array, coefficients: list[Polynomial], split: tuple[str, ...]) -> jax.Array:
    tall, dtype = _tall(x, split), x.dtype

    def step(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        # Sums are float32 and rounded once, and coefficients never.
        a, b, c = abc
        part = _gram(x, tall)
        gram, rows = _sum(part, split, dtype) if split else (part.astype(dtype), part)
        poly = (b * rows + c * _times(rows.astype(dtype), gram)).astype(dtype)
        if split:
            poly = jax.lax.all_gather(poly, split, axis=poly.ndim - 2, tiled=True)
        moved = _times(x, poly) if tall else _times(poly, x)
        return (a * x.astype(jnp.float32) + moved).astype(dtype), None

    # A loop: unrolled, every step of every leaf would be compiled by itself.
    return jax.lax.scan(step, x, jnp.asarray(coefficients, jnp.float32))[0]


def _sum(part: jax.Array, split: tuple[str, ...], dtype) -> tuple[jax.Array, jax.Array]:
    """The sum of every device's `part`, whole in `dtype`, and this device's rows in float32."""
    n, height = jax.lax.axis_size(split), part.shape[-2]
    chunks = part.astype(dtype).reshape(*part.shape[:-2], n, height // n, part.shape[-1])
    at = chunks.ndim - 3
    chunks = jax.lax.all_to_all(chunks, split, split_axis=at, concat_axis=at, tiled=True)
    rows = chunks.astype(jnp.float32).sum(axis=-3)
    return jax.lax.all_gather(rows.astype(dtype), split, axis=part.ndim - 2, tiled=True), rows


def _by_gram(x: jax.Array, coefficients: list[Polynomial], restarts: tuple[int, ...]) -> jax.Array:
    """The product of x and one polynomial of its Gram matrix R for each stretch between restarts.

    A step multiplies by a + Z, Z = b R + c R^2, and takes R to (a + Z) R (a + Z). The polynomial is
    kept as q + E: its multiple of the identity is by far its largest part, and never rounded. All
    are polynomials of one R, so they commute and are symmetric.
    """
    tall, dtype = _tall(x), x.dtype
    # XLA's CPU backend folds a transpose before this into a product, and has none for bfloat16.
    x = jax.lax.optimization_barrier(x)
    cuts = [0, *sorted(at for at in set(restarts) if 0 < at < len(coefficients)), len(coefficients)]

    size = min(x.shape[-2:])

    def wide(y: jax.Array) -> jax.Array:
        return y.astype(jnp.float32)

    def symmetric_times(left: jax.Array, right: jax.Array) -> jax.Array:
        return _symmetric(lambda i, j: _times(left[..., i, :], right[..., j]), size)

    for first, last in itertools.pairwise(cuts):
        r = _symmetric(functools.partial(_gram, x, tall), size).astype(dtype)
        q, e = 1.0, None
        for step in range(first, last):
            a, b, c = coefficients[step]
            z = (b * wide(r) + c * symmetric_times(r, r)).astype(dtype)
            e = z if e is None else q * wide(z) + a * wide(e) + symmetric_times(e, z)
            e = e.astype(dtype)
            q *= a
            if step + 1 < last:  # the last Gram matrix of a stretch is not needed
                half = (a * wide(r) + symmetric_times(r, z)).astype(dtype)
                r = (a * wide(half) + symmetric_times(z, half)).astype(dtype)
        assert e is not None
        x = (q * wide(x) + (_times(x, e) if tall else _times(e, x))).astype(dtype)
    return x


def _tall(x: jax.Array, split: tuple[str, ...] = ()) -> bool:
    return bool(split) or x.shape[-2] > x.shape[-1]


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _gram(
    x: jax.Array, tall: bool, rows: slice = slice(None), columns: slice = slice(None)
) -> jax.Array:
    """A part of x xT, or of xT x of a tall x: over the longer side, nothing transposed."""
    left, right = (x[..., part] if tall else x[..., part, :] for part in (rows, columns))
    einsum = "...mi,...mj->...ij" if tall else "...im,...jm->...ij"
    return jnp.einsum(einsum, left, right, preferred_element_type=jnp.float32)


def _symmetric(product: Callable[[slice, slice], jax.Array], size: int) -> jax.Array:
    """A product that is known to be symmetric: blocks below its diagonal are not computed.

    Args:
        product: some rows and some columns of it.
        size: its rows.
    """
    block = max(BLOCKED, -(-size // 4))
    cuts = range(0, size, block)
    upper = [product(slice(at, at + block), slice(at, size)) for at in cuts]
    rows = [
        [jnp.swapaxes(upper[j][..., at - cuts[j] :][..., :block], -1, -2) for j in range(i)]
        + [upper[i]]
        for i, at in enumerate(cuts)
    ]
    return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
