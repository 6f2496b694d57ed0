"""`k2jax finetune` and `k2jax rl` on the command line."""

import pytest

from k2jax import cli, configs
from k2jax.commands import train
from k2jax.configs import load


def test_finetuning_is_training_on_data_that_is_named_into_a_folder_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "main", lambda args: seen.append(vars(args)) or 0)
    words = ["finetune", "toy", "--init", "runs/toy", "--data.path", "talks.jsonl"]
    assert cli.main(words) == 0
    assert seen[0]["out"] == "runs/toy-sft" and seen[0]["init"] == "runs/toy"
    assert seen[0]["settings"] == {"data.path": "talks.jsonl"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["finetune", "toy", "--data.path", "x"], "--init"),
        (["finetune", "toy", "--init", "x"], "--data.path"),
        (["rl", "toy_rl", "--init", "x"], "--env"),
        (["rl", "toy_rl", "--init", "x", "--env", "sum2", "--out", "s3://x/y"], "is no folder"),
        (["rl", "toy_rl", "--init", "x", "--env", "sum3"], "sum2"),
        (["rl", "toy_rl", "--init", "x", "--env", "sum2", "--rl.tua", "1"], "tau"),
        (["rl", "toy_rl", "--init", "x", "--env", "sum2", "--rl.group", "7"], "252 or 259"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_help_lists_the_settings_of_rl(capsys):
    with pytest.raises(SystemExit):
        cli.main(["rl", "-h"])
    printed = capsys.readouterr().out
    assert "--rl.truncation_penalty" in printed and "shuffled_rewards" in printed


def test_toy_runs_share_one_model():
    assert load("toy").model == load("toy_rl").model
    assert configs.configure("toy_rl").train.save_every % 4 == 0
