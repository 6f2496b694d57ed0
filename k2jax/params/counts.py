"""How many parameters a model has, how many work on a token, and the operations that takes."""

import math
from collections.abc import Mapping

from k2jax.config import ModelConfig
from k2jax.params.spec import ParamSpec


def counts(cfg: ModelConfig, leaves: Mapping[str, ParamSpec]) -> dict[str, int]:
    """How many parameters there are, and how many work on a token. Source: spec 1.9.

    Keys: `total_parameters`; `active_matmul_parameters` (of the layers), the same
    `..._with_head`, `..._with_head_and_embedding`; `active_parameters` with norms and biases, and
    again with head and embedding. Layers that predict further (MTP) are not in these, but in
    `mtp_parameters` and `mtp_active_matmul_parameters`, without the head and embedding they share.
    """
    sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    tables = {"embed", "head", "norm"}

    def active(name: str) -> int:
        routed = "experts" in leaves[name].axes
        return sizes[name] * cfg.experts_per_token // cfg.experts if routed else sizes[name]

    ahead = [name for name in leaves if "mtp_layers" in leaves[name].axes]
    layers = [name for name in leaves if name not in tables and name not in ahead]
    matmul = sum(active(name) for name in layers if leaves[name].contracted)
    everything = sum(map(active, layers)) + sizes["norm"]
    return {
        "total_parameters": sum(size for name, size in sizes.items() if name not in ahead),
        "active_matmul_parameters": matmul,
        "active_matmul_parameters_with_head": matmul + sizes["head"],
        "active_matmul_parameters_with_head_and_embedding": matmul + sizes["head"] + sizes["embed"],
        "active_parameters": everything,
        "active_parameters_with_head": everything + sizes["head"],
        "active_parameters_with_head_and_embedding": everything + sizes["head"] + sizes["embed"],
        "mtp_parameters": sum(sizes[name] for name in ahead),
        "mtp_active_matmul_parameters": sum(
            active(name) for name in ahead if leaves[name].contracted
        ),
    }


def flops(cfg: ModelConfig, counted: Mapping[str, int], context: int) -> dict[str, int]:
    """Floating-point operations, a multiplication and an addition each one. Source: spec 1.10.

    Keys: `matmul_flops_per_token` (forward); `attention_flops_per_token_per_key` (forward, for
    each key attended); `absorbed_attention_...` (the same in decoding from the latent cache);
    `forward_flops_per_token` at `context`, causal average; `mtp_flops_per_token`, the same of the
    MTP layers with a head each; `train_flops_per_token`, three times both;
    `forward_flops_per_token_full_context` where all `context` keys are seen.
    """
    matmul = 2 * counted["active_matmul_parameters_with_head"]
    per_head = cfg.nope + cfg.rope + cfg.value
    attention = 2 * cfg.layers * cfg.heads * per_head
    heads = counted["active_matmul_parameters_with_head"] - counted["active_matmul_parameters"]
    ahead = 2 * (counted["mtp_active_matmul_parameters"] + cfg.mtp_layers * heads)
    ahead += 2 * cfg.mtp_layers * cfg.heads * per_head * (context + 1) // 2
    absorbed = 2 * cfg.layers * cfg.heads * (2 * cfg.kv_rank + cfg.rope)
    causal = matmul + attention * (context + 1) // 2
    return {
        "matmul_flops_per_token": matmul,
        "attention_flops_per_token_per_key": attention,
        "absorbed_attention_flops_per_token_per_key": absorbed,
        "forward_flops_per_token": causal,
        "forward_flops_per_token_full_context": matmul + attention * context,
        "mtp_flops_per_token": ahead,
        "train_flops_per_token": 3 * (causal + ahead),
    }
