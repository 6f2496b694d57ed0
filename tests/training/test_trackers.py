"""TensorBoard and Weights & Biases: asked for by name, missing ones named before training."""

import dataclasses
import importlib.machinery
import sys
import types

import pytest

from k2jax import configs
from k2jax.config import ConfigError, to_json
from k2jax.training import trackers

LINE = {
    "step": 7,
    "loss": 2.5,
    "grad_norm": None,
    "logit_max_layers": [1.0, 2.0],
    "skipped": 0.0,
    "clipped_layers": [0.0, None],
    "expert_load": [[1, 2], [3, 4]],
}
SCALARS = {
    "loss": 2.5,
    "skipped": 0.0,
    "logit_max/layer_0": 1.0,
    "logit_max/layer_1": 2.0,
    "clipped/layer_0": 0.0,
}


def asking(*names: str):
    run = configs.load("tiny")
    return dataclasses.replace(run, train=dataclasses.replace(run.train, log_to=",".join(names)))


def fake(monkeypatch, name: str, **content) -> None:
    """A module of that name, as if it were installed."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", list(trackers.PACKAGES))
def test_a_package_that_is_not_there_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        trackers.require_packages(asking(name))
    package = trackers.PACKAGES[name]
    says = f"train.log_to {name} needs the package {package}: pip install 'k2jax[{name}]'"
    assert str(error.value) == says


def test_nothing_is_asked_for_by_default_and_nothing_is_loaded(tmp_path):
    trackers.require_packages(configs.load("tiny"))
    with trackers.open_trackers(configs.load("tiny"), tmp_path, 0) as track:
        track(LINE)
    assert not {"tensorboardX", "wandb"} & set(sys.modules)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_each_number_and_layer_and_forgets_what_a_rewind_takes_back(
    tmp_path, monkeypatch
):
    found = []

    class Writer:
        def __init__(self, folder, purge_step):
            found.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            found.append((name, value, step))

        def close(self):
            found.append("closed")

    fake(monkeypatch, "tensorboardX", SummaryWriter=Writer)
    trackers.require_packages(asking("tensorboard"))
    with trackers.open_trackers(asking("tensorboard"), tmp_path, 6) as track:
        track(LINE)
    opened, *scalars, closed = found
    assert opened == (str(tmp_path / "tensorboard"), 7)
    assert {(name, value, 7) for name, value in SCALARS.items()} == set(scalars)
    assert closed == "closed"


def test_the_real_tensorboard_writer_takes_them(tmp_path):
    pytest.importorskip("tensorboardX")
    with trackers.open_trackers(asking("tensorboard"), tmp_path, 0) as track:
        track(LINE)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"logit_max/layer_1" in file.read_bytes()


def test_wandb_continues_one_run_over_stops_and_counts_steps_itself(tmp_path, monkeypatch):
    opened, logged = [], []

    class Job:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            logged.append(values)

        def finish(self):
            logged.append("finished")

    def init(**settings):
        opened.append(settings)
        return Job()

    fake(monkeypatch, "wandb", init=init)
    run = asking("wandb")
    for _ in range(2):
        with trackers.open_trackers(run, tmp_path, 0) as track:
            track(LINE)
    assert opened[0] == opened[1]
    assert opened[0]["config"] == to_json(run)
    assert (opened[0]["name"], opened[0]["resume"]) == ("tiny", "allow")
    assert opened[0]["dir"] == str(tmp_path)
    assert len(opened[0]["id"]) == 32
    assert logged == [{"step": 7, **SCALARS}, "finished"] * 2
