"""The fault script of bench/, in short: `python bench/faults.py` kills thirty times."""

import importlib
import os
import random
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "bench"


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("K2JAX_CACHE", os.environ.get("K2JAX_CACHE", ""))  # is changed
    return importlib.import_module("faults")


def test_moments_come_in_turn_and_are_those_of_the_seed(faults):
    def draw(seed):
        return [faults.moment_of(random.Random(seed), number) for number in range(12)]

    assert draw(1) == draw(1) != draw(2)
    assert sorted(moment for moment, _, _ in draw(1)) == sorted(faults.MOMENTS * 2)


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_as_another_process_that_nobody_killed(faults, tmp_path):
    """MuonClip on 8 devices, from scratch in processes of their own: losses and every number."""
    found = faults.compare(kills=2, seed=0, folder=tmp_path, steps=24)
    assert found["kills"] == 2 and found["checkpoints_lost"] == 0
    assert found["losses_bit_identical"] == "24 of 24"
    assert found["last_checkpoint_identical"] and found["leftovers"] == []
