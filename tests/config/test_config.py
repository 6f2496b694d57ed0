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
