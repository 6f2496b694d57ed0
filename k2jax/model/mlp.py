"""SwiGLU: the dense first layers and the shared experts."""

import jax
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.model.projection import project
from k2jax.params.declare import Declare


class Mlp(nnx.Module):
    """Weights of one gated MLP; `hidden` is the axis of its inner width."""

    def __init__(self, cfg: ModelConfig, stack: str, hidden: str, prefix: str):
        declare = Declare(cfg, stack, prefix)
        self.gate = declare(f"embed {hidden}", 1, "gate_proj")
        self.up = declare(f"embed {hidden}", 1, "up_proj")
        self.down = declare(f"{hidden} embed", 1, "down_proj")


def gated(w: Mlp, x_BTD: jax.Array) -> jax.Array:
    """`down(silu(gate x) * up x)`, no biases."""
    hidden = ("batch", "length", "ffw")
    gate_BTF = project("btd,df->btf", x_BTD, w.gate, hidden)
    up_BTF = project("btd,df->btf", x_BTD, w.up, hidden)
    return project("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, w.down, ("batch", "length", None))
