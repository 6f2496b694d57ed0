"""The layout in which products take the weights of the routed experts."""

import jax
import jax.numpy as jnp

# gate_up_EDG, each expert's gate projection followed by its up-projection (G = 2 F), and down_EFD:
# one product reads a row once, and its gradient is one sum.
Weights = tuple[jax.Array, jax.Array]


def fuse_gate_up(gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array) -> Weights:
    """Put gate and up-projections side by side."""
    return jnp.concatenate([gate_EDF, up_EDF], axis=-1), down_EFD


def split_gate_up(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gate and up, the halves along the last dim."""
    width = gate_up.shape[-1] // 2
    return gate_up[..., :width], gate_up[..., width:]
