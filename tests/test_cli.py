"""Mistakes on the command line answer in one line with exit code 2, before jax loads."""

import re
import subprocess
import sys

import pytest

from k2jax import cli, configs
from k2jax.config import RunConfig, each_knob

MISTAKES = [
    (["trian", "tiny"], "no verb 'trian'; did you mean 'train'?"),
    ([], "the following arguments are required: verb"),
    (["train"], "the following arguments are required: config"),
    (["train", "tinny"], "no config 'tinny'; did you mean 'tiny'?"),
    (["train", "tiny", "--train.step", "3"], "train has no 'step'; did you mean --train.steps?"),
    (["train", "tiny", "--trian.steps", "3"], "the run has no 'trian'; did you mean --train.steps"),
    (["train", "tiny", "--optim.lr", "3"], "did you mean --optim.learning_rate?"),
    (["train", "tiny", "--lr", "3"], "did you mean --optim.learning_rate?"),
    (["train", "tiny", "--learning_rate=3"], "did you mean --optim.learning_rate?"),
    (["train", "tiny", "--learning-rate", "3"], "did you mean --optim.learning_rate?"),
    (["train", "tiny", "--batch_size", "3"], "did you mean --data.rows?"),
    (["train", "tiny", "--steps", "3"], "did you mean --train.steps?"),
    (["train", "tiny", "--seq_len", "3"], "did you mean --data.context?"),
    (["train", "tiny", "--dtype", "bfloat16"], "did you mean --train.dtype?"),
    (["train", "tiny", "--epochs", "3"], "set --train.steps"),
    (["train", "tiny", "--resume"], "the same command resumes a run"),
    (["train", "tinny", "--help"], "no config 'tinny'; did you mean 'tiny'?"),
    (["evaluate", "runs/x", "--steps", "3"], "does not take '--steps'; there are: --"),
    (["train", "tiny", "--train.steps", "many"], "train.steps is int, 'many' is not"),
    (["train", "tiny", "--train.steps"], "--train.steps needs a value"),
    (["train", "tiny", "--optim.learning_rate", "nan"], "it must be finite"),
    (["train", "tiny", "--model", "3"], "model is a section; set one of its fields: vocab, "),
    (["train", "tiny", "--model.yarn", "3"], "model.yarn is a section; set one of its fields"),
    (["train", "tiny", "--outt", "x"], "train does not take '--outt'; did you mean '--out'?"),
    (["train", "tiny", "extra"], "train does not take 'extra'"),
    (["train", "tiny", "--mesh.data", "3"], "must divide it: 6 or 12 would do"),
    (["train", "tiny", "--model.experts_per_token", "99"], "it must be in 1..32"),
    (["train", "tiny", "--data.context", "512"], "the model's longest context is 256"),
    (["train", "tiny", "--optim.name", "adamv"], "did you mean 'adamw'?"),
    (["train", "tiny", "--optim.name", "adamw", "--optim.tau", "9"], "has no effect with"),
    (["train", "tiny", "--model.yarn.beta_fast", "32"], "has no effect with model.yarn.factor 1"),
    (["describe", "kimi_k3"], "did you mean 'kimi_k2'?"),
    (["evaluate"], "evaluate needs a checkpoint"),
    (["generate", "runs/x"], "generate needs --prompt TEXT or --messages FILE, one of them"),
    (["generate", "runs/x", "--prompt", "a", "--topp", "1"], "did you mean '--top-p'?"),
    (["describe", "tiny", "--json=1"], "ignored explicit argument"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_a_mistake_is_one_line(words, says, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.startswith("k2jax: ")


def test_a_mistake_answers_before_jax_loads():
    code = (
        "import sys; from k2jax.cli import main;"
        "print(main(['train', 'tiny', '--lr', '3']), {'jax', 'numpy'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "set()"]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_answers_before_jax_loads(verb):
    code = (
        "import sys, atexit; atexit.register(lambda: print('jax' in sys.modules));"
        f"from k2jax.cli import main; main(['{verb}', '--help'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: k2jax {verb}")
    assert run.stdout.split()[-1] == "False"


@pytest.mark.parametrize("config", [None, "tiny", "kimi_k2_128k"])
def test_help_of_train_lists_every_setting_with_its_value_in_the_config(config, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", *([config] if config else []), "--help"])
    shown = capsys.readouterr().out
    run = configs.load(config) if config else RunConfig()
    for name, knob, value in each_knob(run):
        assert re.search(rf"--{name} +{re.escape(knob.describe())} \[{value}\]\n", shown + "\n")


@pytest.mark.parametrize("name", configs.NAMES)
def test_every_named_run_loads_and_is_valid(name):
    from k2jax.config import validate

    run = configs.load(name)
    validate(run)
    assert run.name == name


def test_a_command_of_two_config_kinds_describes_alike(tmp_path, capsys):
    """A published config.json is taken where a name is."""
    import json

    config = {
        "vocab_size": 163840,
        "hidden_size": 2048,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 11264,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 27,
        "n_shared_experts": 2,
        "rope_theta": 50000,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert cli.main(["describe", str(path), "--json"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert cli.main(["describe", "moonlight_16b_a3b", "--json"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert published["counts"] == named["counts"]
    assert published["parameters"] == named["parameters"]
