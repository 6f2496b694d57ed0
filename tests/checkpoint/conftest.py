import jax
import numpy as np
import pytest
from k2jax.sharding import make

from k2jax.config import MeshConfig
from k2jax.spec import ParamSpec


@pytest.fixture
def mesh():
    """Sets a mesh for the test: `mesh(data=2, expert=4)`."""
    stack = []

    def use(**axes):
        context = jax.set_mesh(make(MeshConfig(**axes)))
        context.__enter__()
        stack.append(context)

    yield use
    while stack:
        stack.pop().__exit__(None, None, None)


def random_like(spec: ParamSpec, seed: int = 0) -> np.ndarray:
    """Float32 values that bfloat16 does not hold exactly."""
    return np.random.default_rng(seed).standard_normal(spec.shape, np.float32)
