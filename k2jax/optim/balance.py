"""Router bias: pushed towards even use of the experts, without a loss or a gradient."""

import jax.numpy as jnp
import optax


def balance(rate: float) -> optax.GradientTransformationExtraArgs:
    """Move each expert's bias by about `rate` against its excess load.

    update = rate (sign(mean load - load) - mean of those signs): centred, so that the biases' mean
    stays. Apply it to the bias alone; gradients are ignored.

    Args:
        rate: bias moved a step, in units of the sigmoid score.

    Returns:
        A transform whose `update` needs `expert_load` [layers, experts]: choices that fell on each
        expert in the whole global batch.

    Source: [ML] appendix C; the rule without centring is [DSV3-TR] 2.1.2.
    """

    def update(updates, state, params=None, *, expert_load=None, **_):
        del updates
        if params is None or expert_load is None:
            raise ValueError("balance needs tx.update(None, state, bias, expert_load=...)")
        sign = jnp.sign(expert_load.mean(axis=-1, keepdims=True) - expert_load)
        moved = rate * (sign - sign.mean(axis=-1, keepdims=True))
        return moved.astype(jnp.float32), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
