"""Root mean square norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.model.projection import Policy, apply_norm_scale, read_weight


def rms_norm(x: jax.Array, gain: nnx.Variable, eps: float, policy: Policy) -> jax.Array:
    """Divide `x` by its root mean square along the last dim and multiply by `gain`.

    The mean is float32; the result returns to `x`'s dtype before the gain, as the published
    weights expect [JLE modeling 94-108].
    """
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    # The gain is read in float32, so that its gradient stays in float32.
    return apply_norm_scale(wide.astype(x.dtype), read_weight(gain, policy, "float32"))
