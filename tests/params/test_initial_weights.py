"""Initial weights: the same on any mesh, and no more host memory than a device's parts take."""

import tracemalloc
import zlib

import jax
import numpy as np
import pytest
from small_model import SIZES

from k2jax.config import ModelConfig
from k2jax.params import arrays
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec
from k2jax.runtime.hardware import count_cores

SPECS = declare_kimi(ModelConfig(**SIZES))
STD = 0.02


def whole(name, leaf):
    """Every matrix from (seed, name, layer, expert), one after the other."""
    out = np.full(leaf.shape, leaf.init == "ones", np.float32)
    if leaf.init == "normal":
        for at in np.ndindex(leaf.shape[: leaf.stacked]):
            rng = np.random.default_rng([7, zlib.crc32(name.encode()), *at])
            inner = leaf.shape[leaf.stacked :]
            out[at] = rng.standard_normal(inner, np.float32) * np.float32(STD)
    return out


@pytest.mark.parametrize(
    "axes", [{}, {"data": 2, "expert": 4}, {"replica": 2, "expert": 2, "model": 2}], ids=str
)
def test_every_matrix_is_drawn_from_its_name_and_place_on_any_mesh(axes, mesh):
    if axes:
        mesh(**axes)
    for name, array in initial(SPECS, 7, STD).items():
        np.testing.assert_array_equal(np.asarray(array), whole(name, SPECS[name]), name)
        if axes:
            assert array.sharding.mesh == jax.sharding.get_mesh()


def test_a_host_holds_its_parts_and_a_matrix_for_each_core():
    matrices, rows, columns = 64, 256, 512
    leaf = ParamSpec(("experts", "embed", "expert_ffw"), (matrices, rows, columns), 1, "muon")
    # A quarter of each matrix, as where experts' storage is split over `data`.
    place = (range(matrices), range(rows // 4), range(columns))
    tracemalloc.start()
    try:
        parts = arrays._draw_parts("w", leaf, 0, STD, [place])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    matrix = 4 * rows * columns
    assert parts[place].nbytes == matrices // 4 * matrix
    assert peak < parts[place].nbytes + count_cores() * 1.1 * matrix + 1e6
