"""What is set before jax starts: enough of a GPU's memory, unless somebody has said how much."""

import os

import pytest

from k2jax.runtime import backend


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # not the user's
    for name in backend.MEMORY_SHARE:
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_gives_as_much_memory_as_plans_count_on(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # so that the test's value is undone
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    backend.prepare()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.95"


@pytest.mark.parametrize("name", backend.MEMORY_SHARE)
def test_a_share_that_was_set_by_either_name_stays_alone(name, monkeypatch):
    monkeypatch.setenv(name, "0.5")
    backend.prepare()
    assert {n: os.environ[n] for n in backend.MEMORY_SHARE if n in os.environ} == {name: "0.5"}
