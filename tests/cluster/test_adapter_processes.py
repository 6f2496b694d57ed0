"""A run of adapters in real processes: killed at any moment, it ends with the same ones."""

import signal
from pathlib import Path

import numpy as np
import pytest
from jobs import Job, write_text

from k2jax.cluster import EXIT_RETRY
from k2jax.weights.adapter_files import CONFIG, EXPERTS, MODEL
from k2jax.weights.safetensors import Reader

pytestmark = pytest.mark.slow
LORA = {"lora__rank": 2, "lora__targets": "attention,experts", "train__remat": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text, a run to adapt, and an uninterrupted run of adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    write_text(folder)
    for out, settings in (("base", {}), ("whole", LORA | {"init": folder / "base"})):
        ((code, _, lines),) = Job(folder, folder / out, 1, steps=60, **settings).end()
        assert code == 0, lines
    return folder


def start(place: Path, out: Path, count: int) -> Job:
    return Job(place, out, count, steps=60, init=place / "base", **LORA)


def read(out: Path) -> dict[str, np.ndarray]:
    """The adapters that a run left, whose folder has nothing else."""
    assert sorted(p.name for p in (out / "adapter").iterdir()) == sorted((CONFIG, EXPERTS, MODEL))
    files = [Reader(out / "adapter" / name) for name in (MODEL, EXPERTS)]
    return {name: file.read(name) for file in files for name in file}


def kill_and_resume(place: Path, out: Path, count: int) -> None:
    """Kill the last process when the save of step 6 has begun, and end the run by its command."""
    job = start(place, out, count)
    job.until(7)
    job.processes[-1].kill()
    codes = [code for code, _, _ in job.end(100)]
    assert codes == [EXIT_RETRY] * (count - 1) + [-signal.SIGKILL]
    ended = start(place, out, count).end()
    assert [code for code, _, _ in ended] == [0] * count
    assert "resuming from step" in ended[0][1]
    assert not any(printed for _, printed, _ in ended[1:])


def test_a_killed_run_of_adapters_resumes_to_the_same_bits(place, tmp_path):
    kill_and_resume(place, tmp_path / "out", 1)
    again = read(tmp_path / "out")
    for name, array in read(place / "whole").items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_two_processes_learn_the_adapters_of_one_and_the_same_when_one_is_lost(place, tmp_path):
    assert [code for code, *_ in start(place, tmp_path / "two", 2).end()] == [0, 0]
    kill_and_resume(place, tmp_path / "lost", 2)
    one, two, lost = map(read, (place / "whole", tmp_path / "two", tmp_path / "lost"))
    assert one.keys() == two.keys() == lost.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(lost[name], two[name], err_msg=name)
        # Gradients of processes are added up in another order; of values up to 1, the 60 steps at a
        # rate of 1e-2 make 5e-6 of that.
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-4, err_msg=name)
