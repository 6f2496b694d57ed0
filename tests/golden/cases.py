"""Tiny models of the family with odd sizes, spelled as the releases spell their `config.json`."""

import numpy as np

_FIXED = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "moe_layer_freq": 1, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "num_nextn_predict_layers": 0, "initializer_range": 0.02,
    "torch_dtype": "float32",
}  # fmt: skip


def _yarn(factor: float, beta_fast: float, context: int) -> dict:
    return {
        "type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": context,
    }  # fmt: skip


# Each YaRN context is small enough for its frequencies to turn visibly within the golden rows.
CASES = {
    # The widths divide over the meshes of test_mesh.py.
    "kimi": _FIXED | {
        "vocab_size": 62, "hidden_size": 28, "num_hidden_layers": 4, "first_k_dense_replace": 1,
        "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 18, "kv_lora_rank": 10,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5, "intermediate_size": 38,
        "n_routed_experts": 8, "moe_intermediate_size": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 1, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 50_000.0, "rope_scaling": _yarn(32.0, 1.0, 256),
        "max_position_embeddings": 8_192,
    },
    "moonlight": _FIXED | {
        "vocab_size": 67, "hidden_size": 31, "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": None,
        "kv_lora_rank": 13, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 9,
        "intermediate_size": 45, "n_routed_experts": 7, "moe_intermediate_size": 9,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.446,
        "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "rope_theta": 50_000.0,
        "rope_scaling": None, "max_position_embeddings": 8_192,
    },
    "deepseek": _FIXED | {
        "vocab_size": 58, "hidden_size": 30, "num_hidden_layers": 4, "first_k_dense_replace": 2,
        "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 15, "kv_lora_rank": 11,
        "qk_nope_head_dim": 5, "qk_rope_head_dim": 12, "v_head_dim": 7, "intermediate_size": 21,
        "n_routed_experts": 12, "moe_intermediate_size": 5, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "rope_scaling": _yarn(40.0, 32.0, 4_096),
        "max_position_embeddings": 163_840,
    },
}  # fmt: skip


def varied(name: str, seed: int) -> dict:
    """The case with other sizes."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return int(rng.integers(low, high))

    heads, groups = draw(2, 8), CASES[name]["n_group"]
    return CASES[name] | {
        "vocab_size": draw(40, 90), "hidden_size": draw(17, 50), "num_attention_heads": heads,
        "num_key_value_heads": heads, "q_lora_rank": CASES[name]["q_lora_rank"] and draw(9, 30),
        "kv_lora_rank": draw(7, 20), "qk_nope_head_dim": draw(3, 12),
        "qk_rope_head_dim": 2 * draw(2, 9), "v_head_dim": draw(3, 12),
        "intermediate_size": draw(20, 60), "n_routed_experts": groups * draw(6, 10),
        "moe_intermediate_size": draw(5, 15), "num_experts_per_tok": draw(2, 5),
    }  # fmt: skip
