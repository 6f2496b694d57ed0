"""A run from the first line to the last: what it leaves, and what it refuses."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import changed, content, losses

from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, MeshConfig, to_json
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics

FILES = (
    "checkpoints",
    "config.json",
    "data.json",
    "loss.png",
    "metrics.jsonl",
    "run.json",
    "tiktoken.model",
)


def test_a_run_leaves_checkpoints_metrics_a_plot_its_config_and_tokenizer(run, whole):
    out, _ = whole
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert Checkpoints(out).steps() == [3, 6]
    assert json.loads((out / "config.json").read_text()) == to_json(run)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_line_a_step(run, whole):
    lines = list(read_metrics(whole[0]))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [3, 6]
    assert all(np.isfinite(line["loss"]) and line["seconds"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert len(line["logit_max_layers"]) == run.model.layers
        assert max(line["logit_max_layers"]) == line["logit_max"]
    # top-2 choices of every token of 8 rows of 32, less padding
    assert 0 < sum(lines[0]["expert_load"][0]) <= 2 * 8 * 32


def test_a_run_prints_its_size_speed_and_score_but_makes_no_sample(whole):
    printed = "\n".join(whole[1])
    for part in (
        "parameters on one device",
        "first step after",
        "step 6/6: loss",
        "tokens/s",
        "held out:",
        "gzip -9",
        "xz -9",
        "loss.png",
    ):
        assert part in printed, part
    assert "sample" not in printed


def test_a_run_killed_after_its_last_save_still_gets_its_plot(run, whole, tmp_path):
    out, lines = Path(shutil.copytree(whole[0], tmp_path / "out")), []
    (out / "loss.png").unlink()
    train(run, out, say=lines.append)
    assert (out / "loss.png").exists() and any(line.startswith("held out: ") for line in lines)
    assert losses(out) == losses(whole[0])


def test_a_run_on_another_mesh_is_the_same_run(run, whole, tmp_path):
    """Sums in another order are all that differs: 1e-6 of the first loss.

    Adam divides each gradient by its size, so rounding moves whole updates of weights whose
    gradient is near zero; after five of them the loss may differ by 1e-4 of itself.
    """
    mesh = MeshConfig(data=2, expert=2, model=2)
    train(dataclasses.replace(run, mesh=mesh), tmp_path / "out", say=lambda line: None)
    found, right = losses(tmp_path / "out"), losses(whole[0])
    np.testing.assert_allclose(found[0], right[0], rtol=1e-6)
    np.testing.assert_allclose(found, right, rtol=1e-4)


def full_disk(monkeypatch, *numbers: int) -> None:
    """Saving these steps fails, as if while they were being written."""
    import orbax.checkpoint as ocp

    save = ocp.AsyncCheckpointer.save

    def fail(self, directory, *args, **kwargs):
        if int(directory.name) in numbers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", fail)


def test_a_run_outlives_a_save_that_fails(run, whole, tmp_path, monkeypatch):
    lines: list[str] = []
    full_disk(monkeypatch, 3)
    train(run, tmp_path / "out", say=lines.append)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "checkpoint of step 3 could not be written" in warning
    assert "the disk is full" in warning and "none is there yet" in warning
    assert Checkpoints(tmp_path / "out").steps() == [6]
    assert losses(tmp_path / "out") == losses(whole[0])


def test_a_last_save_that_fails_is_no_success(run, again, monkeypatch):
    full_disk(monkeypatch, 6)
    with pytest.raises(ConfigError, match=r"step 6 could not be .*full.*; step 3 is complete"):
        train(run, again, say=lambda line: None)
    assert Checkpoints(again).steps() == [3]


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("k2jax.training.provenance.write_atomic", fail)
    with pytest.raises(ConfigError, match=r"config.json: Read-only file system$"):
        train(run, tmp_path / "out", say=lambda line: None)


def test_a_finished_run_says_so_and_changes_nothing(run, whole):
    before, lines = content(whole[0]), []
    train(run, whole[0], say=lines.append)
    assert lines[-1] == f"{whole[0]} is finished: step 6; raise --train.steps to train on"
    assert content(whole[0]) == before


def test_data_that_is_not_there_is_named(run, tmp_path):
    (tmp_path / "text.txt").write_text("")
    for name, says in (("texts.txt", "did you mean 'text.txt'?"), ("text.txt", "is empty")):
        with pytest.raises(ConfigError) as error:
            train(changed(run, "data", path=str(tmp_path / name)), tmp_path / "out", say=print)
        assert str(tmp_path / name) in str(error.value)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


REFUSED = [
    (MeshConfig(data=4, expert=4), "takes 16 devices, there are 8"),
    (MeshConfig(model=4), "'heads' (size 2) 4 ways over model; 2 would divide it"),
    (MeshConfig(expert=8), "'experts' (size 4) 8 ways over expert; 4 would divide it"),
]


@pytest.mark.parametrize(("mesh", "says"), REFUSED, ids=str)
def test_a_mesh_that_does_not_fit_is_refused(mesh, says, run, tmp_path):
    with pytest.raises(ConfigError) as error:
        train(dataclasses.replace(run, mesh=mesh), tmp_path / "out", say=print)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
