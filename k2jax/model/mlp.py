"""SwiGLU: the dense first layers and the shared experts."""

import jax

from k2jax.model.projection import Policy, project
from k2jax.params.kimi import Mlp


def gated_mlp(w: Mlp, x_BTD: jax.Array, policy: Policy) -> jax.Array:
    """Compute `down(silu(gate x) * up x)`, without biases."""
    hidden = ("batch", "length", "ffw")
    gate_BTF = project("btd,df->btf", x_BTD, w.gate, hidden, policy)
    up_BTF = project("btd,df->btf", x_BTD, w.up, hidden, policy)
    inner_BTF = jax.nn.silu(gate_BTF) * up_BTF
    return project("btf,fd->btd", inner_BTF, w.down, ("batch", "length", None), policy)
