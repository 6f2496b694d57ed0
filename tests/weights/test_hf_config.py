"""Published configs: what the releases say, and what is refused by name."""

import json

import pytest

from k2jax import configs
from k2jax.config import (
    ConfigError,
    to_json,
)
from k2jax.weights.hf_config import FIXED, PUBLISHED, from_published, published_fields

K2 = {
    "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 2.827, "seq_aux": True, "aux_loss_alpha": 0.001,
    "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "attention_bias": False, "attention_dropout": 0.0, "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0, "max_position_embeddings": 131072, "vocab_size": 163840,
    "rope_scaling": {
        "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
    "bos_token_id": 163584, "eos_token_id": 163585, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0, "initializer_range": 0.02, "hidden_act": "silu",
    "pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip


def with_yarn(fields, **yarn):
    return fields | {"rope_scaling": fields["rope_scaling"] | yarn}


K2_0905 = with_yarn(K2, factor=64.0) | {"max_position_embeddings": 262144}
THINKING = K2_0905 | {"rms_norm_eps": 1e-5, "eos_token_id": 163586}
K2_5 = {
    "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"],
    "media_placeholder_token_id": 163605, "vision_config": {"hidden_size": 1152},
    "text_config": with_yarn(THINKING, beta_fast=32.0),
}  # fmt: skip
MOONLIGHT = {name: value for name, value in K2.items() if "rope_scaling" != name} | {
    "model_type": "deepseek_v3", "num_hidden_layers": 27, "hidden_size": 2048,
    "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "routed_scaling_factor": 2.446,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "eos_token_id": 163586,
}  # fmt: skip
DEEPSEEK = with_yarn(K2, factor=40, beta_fast=32, beta_slow=1) | {
    "model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_routed_experts": 256,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "num_attention_heads": 128,
    "num_key_value_heads": 128, "rope_theta": 10000, "max_position_embeddings": 163840,
    "vocab_size": 129280, "num_nextn_predict_layers": 1,
}  # fmt: skip
RELEASES = {
    "kimi_k2": K2, "kimi_k2_0905": K2_0905, "kimi_k2_thinking": THINKING, "kimi_k2_5": K2_5,
    "moonlight_16b_a3b": MOONLIGHT, "deepseek_v3": DEEPSEEK,
}  # fmt: skip


def rewritten(fields):
    """As transformers 5 writes it: rotary fields in one place, `dtype`, sub-variant `rope_type`."""
    if "text_config" in fields:
        return fields | {"text_config": rewritten(fields["text_config"])}
    rope = dict(fields.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", "default")
    rope["rope_theta"] = fields["rope_theta"]
    gone = ("rope_scaling", "rope_theta", "torch_dtype")
    kept = {name: value for name, value in fields.items() if name not in gone}
    return kept | {"rope_parameters": rope, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", RELEASES)
def test_presets_are_the_published_configs(name):
    assert from_published(RELEASES[name]) == configs.load(name).model


@pytest.mark.parametrize("name", RELEASES)
def test_configs_that_transformers_5_wrote_say_the_same(name):
    assert from_published(rewritten(RELEASES[name])) == configs.load(name).model


def test_a_published_file_or_its_folder_is_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MOONLIGHT))
    for where in (tmp_path, tmp_path / "config.json"):
        run = configs.load(str(where))
        assert run.model == configs.load("moonlight_16b_a3b").model
        assert run.name == tmp_path.name
    (tmp_path / "config.json").write_text(json.dumps(MOONLIGHT | {"max_position_embeddings": 64}))
    assert configs.load(str(tmp_path)).data.context == 64  # a run that can be described


def test_a_runs_own_file_is_that_run(tmp_path):
    run = configs.load("tiny")
    (tmp_path / "config.json").write_text(json.dumps(to_json(run)))
    assert configs.load(str(tmp_path)) == run
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=f"{tmp_path} has no config.json"):
        configs.load(str(tmp_path))


@pytest.mark.parametrize("value", ["1", 1.0, True])
def test_the_number_of_mtp_layers_is_whole(value):
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers is .* a whole number"):
        from_published(K2 | {"num_nextn_predict_layers": value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "softmax"), ("topk_method", "greedy"), ("norm_topk_prob", False),
        ("moe_layer_freq", 2), ("attention_bias", True), ("attention_dropout", 0.1),
        ("hidden_act", "gelu"), ("tie_word_embeddings", True),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_by_name(field, value):
    assert field in FIXED
    with pytest.raises(ConfigError, match=rf"{field} is {value!r}; k2jax has") as caught:
        from_published(K2 | {field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [*PUBLISHED.values(), "num_hidden_layers"])
def test_a_missing_field_is_named(field):
    with pytest.raises(ConfigError, match=f"no '{field}'"):
        from_published({name: value for name, value in K2.items() if name != field})


def test_another_rope_scaling_is_refused():
    with pytest.raises(ConfigError, match="'longrope'; k2jax has 'yarn'"):
        from_published(with_yarn(K2, type="longrope"))


def test_a_missing_beta_fast_is_32_as_in_the_published_code():
    rope = {k: v for k, v in K2["rope_scaling"].items() if not k.startswith("beta")}
    yarn = from_published(K2 | {"rope_scaling": rope}).yarn
    assert (yarn.beta_fast, yarn.beta_slow) == (32, 1)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        published_fields(tmp_path)
    with pytest.raises(ConfigError, match="no file"):
        published_fields(tmp_path / "elsewhere.json")
