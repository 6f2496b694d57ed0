"""A run that version 3c01372 made, before the code moved to where it is now.

`run-3c01372.tar.xz` is the folder after four steps of a very small model, without its plot. LOSSES
are those of that version's own steps 5 and 6.
"""

import json
import tarfile
from pathlib import Path

import pytest

import k2jax
from k2jax.cli import main

ARCHIVE = Path(__file__).parents[1] / "golden" / "run-3c01372.tar.xz"
LOSSES = {1: 6.460093, 4: 6.384259, 5: 6.385103, 6: 6.340842}
GRAD_NORMS = {5: 0.6190062, 6: 0.6960035}


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_an_old_run_resumes_with_the_losses_it_would_have_had_and_the_command_samples(
    old_run, capsys
):
    config = json.loads((old_run / "config.json").read_text())
    words = ["train", "tiny", "--out", "run", "--train.steps", "6"]
    for section in ("model", "data", "mesh"):
        fields = config[section].items()
        words += [
            word
            for name, value in fields
            if isinstance(value, int) or (name == "path" and value)
            for word in (f"--{section}.{name}", str(value))
        ]
    words += ["--train.save_every", "2", "--train.keep", "1", "--train.eval_every", "0"]
    del words[words.index("--model.groups_per_token") : words.index("--model.groups_per_token") + 2]
    assert main(words) == 0
    assert "\nsample:\ndef " in capsys.readouterr().out
    lines = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        if line["step"] in LOSSES:
            assert line["loss"] == pytest.approx(LOSSES[line["step"]], rel=1e-6)
        if line["step"] in GRAD_NORMS:
            assert line["grad_norm"] == pytest.approx(GRAD_NORMS[line["step"]], rel=1e-5)


def test_an_old_run_loads(old_run):
    model = k2jax.load(old_run)
    assert (model.config.embed, model.config.experts) == (16, 4)
    assert model.tokenizer.decode(model.tokenizer.encode("Flat is better")) == "Flat is better"
