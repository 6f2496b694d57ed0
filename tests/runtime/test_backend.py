"""What is set before jax starts: where it looks, and how much of a GPU's memory it takes."""

import os

import jax
import pytest

from k2jax.runtime import backend, hardware


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


@pytest.mark.parametrize("node", ["nvidia0", "accel3", "vfio", "dxg"])
def test_a_device_of_the_system_may_be_an_accelerator(node, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    (tmp_path / "nvme0").touch()
    assert not hardware.may_have_accelerator(tmp_path)
    (tmp_path / node).touch()
    assert hardware.may_have_accelerator(tmp_path)


@pytest.mark.parametrize(
    ("may_have", "named", "platforms"), [(False, "", "cpu"), (True, "", None), (False, "tpu", None)]
)
def test_plugins_of_accelerators_are_left_alone_where_there_is_none(
    may_have, named, platforms, monkeypatch
):
    before = jax.config.jax_platforms
    monkeypatch.setenv("JAX_PLATFORMS", named)
    monkeypatch.setattr(hardware, "may_have_accelerator", lambda: may_have)
    try:
        jax.config.update("jax_platforms", None)
        backend.prepare()
        assert jax.config.jax_platforms == platforms
    finally:
        jax.config.update("jax_platforms", before)
