"""Learning rates over a run."""

import jax
import jax.numpy as jnp
import optax

from k2jax.optim.checks import number


def warmup_stable_decay(
    peak: float, steps: int, *, warmup: int, decay: float, final: float
) -> optax.Schedule:
    """Linear warm-up, constant, cosine (WSD).

    Args:
        peak: the constant rate.
        steps: of the whole run.
        warmup: steps to reach the peak; the first step already moves (peak / warmup).
        decay: share of all steps in the closing cosine.
        final: last rate over the peak.

    Source: [K2-TR]: 500 steps, 2e-4 for 10T tokens, then cosine to 2e-5 over 5.5T.
    """
    number("peak", peak)
    number("warmup", warmup)
    number("decay", decay, high=1)
    number("final", final, high=1)

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        length = max(decay * steps, 1.0)
        gone = jnp.clip((step + 1 - (steps - length)) / length, 0.0, 1.0)
        fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * gone))
        return peak * rise * (fall if decay else 1.0)

    return rate
