"""The loss of next-token prediction."""

import jax
import jax.numpy as jnp


def cross_entropy(y_BTX: jax.Array, target_BT: jax.Array) -> jax.Array:
    """Compute the negative log likelihood of each target in nats, float32 [batch, length].

    Args:
        y_BTX: float32 logits; the vocabulary may be split over the mesh.
        target_BT: int32 token ids.
    """
    top_BT = jax.lax.stop_gradient(y_BTX.max(axis=-1))
    y_BTX -= top_BT[..., None]
    # A gather would send the whole vocabulary to every device; a masked sum sends nothing.
    hit_BTX = target_BT[..., None] == jnp.arange(y_BTX.shape[-1])
    target_logit_BT = jnp.where(hit_BTX, y_BTX, 0.0).sum(axis=-1)
    return jnp.log(jnp.exp(y_BTX).sum(axis=-1)) - target_logit_BT
