import dataclasses

import jax
import numpy as np
import pytest

from k2jax import configs
from k2jax.training.program_cache import KEPT, load_or_compile

RUN, DEVICES = configs.load("tiny"), jax.devices()[:1]


class Compile:
    """Compiles x + 1, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return jax.jit(lambda x: x + 1).lower(np.float32(0)).compile()


@pytest.fixture
def compile_it():
    return Compile()


def test_a_kept_program_is_loaded_and_computes_the_same(tmp_path, compile_it):
    for _ in range(2):
        program = load_or_compile(tmp_path, "step", RUN, DEVICES, compile_it)
        assert float(program(np.float32(2))) == 3
    assert compile_it.calls == 1


def test_another_run_another_source_or_a_damaged_file_is_compiled(
    tmp_path, compile_it, monkeypatch
):
    load_or_compile(tmp_path, "step", RUN, DEVICES, compile_it)
    load_or_compile(tmp_path, "step", dataclasses.replace(RUN, name="other"), DEVICES, compile_it)
    assert compile_it.calls == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    program = load_or_compile(tmp_path, "step", RUN, DEVICES, compile_it)
    assert (compile_it.calls, float(program(np.float32(2)))) == (3, 3)
    monkeypatch.setattr("k2jax.training.program_cache.source_hash", lambda: "edited")
    load_or_compile(tmp_path, "step", RUN, DEVICES, compile_it)
    assert compile_it.calls == 4


def test_without_a_folder_or_where_none_can_be_written_it_is_only_compiled(tmp_path, compile_it):
    load_or_compile(None, "step", RUN, DEVICES, compile_it)
    file = tmp_path / "file"
    file.write_text("")
    load_or_compile(file / "below", "step", RUN, DEVICES, compile_it)
    assert compile_it.calls == 2


def test_only_the_newest_programs_are_kept(tmp_path, compile_it):
    for seed in range(KEPT + 3):
        run = dataclasses.replace(RUN, name=str(seed))
        load_or_compile(tmp_path, "step", run, DEVICES, compile_it)
    assert len(list(tmp_path.iterdir())) == KEPT
