"""Eight fake CPU devices for every test, and less compiler effort: test time is compile time.

With K2JAX_TEST_PLATFORM=cuda the tests run on that platform instead; those marked `device` can.
"""

import os

import pytest

from k2jax.runtime.versions import fast_compile_flags

PLATFORM = os.environ.get("K2JAX_TEST_PLATFORM") or "cpu"
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu":
    _FLAGS = {"xla_force_host_platform_device_count": "8"} | fast_compile_flags()
    os.environ["XLA_FLAGS"] = " ".join(f"--{k}={str(v).lower()}" for k, v in _FLAGS.items())
else:  # as exact as the CPU, where products of float32 would be rounded to fewer bits
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
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


@pytest.fixture(scope="session")
def sandbox():
    """Runs programs apart from this machine; tests that want it are skipped where it cannot."""
    from k2jax.sandbox import Sandbox, SandboxError

    try:
        with Sandbox() as one:
            yield one
    except SandboxError as error:
        pytest.skip(str(error))
