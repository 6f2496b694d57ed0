"""Hopper's grouped products give what a loop over groups gives; their compiled code fits a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_code import assert_code_fits, dump_code

from k2jax.ops import mosaic
from k2jax.ops.moe import grouped_hopper as hopper
from k2jax.ops.moe import grouped_matmul
from k2jax.planner import targets
from k2jax.planner.compiler import GPU_OPTIONS, devices_of
from k2jax.runtime import versions

# Two tiles of the first group, none of the second; rows of the last tile belong to nobody.
SIZES, ROWS, K, N = (131, 0, 66), 203, 128, 256
NO_VIEWS = jax.__version_info__ < (0, 12)
needs_views = pytest.mark.skipif(NO_VIEWS, reason="this interpreter knows no transposed views")


def interpreter():
    """Looks for races too; what a copy reads past the last row is 0, as on GPUs."""
    return versions.mosaic_gpu_interpreter(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero", detect_races=True
    )


@pytest.fixture
def no_race(capfd):
    """Sees that the interpreter reports no race (0.10.2 looks for none)."""
    yield
    assert "RACE" not in capfd.readouterr().out


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def by_group(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def wide(a):
    return np.asarray(a, np.float64)


def assert_products(ours, x, matrices):
    right = np.zeros(ours.shape)  # rows of no group give 0
    for rows, w in zip(by_group(SIZES), matrices, strict=True):
        right[rows] = wide(x[rows]) @ wide(w)
    np.testing.assert_allclose(wide(ours), right, atol=0.15)  # a rounding of values up to 50


def test_a_row_is_multiplied_by_the_matrix_of_its_group(no_race):
    x, w = drawn((ROWS, K), (len(SIZES), K, N))
    ours = hopper.grouped_matmul(x, w, jnp.asarray(SIZES), interpret=interpreter())
    assert_products(ours, x, w)


@needs_views
def test_a_row_is_multiplied_by_the_transposed_matrix_of_its_group(no_race):
    x, w = drawn((ROWS, K), (len(SIZES), N, K))
    size = jnp.asarray(SIZES)
    ours = hopper.grouped_matmul(x, w, size, transposed=True, interpret=interpreter())
    assert_products(ours, x, w.swapaxes(1, 2))


@needs_views
def test_matrices_are_summed_over_the_rows_of_their_group(no_race):
    x, dy = drawn((ROWS, K), (ROWS, N))
    ours = hopper.grouped_outer(x, dy, jnp.asarray(SIZES), interpret=interpreter())
    right = np.stack([wide(x[rows]).T @ wide(dy[rows]) for rows in by_group(SIZES)])
    np.testing.assert_allclose(wide(ours), right, atol=0.15)


def test_only_hopper_gets_the_kernels_and_only_for_16_bits_and_whole_tiles():
    def is_supported(gpu, dtype="bfloat16", *widths):
        with versions.abstract_gpu(gpu):
            return hopper.is_supported(dtype, *(widths or (7_168, 2_048)))

    assert is_supported("NVIDIA H100 80GB HBM3") and is_supported("NVIDIA H200", "float16")
    assert not is_supported("NVIDIA B200") and not is_supported("NVIDIA A100-SXM4-80GB")
    assert not is_supported("NVIDIA H200", "float32")
    assert not is_supported("NVIDIA H200", "bfloat16", 7_168, 64)
    assert not hopper.is_supported("bfloat16", 7_168, 2_048)  # no GPU here


def test_a_hopper_gets_the_kernels_unless_they_are_switched_off(monkeypatch):
    def count_calls():
        def step(x, w, size, dy):
            y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, size), x, w)
            return y, *back(dy)

        rows, matrices = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((256, 128), (2, 128, 128)))
        args = rows, matrices, jax.ShapeDtypeStruct((2,), "int32"), rows
        with versions.abstract_gpu("NVIDIA H200"):
            text = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@mosaic_gpu_v2"), text.count("@__gpu$xla.gpu.triton")

    assert count_calls() == (3, 0)
    monkeypatch.setenv(mosaic.SWITCH, "0")
    assert count_calls() == (0, 3)


EXPERTS, EMBED, HIDDEN = 12, 7_168, 2_048  # K2's on one of 32 GPUs


@pytest.mark.compiles
def test_compiled_kernels_fit_hoppers_shared_memory_and_spill_no_register(tmp_path, monkeypatch):
    pytest.importorskip("jax_plugins.xla_cuda13")
    dump_code(monkeypatch, tmp_path)
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse("h100:1x1"))[0])

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def step(x, w, size, dy):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, size), x, w)
        return y, *back(dy)

    for width, columns in ((EMBED, 2 * HIDDEN), (HIDDEN, EMBED)):
        size = array(EXPERTS, dtype="int32")
        args = array(65_536, width), array(EXPERTS, width, columns), size, array(65_536, columns)
        with versions.abstract_gpu("NVIDIA H100"):
            lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(GPU_OPTIONS)
        assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 3
    assert_code_fits(tmp_path, kernels=6)
