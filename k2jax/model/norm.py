"""Root mean square norm."""

import jax
import jax.numpy as jnp

from k2jax.model.projection import apply_norm_scale


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """`x` over its root mean square along the last dim, times `gain`.

    The mean is float32; the result returns to `x`'s dtype before the gain, as the published
    weights expect [JLE modeling 94-108].
    """
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return apply_norm_scale(wide.astype(x.dtype), gain)
