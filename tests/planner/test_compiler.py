"""Real compilers: what they say of a small step; and the line a user reads without them."""

import importlib.util
import math
import sys

import jax
import pytest

from k2jax import configs
from k2jax.config import ConfigError, MeshConfig, override
from k2jax.planner import hbm as memory
from k2jax.planner import targets
from k2jax.planner.compiler import compile_evaluation, compile_on, compile_step, gpu_config
from k2jax.planner.step_flops import Case

SMALL = {
    "model.moe_layers": "2",
    "train.dtype": "bfloat16",
    "train.remat": "full",
    "optim.name": "adamw",
    "mesh.data": "2",
    "mesh.expert": "2",
    "mesh.model": "2",
    "train.dispatch": "alltoall",
}
COMPILERS = {"c": "jax", "v": "libtpu", "h": "jax_plugins.xla_cuda13"}
RUN = override(configs.load("tiny"), SMALL)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("cpu:8", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x2", marks=pytest.mark.compiles),
        pytest.param("h200:1x8", marks=pytest.mark.compiles),
    ],
)
def test_a_step_compiles_with_the_arguments_of_the_formula(target):
    pytest.importorskip(COMPILERS[target[0]])
    found = compile_step(RUN, targets.parse(target))
    formula = sum(memory.arguments(Case(RUN, RUN.mesh, 1)).values())
    assert found.memory["arguments"] == pytest.approx(formula, rel=0.05)  # tiles are padded
    assert found.memory["aliased"] == pytest.approx(found.memory["outputs"], rel=0.01)
    assert found.memory["temporaries"] > 0
    assert all("unknown" not in row for row in found.account.wire.values())
    assert "expert" in found.account.wire["all-gather"]


@pytest.mark.compiles
def test_offloaded_inputs_of_layers_leave_a_gpu():
    pytest.importorskip(COMPILERS["h"])
    rows = {"data.rows": "64", "mesh.expert": "4", "mesh.model": "1"}
    full, away = (
        compile_step(override(RUN, rows | {"train.remat": remat}), targets.parse("h200:1x8"))
        for remat in ("full", "offload")
    )
    inputs = 2 * RUN.model.layers * RUN.model.embed * (64 / 8 * 256)  # bf16, a device's rows
    assert full.memory["peak"] - away.memory["peak"] == pytest.approx(inputs, rel=0.1)


@pytest.mark.compiles
def test_the_held_out_score_of_k2_fits_the_chips_that_train_it():
    pytest.importorskip(COMPILERS["v"])
    found = compile_evaluation(configs.load("kimi_k2"), targets.parse("v5p:8x8x16"))
    assert found.memory["peak"] <= 12e9  # beside the state of training; gathered tokens: 118 GB


def test_a_program_for_devices_that_are_not_here_is_not_cached():
    """None of them can be read again: the next plan would warn of each."""
    name, seen = "jax_persistent_cache_min_compile_time_secs", []

    def trace(mesh):
        seen.append(getattr(jax.config, name))
        return jax.jit(jax.numpy.sin).trace(jax.ShapeDtypeStruct((), "float32"))

    compile_on(targets.parse("cpu:1"), MeshConfig(), trace)
    assert seen == [math.inf] and getattr(jax.config, name) < math.inf  # as before


def test_without_the_plugin_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_plugins.xla_cuda13", None)
    with pytest.raises(ConfigError, match=r"GPUs needs jax-cuda13-pjrt .* 'k2jax\[plan\]'"):
        compile_step(RUN, targets.parse("h200:1x8"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_line_names_the_extra():
    with pytest.raises(ConfigError, match=r"TPUs needs libtpu: pip install 'k2jax\[plan\]'"):
        compile_step(RUN, targets.parse("v5p:2x2x2"))


def test_too_few_emulated_devices_say_what_to_set():
    with pytest.raises(ConfigError, match="takes 64 emulated devices, there are 8"):
        compile_step(RUN, targets.parse("cpu:64"))


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_a_gpu_described_for_the_compiler_is_the_one_in_the_table(name):
    text = gpu_config(name)
    chip = targets.parse(f"{name}:1x1").chip
    assert f"memory_bandwidth: {chip.bandwidth:.0f}" in text
    size = int(text.split("device_memory_size: ")[1].split()[0])
    assert chip.hbm == pytest.approx(0.95 * size, rel=0.01)
    assert text.count("{") == text.count("}")
