"""Eight fake CPU devices for every test, and less compiler effort: test time is compile time."""

import importlib.metadata
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
# Compiles in a third of the time; a flag that XLA does not know would end the process.
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture
def mesh():
    """Sets a mesh for the test: `mesh(data=2, expert=4)`."""
    import jax

    from k2jax import sharding
    from k2jax.config import MeshConfig

    stack = []

    def use(**axes):
        context = jax.set_mesh(sharding.make_mesh(MeshConfig(**axes)))
        context.__enter__()
        stack.append(context)

    yield use
    while stack:
        stack.pop().__exit__(None, None, None)
