"""How many parameters a model has, how many work on a token, and the operations that takes.

The only place that counts them: `describe`, `plan`, the MFU of a run and the report ask here.
"""

from k2jax.config import ModelConfig
from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec

TABLES = ("embed", "head", "norm")  # parameters that are in no layer


def active_size(leaf: ParamSpec, cfg: ModelConfig) -> int:
    """Count the numbers of a parameter that work on one token: of experts, those it chooses."""
    return leaf.size * cfg.experts_per_token // cfg.experts if leaf.routed else leaf.size


def count_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Count all parameters, and those that work on a token. Source: [K2-TR].

    Keys: `total_parameters`; `active_matmul_parameters` (of the layers), the same
    `..._with_head`, `..._with_head_and_embedding`; `active_parameters` with norms and biases, and
    again with head and embedding. MTP layers are not in these, but in `mtp_parameters` and
    `mtp_active_matmul_parameters`, without the head and embedding that they share.
    """
    leaves = declare_kimi(cfg)
    mtp = [leaf for leaf in leaves.values() if "mtp_layers" in leaf.axes]
    main = {name: leaf for name, leaf in leaves.items() if "mtp_layers" not in leaf.axes}
    layers = [leaf for name, leaf in main.items() if name not in TABLES]
    embedding, head, norm = (leaves[name].size for name in TABLES)
    matmul = sum(active_size(leaf, cfg) for leaf in layers if leaf.contracted)
    everything = sum(active_size(leaf, cfg) for leaf in layers) + norm
    return {
        "total_parameters": sum(leaf.size for leaf in main.values()),
        "active_matmul_parameters": matmul,
        "active_matmul_parameters_with_head": matmul + head,
        "active_matmul_parameters_with_head_and_embedding": matmul + head + embedding,
        "active_parameters": everything,
        "active_parameters_with_head": everything + head,
        "active_parameters_with_head_and_embedding": everything + head + embedding,
        "mtp_parameters": sum(leaf.size for leaf in mtp),
        "mtp_active_matmul_parameters": sum(
            active_size(leaf, cfg) for leaf in mtp if leaf.contracted
        ),
    }


def count_flops(cfg: ModelConfig, context: int) -> dict[str, int]:
    """Count floating-point operations, a multiplication and an addition each one.

    Keys: `matmul_flops_per_token` (forward);
    `attention_flops_per_token_per_key` (forward, for each key attended); `absorbed_attention_...`
    (the same in decoding from the latent cache); `forward_flops_per_token` at `context`, causal
    average; `mtp_flops_per_token`, the same of the MTP layers with a head each;
    `train_flops_per_token`, three times both: what MFU counts;
    `forward_flops_per_token_full_context` where all `context` keys are seen.
    """
    counted = count_parameters(cfg)
    per_layer = 2 * cfg.heads * (cfg.nope + cfg.rope + cfg.value)  # attention to one key
    head = declare_kimi(cfg)["head"].size
    matmul = 2 * counted["active_matmul_parameters_with_head"]
    attention = cfg.layers * per_layer
    causal = matmul + attention * (context + 1) // 2
    mtp = 2 * (counted["mtp_active_matmul_parameters"] + cfg.mtp_layers * head)
    mtp += cfg.mtp_layers * per_layer * (context + 1) // 2
    return {
        "matmul_flops_per_token": matmul,
        "attention_flops_per_token_per_key": attention,
        "absorbed_attention_flops_per_token_per_key": (
            2 * cfg.layers * cfg.heads * (2 * cfg.kv_rank + cfg.rope)
        ),
        "forward_flops_per_token": causal,
        "forward_flops_per_token_full_context": matmul + attention * context,
        "mtp_flops_per_token": mtp,
        "train_flops_per_token": 3 * (causal + mtp),
    }
