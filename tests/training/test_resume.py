"""Where a run begins: at its newest intact checkpoint, with given weights, or anew."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_runs import changed, content, damage, losses, state, terminating

from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, MeshConfig
from k2jax.data.tokenise import tokenise
from k2jax.training.loop import train
from k2jax.training.metrics import read_metrics


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, whole, again):
    # A killed process leaves lines of steps that were not saved, and half a line.
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    lines = []
    train(run, again, say=lines.append)
    assert any(line.startswith("resuming from step 3") for line in lines)
    assert [line["step"] for line in read_metrics(again)] == [1, 2, 3, 4, 5, 6]
    assert losses(again) == losses(whole[0])
    assert [start["step"] for start in json.loads((again / "run.json").read_text())] == [0, 3]
    found, right = state(run, again, 6), state(run, whole[0], 6)
    assert found.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_line_that_is_no_text_does_not_keep_a_run_from_going_on(run, again):
    with (again / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n{"step": "x"}\n[]\n')
    train(run, again, say=lambda line: None)
    assert [line["step"] for line in read_metrics(again)] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_alike_on_another_mesh(run, whole, again):
    mesh = MeshConfig(data=2, expert=2, model=2)
    model = train(dataclasses.replace(run, mesh=mesh), again, say=lambda line: None)
    assert len(model.params["head"].sharding.device_set) == mesh.devices
    np.testing.assert_allclose(losses(again)[3], losses(whole[0])[3], rtol=1e-5)
    np.testing.assert_allclose(losses(again), losses(whole[0]), rtol=1e-4)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(run, whole, tmp_path):
    out, lines = Path(shutil.copytree(whole[0], tmp_path / "damaged")), []
    damage(out / "checkpoints/6/params")
    train(run, out, say=lines.append)
    assert lines[0].startswith(f"checkpoint of step 6 in {out}/checkpoints is damaged (params/")
    assert lines[0].endswith("; it is kept as 6.damaged, and the run resumes from step 3")
    assert Checkpoints(out).steps() == [3, 6] and (out / "checkpoints/6.damaged").is_dir()
    assert losses(out) == losses(whole[0])
    found, right = state(run, out, 6), state(run, whole[0], 6)
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


OTHERS = [
    ("model", {"ffw": 32}, "model.ffw 16, not 32"),
    ("data", {"rows": 16}, "data.rows 8, not 16"),
    ("optim", {"name": "muonclip"}, "optim.name adamw, not muonclip"),
]


@pytest.mark.parametrize(("section", "fields", "says"), OTHERS)
def test_another_run_in_the_same_folder_is_refused(section, fields, says, run, whole):
    before = content(whole[0])
    with pytest.raises(ConfigError) as error:
        train(changed(run, section, **fields), whole[0], say=lambda line: None)
    assert str(error.value) == f"{whole[0]} holds a run with {says}; give another --out"
    assert content(whole[0]) == before


def test_init_takes_weights_alone(run, whole, tmp_path):
    out = tmp_path / "new"
    train(run, out, init=str(whole[0]), say=terminating(1, []))
    (first,) = read_metrics(out)
    assert first["step"] == 1
    assert first["learning_rate"] == run.optim.learning_rate / run.optim.warmup
    assert first["loss"] < losses(whole[0])[3]
    found, given = state(run, out, 1), state(run, whole[0], 6)
    for name, value in given.items():
        if "params" in name:  # Adam's first update is at most 1, and the weights decay a little
            moved = 1.2 * first["learning_rate"]
            np.testing.assert_allclose(found[name], value, rtol=0, atol=moved, err_msg=name)
    counts = {name: value for name, value in found.items() if name.endswith("count")}
    assert counts
    assert all(count == 1 for count in counts.values())


def test_init_of_another_architecture_is_refused_in_one_line(run, whole, tmp_path):
    with pytest.raises(ConfigError) as error:
        other = changed(run, "model", ffw=32)
        train(other, tmp_path / "new", init=str(whole[0]), say=lambda line: None)
    assert "dense.mlp" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mixture_of_folders_of_tokens_trains_and_goes_on_as_if_never_stopped(run, tmp_path):
    pytest.importorskip("array_record")
    for name, options in (("a", {"vocab": 576}), ("b", {"tokenizer": str(tmp_path / "a")})):
        tokenise(run.data.path, tmp_path / name, workers=1, **options)
    mixed = changed(run, "data", path=f"{tmp_path}/a:0.75,{tmp_path}/b:0.25")
    lines: list[str] = []
    train(mixed, tmp_path / "whole", say=lines.append)
    said = next(line for line in lines if line.startswith("epochs in all: "))
    assert re.fullmatch(r"epochs in all: \S+/a \d\.\d\d, \S+/b \d\.\d\d", said)
    train(mixed, tmp_path / "stopped", say=terminating(3, []))
    train(mixed, tmp_path / "stopped", say=lines.append)
    whole, stopped = (list(read_metrics(tmp_path / name)) for name in ("whole", "stopped"))
    assert [m["loss"] for m in stopped] == [m["loss"] for m in whole] and len(whole) == 6
