"""Fields of a config that change the numbers are carried out or refused by name."""

import json
import math

import pytest

from k2jax import configs
from k2jax.config import ConfigError
from k2jax.weights.hf_config import from_published, to_published

FIELDS = {
    "model_type": "deepseek_v3",
    "vocab_size": 640,
    "hidden_size": 64,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 50000.0,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"rope_interleave": None}, "rope_interleave is None"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types"),
        ({"index_topk": 2048}, "index_topk is 2048"),
        ({"swiglu_limit": 7.0}, "swiglu_limit is 7.0"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"embedding_multiplier": 12}, "embedding_multiplier is 12"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"qk_head_dim": 32}, "qk_head_dim is 32"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config"),
        ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": YARN | {"attention_factor": 0.5}}, "attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate is False"),
        ({"rope_scaling": YARN | {"mrope_section": [2, 1, 1]}}, "mrope_section"),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, "which is right"),
        ({"rope_scaling": YARN | {"factor": math.nan}}, "rope_scaling"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}}, "different things"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta is 50000.0 and"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
            "rope_parameters differs by the kind of layer",
        ),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ],
)
def test_a_field_that_changes_the_numbers_is_refused_by_name(fields, named):
    with pytest.raises(ConfigError) as error:
        from_published(FIELDS | fields)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None, "swiglu_limit": None, "attention_chunk_size": None},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]},
        {"head_dim": 8, "qk_head_dim": 24, "num_key_value_heads": 2, "pretraining_tp": 2},
        {"partial_rotary_factor": 1.0, "logits_scaling": 1, "hidden_act": "swish"},
        {"top_k": 50, "aux_loss_alpha": 0.001, "ep_size": 1, "something_new": {"a": 1}},
    ],
)
def test_harmless_fields_and_features_that_are_off_pass(fields):
    assert from_published(FIELDS | fields) == from_published(FIELDS)


def test_an_attention_factor_that_follows_from_mscale_is_read():
    ours = 0.1 * math.log(4.0) + 1  # mscale 1 over mscale_all_dim 0
    yarn = YARN | {"attention_factor": ours, "truncate": True, "rope_type": "yarn"}
    assert from_published(FIELDS | {"rope_scaling": yarn}).yarn.factor == 4.0


def test_a_config_of_ours_names_what_other_readers_would_default():
    fields = to_published(from_published(FIELDS))
    assert fields["rope_interleave"] is True
    assert from_published(fields) == from_published(FIELDS)


@pytest.mark.parametrize("name", ["k2_small.json", "with space.json", "config", "é.cfg"])
def test_a_config_file_of_any_name_is_read(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(json.dumps(FIELDS))
    monkeypatch.chdir(tmp_path)
    for path in (name, f"./{name}", str(tmp_path / name)):
        run = configs.load(path)
        assert run.model == from_published(FIELDS) and run.name == name.partition(".")[0]


@pytest.mark.parametrize("path", ["nothing.json", "some/where"])
def test_a_path_without_a_file_is_no_misspelt_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no file {path}"):
        configs.load(path)
