"""A rehearsal knows every program of a run, and counts what a host does."""

import dataclasses
import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
from small_model import SIZES

from k2jax import cli, configs, sharding
from k2jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from k2jax.params import arrays
from k2jax.params.declare import specs
from k2jax.params.kimi import Kimi
from k2jax.planner import host_phases, targets
from k2jax.planner.miniature import rehearse_small, require_listed, shrink
from k2jax.planner.plan_text import describe_rehearsal
from k2jax.planner.rehearsal import list_programs, sample_mesh, stage_before
from k2jax.training import callbacks
from k2jax.training.compile import PROGRAMS
from k2jax.training.step import build

RUN = RunConfig(
    name="test",
    model=ModelConfig(**SIZES),
    data=DataConfig(rows=8, context=32),
    optim=OptimConfig(name="adamw"),
    train=TrainConfig(steps=150, dtype="bfloat16", remat="none"),
)
K2 = configs.load("kimi_k2")


def test_a_program_that_the_lists_leave_out_is_noticed(monkeypatch):
    """Whoever adds a program to the loop must list it: here a callback that sums up weights."""

    @jax.jit
    def sum_up_weights(params):
        return sum(w.sum() for w in params.values())

    def on_step(self, step, state, metrics):
        before(self, step, state, metrics)
        metrics["total"] = float(sum_up_weights(state.params))
        return callbacks.Continue()

    listed = frozenset().union(*(p.functions for p in list_programs(RUN, targets.parse("cpu:1"))))
    before = callbacks.Track.on_step
    monkeypatch.setattr(callbacks.Track, "on_step", on_step)
    names = rehearse_small(RUN, dataclasses.replace(RUN, name="before"), lambda model: None)
    assert names >= {"init", "step", "evaluate", "cast", "sum_up_weights"}
    with pytest.raises(ConfigError, match="its rehearsal leaves out: sum_up_weights; list it in"):
        require_listed(names, listed)
    require_listed(names - {"sum_up_weights"}, listed)


def test_every_program_of_the_list_is_of_a_function_with_a_name():
    programs = list(list_programs(K2, targets.parse("cpu:1024")))
    assert {"step", "evaluate", "init", "rate", "are_finite", "split_weights", "run"} <= {
        name for listed in programs for name in listed.functions
    }
    assert len(programs) == len(PROGRAMS) + 3


def test_a_small_run_keeps_what_a_run_does():
    small = shrink(K2)
    assert str(small.mesh) == "data=2 expert=2"
    assert small.train.accumulate == 2 and small.train.dispatch == K2.train.dispatch
    assert small.model.yarn == K2.model.yarn and small.optim == K2.optim
    assert str(shrink(configs.load("kimi_k2_128k")).mesh) == "expert=2 context=2"


def test_a_stage_begins_with_the_weights_of_the_one_before():
    before = [stage_before(configs.load(name)) for name in configs.RECIPE]
    assert before[0] is None and [run.name for run in before[1:]] == list(configs.RECIPE[:3])
    assert stage_before(K2) is None


def test_a_model_is_sampled_on_all_devices_of_its_run():
    assert str(sample_mesh(K2)) == "expert=128 model=8"
    assert sample_mesh(configs.load("kimi_k2_128k")).devices == 1024


@pytest.fixture
def mesh():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))) as _:
        yield jax.sharding.get_mesh()


def test_a_host_draws_the_numbers_that_are_counted(mesh, monkeypatch):
    drawn: Counter[str] = Counter()
    draw_matrix = arrays.draw_matrix

    def counted(seed, name, at, shape, std):
        drawn[name] += math.prod(shape)
        return draw_matrix(seed, name, at, shape, std)

    leaves = specs(Kimi(RUN.model))
    monkeypatch.setattr(arrays, "draw_matrix", counted)
    params = arrays.initial(leaves, 0, 0.02)
    monkeypatch.undo()
    devices = list(mesh.devices.flat)
    phase = host_phases.count_drawing(leaves, mesh, devices)
    assert phase.size == 4 * sum(math.prod(leaf.shape) for leaf in leaves.values())
    assert host_phases.count_drawn(leaves, mesh, devices) == sum(drawn.values())
    # Two of eight devices have less than all, and never more than their devices' parts.
    own = host_phases.host_bytes(params, devices[:2])
    parts = [
        s.data.nbytes
        for w in params.values()
        for s in w.addressable_shards
        if s.device in devices[:2]
    ]
    assert 0 < own <= sum(parts)
    assert host_phases.count_drawn(leaves, mesh, devices[:2]) < sum(drawn.values())


def test_phases_of_a_host_have_bytes_seconds_and_memory(mesh):
    run = dataclasses.replace(RUN, mesh=MeshConfig(data=2, expert=2, model=2))
    target = targets.parse("h100:2x4")
    phases = host_phases.count_phases(build(run), target, mesh, "", 36.0)
    names = [phase.name for phase in phases]
    assert names[0] == "draw the weights" and "save a checkpoint" in names
    assert all(p.size > 0 and p.seconds > 0 and p.memory > 0 for p in phases)
    saved = phases[names.index("save a checkpoint")]
    count = sum(math.prod(leaf.shape) for leaf in specs(Kimi(RUN.model)).values())
    assert saved.size == pytest.approx(12 * count / 2, rel=0.01)  # weights, and Adam's two
    # 150 steps, a save and a score in every 100, and after the last one.
    scored = phases[names.index("make held-out rows")]
    assert (saved.times, scored.times) == (2, 2)
    assert "a lost host costs up to 1 hours of steps; storage for 3 of" in saved.how
    later = host_phases.count_phases(build(run), target, mesh, "kimi_k2_anneal", 36.0)[0]
    assert later.name == "read the weights of kimi_k2_anneal" and later.size < saved.size * 2


def test_a_stage_of_the_recipe_is_saved_more_often_than_once():
    for run in map(configs.load, configs.RECIPE):
        assert run.train.save_every <= run.train.steps / 8


def test_k2_writes_a_gigabyte_of_metrics_not_49():
    run = dataclasses.replace(K2, optim=RUN.optim)  # which traces faster
    with sharding.use_abstract_mesh(MeshConfig()):
        phase = host_phases.count_metrics(build(run))
    assert phase.times * phase.size < 1.5e9
    assert phase.times * phase.memory > 40e9


def test_the_table_names_what_does_not_fit():
    memory = {"arguments": 1e9, "peak": 2e9}
    row = {
        "name": "step",
        "fits": False,
        "bytes_per_device": memory,
        "beside_bytes": 3e9,
        "total_bytes": 5e9,
        "compile_seconds": 7.0,
        "host_peak_bytes": 1e9,
    }
    refused = {"name": "evaluation", "fits": False, "why": "it does not fit v5p:2x2x1: no room"}
    host = {
        "name": "draw",
        "fits": False,
        "times": 1,
        "bytes": 1e9,
        "seconds": 1.0,
        "memory_bytes": 9e9,
        "memory_limit_bytes": 8e9,
        "how": "10M a second",
    }
    lines = describe_rehearsal({"programs": [row, refused], "host": [host], "fits": False})
    assert lines[1].split() == ["step", *"1.00 2.00 3.00 5.00 7 does not fit".split()]
    assert lines[2].endswith("no room") and "does not fit 8 GB" in lines[4]
    assert lines[-1] == "NOT ALL OF IT FITS"


@pytest.mark.slow
def test_a_run_is_rehearsed_as_a_whole(capsys):
    words = ("toy", "--target", "cpu:1", "--train.accumulate", "1", "--rehearse", "--json")
    assert cli.main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)["rehearsal"]
    assert {row["name"] for row in found["programs"]} > set(PROGRAMS)
    assert found["fits"] and np.isfinite([row["seconds"] for row in found["host"]]).all()
    assert {"step", "evaluate", "split_weights"} <= set(found["compiled_by_a_small_run"])
