"""Every weight of the network, one line each. Read without jax: the planner counts these too.

`declare("q_latent heads qk", 1, "q_b_proj")`: the axes, whose lengths are fields of `ModelConfig`;
how many of them meet the input; the published name. `k2jax.model` computes with what is declared.
"""

import functools

from k2jax.config import ModelConfig
from k2jax.params.declare import Declare, specs
from k2jax.params.spec import ParamSpec


class Attention:
    """Multi-head latent attention; `heads` is the only axis that a mesh splits while it is used."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.self_attn.")
        # fmt: off
        if cfg.q_rank:
            self.q_down = declare("embed q_rank",      1, "q_a_proj")
            self.q_norm = declare("q_gain",            0, "q_a_layernorm")
            self.q_up   = declare("q_latent heads qk", 1, "q_b_proj")
        else:
            self.q      = declare("embed heads qk",    1, "q_proj")
        self.kv_down    = declare("embed latent",      1, "kv_a_proj_with_mqa")
        self.kv_norm    = declare("kv_gain",           0, "kv_a_layernorm")
        self.kv_up      = declare("kv_latent heads kv", 1, "kv_b_proj")
        self.out        = declare("heads value embed", 2, "o_proj")
        # fmt: on


class Mlp:
    """One gated MLP; `hidden` is the axis of its inner width."""

    def __init__(self, cfg: ModelConfig, stack: str, hidden: str, prefix: str):
        declare = Declare(cfg, stack, prefix)
        self.gate = declare(f"embed {hidden}", 1, "gate_proj")
        self.up = declare(f"embed {hidden}", 1, "up_proj")
        self.down = declare(f"{hidden} embed", 1, "down_proj")


class Experts:
    """The routed experts."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.mlp.experts.{e}.")
        self.gate = declare("experts expert_embed expert_ffw", 1, "gate_proj")
        self.up = declare("experts expert_embed expert_ffw", 1, "up_proj")
        self.down = declare("experts expert_ffw expert_embed", 1, "down_proj")


class Moe:
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.mlp.")
        self.router = declare("embed router", 1, "gate")
        self.bias = declare.bias("router", "gate.e_score_correction_bias")
        self.experts = Experts(cfg, stack)
        if cfg.shared_experts:
            self.shared = Mlp(cfg, stack, "shared_ffw", "model.layers.{l}.mlp.shared_experts.")


class Layer:
    """One kind of layer, stacked; `moe` or `mlp` follows the attention."""

    def __init__(self, cfg: ModelConfig, stack: str):
        declare = Declare(cfg, stack, "model.layers.{l}.")
        self.attention_norm = declare("gain", 0, "input_layernorm")
        self.attention = Attention(cfg, stack)
        self.mlp_norm = declare("gain", 0, "post_attention_layernorm")
        if stack == "dense_layers":
            self.mlp = Mlp(cfg, stack, "ffw", "model.layers.{l}.mlp.")
        else:
            self.moe = Moe(cfg, stack)


class Mtp(Layer):
    """The layers of multi-token prediction: what joins the inputs, a layer, and a norm.

    Embedding and head are the main model's; published files repeat them. Source: [DSV3-TR 2.2].
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, "mtp_layers")
        declare = Declare(cfg, "mtp_layers", "model.layers.{l}.")
        self.embed_norm = declare("gain", 0, "enorm")
        self.hidden_norm = declare("gain", 0, "hnorm")
        self.join = declare("joined embed", 1, "eh_proj")
        self.norm = declare("gain", 0, "shared_head.norm")


class Kimi:
    """The whole network. Dense and mixture layers are two stacks; `dense` and `mtp` may be absent.

    Attributes are `ParamSpec`s; `k2jax.params.arrays.bind` puts arrays in their place.
    """

    def __init__(self, cfg: ModelConfig):
        declare = Declare(cfg)
        ahead = range(cfg.layers, cfg.layers + cfg.mtp_layers)

        def copies_of(name: str) -> tuple[str, ...]:
            return tuple(f"model.layers.{n}.{name}.weight" for n in ahead)

        self.embed = declare(
            "vocab embed", 0, "model.embed_tokens", "normal", copies_of("embed_tokens")
        )
        if cfg.dense_layers:
            self.dense = Layer(cfg, "dense_layers")
        self.layers = Layer(cfg, "moe_layers")
        if cfg.mtp_layers:
            self.mtp = Mtp(cfg)
        self.norm = declare("gain", 0, "model.norm")
        self.head = declare("embed vocab", 1, "lm_head", copies=copies_of("shared_head.head"))


@functools.cache
def declare_kimi(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Declare the whole network once: name and declaration of every parameter, sorted by name."""
    return specs(Kimi(cfg))
