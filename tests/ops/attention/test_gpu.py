"""The GPU's attention kernels, interpreted, are attention with its scores whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.model.attention import sharded_attention
from k2jax.ops.attention import gpu
from k2jax.runtime.versions import abstract_gpu

# 24 is no power of two; neither blocks of 16 nor of 8 divide the lengths.
B, H, T, C, V = 2, 2, 50, 24, 8
SCALE = 0.3
WIDE, LONG = gpu.BlockSizes(16, 8, interpret=True), gpu.BlockSizes(8, 16, interpret=True)


def drawn():
    rng = np.random.default_rng(0)

    def cast(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    segment_BT = np.ones((B, T), np.int32)
    segment_BT[0, 14:], segment_BT[0, 33:] = 2, 3
    segment_BT[1, -5:] = 0
    return cast(B, H, T, C) * 3, cast(B, H, T, C), cast(B, H, T, V), segment_BT, cast(B, H, T, V)


def whole(q, k, v, segment):
    """The mixture; largest logits and logs of sums."""
    logit = jnp.einsum("bhtc,bhsc->bhts", q, k) * SCALE
    before = jnp.arange(T)[:, None] >= jnp.arange(T)
    seen = (segment[:, :, None] == segment[:, None]) & before
    logit = jnp.where(seen[:, None], logit, -jnp.inf)
    y = jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logit), v)
    return y, (logit.max(axis=-1), jax.nn.logsumexp(logit, axis=-1))


@jax.jit
def oracle(q, k, v, segment, dy):
    def mix(q, k, v):
        return whole(q, k, v, segment)

    y, back, rows = jax.vjp(mix, q, k, v, has_aux=True)
    return [y, *rows, *back(dy)]


@jax.jit
def kernels(q, k, v, segment, dy):
    args = q, k, v, segment
    y, top, logsum = gpu.forward(*args, scale=SCALE, sizes=WIDE)
    back = gpu.backward((*args, y, logsum), dy, scale=SCALE, sizes=(LONG, WIDE))
    return [y, top, logsum, *back]


@pytest.mark.device
def test_values_logits_and_gradients_are_those_of_whole_scores():
    inputs = drawn()
    for i, (ours, right) in enumerate(zip(kernels(*inputs), oracle(*inputs), strict=True)):
        assert ours.shape == right.shape
        assert np.abs(ours - right).max() <= 1e-5 * np.abs(right).max(), i


def ranges(segment, of_queries):
    """Blocks that each block of 8 queries (or keys) goes through, as ranges."""
    side = gpu._pad_side((), jnp.asarray(segment, jnp.int32)[None], 8)
    table = gpu._block_ranges(side, side, of_queries)
    return [(int(begin), int(end)) for *_, begin, end in table[0]]


def test_what_the_diagonal_hides_and_other_documents_are_not_visited():
    one, two = [1] * 32, [1] * 16 + [2] * 16
    assert ranges(one, of_queries=True) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert ranges(one, of_queries=False) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert ranges(two, of_queries=True) == [(0, 1), (0, 2), (2, 3), (2, 4)]
    assert ranges(two, of_queries=False) == [(0, 2), (1, 2), (2, 4), (3, 4)]
    assert ranges(two[:27], of_queries=True) == ranges(two, of_queries=True)


def test_without_the_triton_backend_no_gpu_gets_the_kernels(monkeypatch):
    array = jax.ShapeDtypeStruct((1, 64, 4096, 64), "bfloat16")
    assert gpu.is_supported(array, array)
    monkeypatch.setattr(gpu, "triton", None)
    assert not gpu.is_supported(array, array)


def test_older_gpus_odd_widths_and_float32_get_no_kernel(monkeypatch):
    def is_supported(queries, values, dtype="bfloat16"):
        def array(width):
            return jax.ShapeDtypeStruct((1, 64, 4096, width), dtype)

        return gpu.is_supported(array(queries), array(values))

    assert is_supported(192, 128) and is_supported(64, 32)
    assert not is_supported(48, 32) and not is_supported(256, 128) and not is_supported(192, 192)
    assert not is_supported(192, 128, "float32")

    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    assert not is_supported(192, 128)


@pytest.mark.parametrize(
    ("query", "value", "kernel"), [(64, 32, "__gpu$xla.gpu.triton"), (128, 64, "mosaic_gpu_v2")]
)
@pytest.mark.parametrize("config", [MeshConfig(data=2, model=2), MeshConfig(context=2)], ids=str)
def test_programs_for_hopper_have_the_kernels_on_a_mesh_too(config, query, value, kernel):
    def step(q, k, v, segment, dy):
        def mix(q, k, v):
            return sharded_attention(q, k, v, segment, SCALE)

        y, back, top = jax.vjp(mix, q, k, v, has_aux=True)
        return y, top, back(dy)

    heads = ("batch", "heads", "length", None)
    with sharding.use_abstract_mesh(config), abstract_gpu("NVIDIA H200") as mesh:

        def array(axes, *shape, dtype="bfloat16"):
            layout = jax.NamedSharding(mesh, sharding.storage_spec(axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

        wide, narrow = (array(heads, 2, 2, 2048, width) for width in (query, value))
        segment = array(("batch", "length"), 2, 2048, dtype="int32")
        traced = jax.jit(step).trace(wide, wide, narrow, segment, narrow)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{kernel}") == 3
