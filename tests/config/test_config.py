"""Configs: what the releases publish, what people get wrong, what is saved and read back."""

import dataclasses
import json
import math
import operator

import pytest

from k2jax import configs
from k2jax.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Yarn,
    each_knob,
    from_json,
    one_line,
    override,
    to_json,
    validate,
)
from k2jax.config.suggest import ALIASES
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.setps": "3"}, "train has no 'setps'; did you mean --train.steps?"),
        ({"trian.steps": "3"}, "the run has no 'trian'; did you mean --train.steps?"),
        ({"model.yarn.facto": "3"}, "model.yarn has no 'facto'; did you mean --model.yarn.factor?"),
        ({"yarn.factor": "3"}, "the run has no 'yarn'; did you mean --model.yarn.factor?"),
        ({"train.rows": "3"}, "train has no 'rows'; did you mean --data.rows?"),
        ({"optim.lr": "3"}, "optim has no 'lr'; did you mean --optim.learning_rate?"),
        ({"data.batch_size": "3"}, "data has no 'batch_size'; did you mean --data.rows?"),
        ({"train.max_steps": "3"}, "train has no 'max_steps'; did you mean --train.steps?"),
        ({"mesh.devices": "8"}, "mesh has no 'devices'; devices are counted along the axes"),
        ({"train.steps": "many"}, "train.steps is int, 'many' is not"),
        ({"train.steps": "1.5"}, "train.steps is int, '1.5' is not"),
        ({"optim.learning_rate": "nan"}, "optim.learning_rate is nan; it must be finite"),
        ({"model.yarn": "3"}, "model.yarn is a section; set one of its fields: factor, "),
        ({"train.steps.more": "3"}, "train.steps has no fields"),
        ({"train.qqq": "3"}, "train has no 'qqq'; there are: steps, seed, "),
    ],
)
def test_a_wrong_setting_is_answered_with_the_nearest_right_one(settings, message):
    with pytest.raises(ConfigError) as caught:
        override(RunConfig(), settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_alias_and_every_unless_names_a_setting():
    run = RunConfig()
    for name in ALIASES.values():
        operator.attrgetter(name)(run)
    for _, knob, _ in each_knob(run):
        for name in knob.unless:
            operator.attrgetter(name)(run)


def test_a_value_that_is_not_a_number_is_out_of_bounds():
    run = dataclasses.replace(RunConfig(), optim=OptimConfig(momentum=math.nan))
    with pytest.raises(ConfigError, match=r"optim\.momentum is nan; it must be in 0\.\.1"):
        validate(run)


def test_an_error_of_many_lines_becomes_one():
    assert one_line(ValueError("a\n  b\n")) == "a b"
    assert one_line(ValueError("a"), typed=True) == "ValueError: a"
    assert one_line(ValueError()) == one_line(ValueError(), typed=True) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 300


def test_settings_change_their_field_and_nothing_else():
    run = override(RunConfig(), {"model.yarn.factor": "64", "train.steps": "7", "data.path": "x"})
    yarn = dataclasses.replace(RunConfig().model.yarn, factor=64.0)
    right = dataclasses.replace(
        RunConfig(),
        model=dataclasses.replace(RunConfig().model, yarn=yarn),
        train=dataclasses.replace(RunConfig().train, steps=7),
        data=dataclasses.replace(RunConfig().data, path="x"),
    )
    assert run == right


@pytest.mark.parametrize("name", configs.NAMES)
def test_every_named_run_is_valid_and_survives_json(name):
    run = configs.load(name)
    assert run.name == name
    validate(run)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_a_saved_config_with_an_unknown_field_is_refused():
    fields = to_json(RunConfig())
    fields["train"]["stepz"] = 3
    with pytest.raises(ConfigError, match="unknown field 'stepz'; did you mean 'steps'"):
        from_json(fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.dtype": "bfloat61"}, "train.dtype is 'bfloat61'; did you mean 'bfloat16'?"),
        ({"train.remat": "some"}, "train.remat is 'some'; "),
        ({"optim.name": "muon"}, "optim.name is 'muon'; did you mean 'muonclip'?"),
        ({"optim.ns_dtype": "float16"}, "optim.ns_dtype is 'float16'; "),
        ({"optim.momentum_dtype": "f32"}, "optim.momentum_dtype is 'f32'; "),
        ({"optim.ns_method": "gramm"}, "optim.ns_method is 'gramm'; did you mean 'gram'?"),
        ({"optim.ns_polynomial": "polar_expres"}, "optim.ns_polynomial is 'polar_expres'; did you"),
        ({"optim.matrix_view": "heads"}, "optim.matrix_view is 'heads'; "),
        ({"optim.alpha": "1.5"}, "optim.alpha is 1.5; it must be in 0..1"),
        ({"optim.momentum": "1.5"}, "optim.momentum is 1.5; it must be in 0..1"),
        ({"optim.final_rate": "-4"}, "optim.final_rate is -4.0; it must be in 0..1"),
        ({"optim.weight_decay": "-3"}, "optim.weight_decay is -3.0; it must be at least 0"),
        ({"optim.clip_norm": "-1"}, "optim.clip_norm is -1.0; it must be at least 0"),
        ({"optim.tau": "0"}, "optim.tau is 0.0; it must be at least 1e-06"),
        ({"optim.adam_scale": "-4"}, "optim.adam_scale is -4.0; it must be more than 0"),
        ({"train.steps": "0"}, "train.steps is 0; it must be at least 1"),
        ({"train.keep": "0"}, "train.keep is 0; it must be at least 1"),
        ({"data.rows": "-1"}, "data.rows is -1; it must be at least 1"),
        ({"mesh.expert": "0"}, "mesh.expert is 0; it must be at least 1"),
        ({"data.context": "1000000"}, "data.context is 1000000; the model's longest context is"),
        ({"optim.learning_rate": "-1"}, "optim.learning_rate is -1.0; it must be more than 0"),
        ({"optim.decay": "2"}, "optim.decay is 2.0; it must be in 0..1"),
        ({"optim.warmup": "-1"}, "optim.warmup is -1; it must be at least 0"),
        ({"train.buffer": "0"}, "train.buffer is 0.0; it must be more than 0"),
        ({"data.rows": "9", "mesh.data": "2"}, "data.rows is 9; replica x data x expert (2)"),
        ({"data.rows": "6", "train.accumulate": "4"}, "data.rows is 6; "),
    ],
)
def test_an_impossible_run_is_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        validate(override(RunConfig(), settings), settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_rows_that_would_do_are_named_and_do():
    settings = {"data.rows": "9", "mesh.data": "2", "mesh.expert": "2", "train.accumulate": "2"}
    with pytest.raises(ConfigError, match="8 or 16 would do"):
        validate(override(RunConfig(), settings))
    for rows in ("8", "16"):
        validate(override(RunConfig(), settings | {"data.rows": rows}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim.name": "adamw", "optim.tau": "30"}, "optim.tau has no effect with optim.name"),
        ({"optim.name": "adamw", "optim.momentum": "0.9"}, "optim.momentum has no effect"),
        ({"optim.name": "adamw", "optim.alpha": "0.4"}, "optim.alpha has no effect"),
        ({"optim.name": "adamw", "optim.ns_method": "gram"}, "optim.ns_method has no effect"),
        ({"optim.name": "adamw", "optim.matrix_view": "whole"}, "optim.matrix_view has no eff"),
        ({"model.yarn.beta_fast": "32"}, "model.yarn.beta_fast has no effect with model.yarn.f"),
        ({"model.groups_per_token": "1"}, "model.groups_per_token has no effect"),
        ({"model.dense_layers": "0", "model.ffw": "64"}, "model.ffw has no effect"),
        ({"train.eval_every": "0", "train.eval_rows": "8"}, "train.eval_rows has no effect"),
        ({"train.grad_dtype": "bfloat16"}, "train.grad_dtype has no effect with mesh.devices 1"),
        ({"train.buffer": "1.5"}, "train.buffer has no effect with mesh.expert 1"),
        (
            {"mesh.expert": "2", "train.buffer": "1.5"},
            "train.buffer has no effect with train.dispatch allgather",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        validate(override(RunConfig(), settings), settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, "model.heads is 0; it must be at least 1"),
        ({"moe_layers": 0}, "model.moe_layers is 0; it must be at least 1"),
        ({"q_rank": -1}, "model.q_rank is -1; it must be at least 0"),
        ({"experts_per_token": 385}, "model.experts_per_token is 385; it must be in 1..384"),
        (
            {"groups": 8, "groups_per_token": 1, "experts_per_token": 49},
            "model.experts_per_token is 49; it must be in 1..48",
        ),
        ({"groups": 5}, "model.groups is 5; it must divide experts"),
        ({"groups": 384, "groups_per_token": 8}, "model.groups is 384; groups of 384 experts"),
        ({"rope": 63}, "model.rope is 63; rotations need an even width"),
        ({"rope_theta": 1.0}, "model.rope_theta is 1.0; it must be more than 1"),
    ],
)
def test_an_impossible_shape_is_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**fields)
    assert str(caught.value).startswith(message)


def test_a_context_extension_without_frequencies_is_refused():
    for name in ("factor", "beta_fast", "beta_slow", "context"):
        with pytest.raises(ConfigError, match=rf"model\.yarn\.{name} is 0; it must be at least"):
            Yarn(**{name: 0})


def test_sizes_have_the_names_of_their_axes():
    cfg = ModelConfig()
    assert (cfg.size("heads"), cfg.size("qk"), cfg.size("kv"), cfg.size("latent")) == (
        64, 192, 256, 576,
    )  # fmt: skip
    assert (cfg.layers, cfg.shared_ffw) == (61, 2048)
    assert cfg.yarn == Yarn()


def test_a_mesh_is_named_by_the_axes_that_split():
    assert str(MeshConfig(data=2, expert=4)) == "data=2 expert=4"
    assert str(MeshConfig()) == "one device"


def test_an_unknown_run_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="no config 'kimi_k3'; did you mean 'kimi_k2'"):
        configs.load("kimi_k3")


HEALTH = [
    ({"health.window": "10"}, "health.window is 10; it must be at least 20"),
    ({"health.spike": "-1"}, "health.spike is -1.0; it must be at least 0"),
    ({"health.patience": "0"}, "health.patience is 0; it must be at least 1"),
    ({"health.on_spike": "rewynd"}, "health.on_spike is 'rewynd'; did you mean 'rewind'?"),
    ({"health.spike": "0", "health.on_spike": "skip"},
     "health.on_spike has no effect with health.spike 0"),
    ({"train.log_to": "tensorboard,wandbb"}, "train.log_to names 'wandbb'; did you mean 'wandb'?"),
    ({"train.profile": "5"}, "train.profile is '5'; give steps as FROM:TO, as 20:24"),
    ({"train.profile": "5:4"}, "train.profile is '5:4'; give steps as FROM:TO, as 20:24"),
    ({"train.profile": "5:999"}, "train.profile is '5:999'; the run ends with step 150"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), HEALTH)
def test_a_setting_of_health_that_cannot_be_is_refused(settings, says):
    run = override(configs.load("tiny"), settings)
    with pytest.raises(ConfigError) as error:
        validate(run, settings)
    assert str(error.value) == says


def test_health_settings_are_read_and_a_config_without_them_has_the_defaults():
    run = override(
        configs.load("tiny"), {"train.profile": "20:24", "train.log_to": "wandb,tensorboard"}
    )
    validate(run)
    assert run.train.profiled == range(20, 25)
    assert run.train.trackers == ("wandb", "tensorboard")
    saved = to_json(run)
    del saved["health"], saved["train"]["profile"], saved["train"]["log_to"]
    old = from_json(saved)
    assert old.health == configs.load("tiny").health
    assert old.train.profiled == range(0)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("optim.learning_rate", "1e-50", "optim.learning_rate is 1e-50; it would be 0 in float32"),
        ("optim.learning_rate", "1e39", "it would be infinite in float32"),
        ("optim.tau", "1e-38", "optim.tau is 1e-38; it must be at least 1e-06"),
        ("optim.tau", "1e300", "optim.tau is 1e+300; it would be infinite"),
        ("optim.eps", "0", "optim.eps is 0.0; it must be at least 1e-18"),
        ("optim.clip_norm", "1e-45", "optim.clip_norm is 1e-45; it would be 0"),
        ("model.norm_eps", "-1e-6", "model.norm_eps is -1e-06; it must be more than 0"),
        ("model.norm_eps", "1e-50", "model.norm_eps is 1e-50; it would be 0"),
    ],
)
def test_a_number_at_the_edge_of_float32_is_refused(name, value, named):
    with pytest.raises(ConfigError) as error:
        validate(override(configs.load("tiny"), {name: value}), [name])
    assert named in str(error.value)
