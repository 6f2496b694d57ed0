"""A run of adapters in real processes: killed at any moment, it ends with the same ones."""

import signal
from pathlib import Path

import pytest
from jobs import Job, write_text

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


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_of_adapters_resumes_to_the_same_bits(count, place, tmp_path):
    settings = LORA | {"init": place / "base"}
    job = Job(place, tmp_path / "out", count, steps=60, **settings)
    job.until(7)  # the save of step 6 waited for that of step 3
    job.processes[-1].kill()
    assert job.end(100)[-1][0] == -signal.SIGKILL
    ended = Job(place, tmp_path / "out", count, steps=60, **settings).end()
    assert [code for code, _, _ in ended] == [0] * count
    assert "resuming from step" in ended[0][1]
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (place / "whole" / file).read_bytes()
