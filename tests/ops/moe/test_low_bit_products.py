"""Products with low-bit matrices, decoded a tile at a time, are those of matrices decoded first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.ops.lowbit import Fp8, Int4, decode
from k2jax.ops.moe import low_bit, low_bit_gpu, resident
from k2jax.weights import quant

pytestmark = pytest.mark.device

LAYERS, EXPERTS, EMBED, FFW = 2, 3, 256, 128
SIZES = {"even": [7, 7, 6], "one has all": [0, 20, 0], "some have none": [11, 0, 6]}


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def stack(form, rows, columns, count=LAYERS * EXPERTS):
    """Low-bit matrices [count, rows, columns], made as they are published."""
    parts = []
    for seed in range(count):
        weight = drawn(columns, rows) * np.float32(1 + seed)
        encoded = quant.encode_fp8(weight) if form == "fp8" else quant.encode_int4(weight)
        parts.append([part.T for part in encoded])
    codes, scale = (jnp.asarray(np.stack(part)) for part in zip(*parts, strict=True))
    return Fp8(codes, scale) if form == "fp8" else Int4(codes, scale)


def test_values_are_those_of_the_converter():
    weight = drawn(200, 160)
    codes, scale = quant.encode_fp8(weight)
    ours = decode(Fp8(jnp.asarray(codes.T), jnp.asarray(scale.T)))
    np.testing.assert_array_equal(ours.T, quant.decode_fp8(codes, scale).astype(np.float32))
    codes, scale = quant.encode_int4(weight)
    ours = decode(Int4(jnp.asarray(codes.T), jnp.asarray(scale.T)))
    np.testing.assert_array_equal(ours.T, quant.decode_int4(codes, scale).astype(np.float32))


@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("way", ["tiles", "gpu"])
def test_rows_meet_the_matrix_of_their_group(form, sizes, way):
    w, first = stack(form, EMBED, FFW), jnp.int32(EXPERTS)
    size_E, x_MK = jnp.asarray(sizes, jnp.int32), jnp.asarray(drawn(20, EMBED))
    if way == "gpu":
        corner = jnp.zeros(2, jnp.int32)
        ours = low_bit_gpu.grouped_matmul(x_MK, w, first, size_E, corner, interpret=True)
    else:
        ours = low_bit._multiply_tiles(x_MK, w, first, size_E, layout=P())
    plain, begin = decode(w), 0
    for group, size in enumerate(sizes):
        rows = slice(begin, begin + size)
        np.testing.assert_allclose(
            ours[rows], x_MK[rows] @ plain[EXPERTS + group], rtol=1e-5, atol=2e-3
        )
        begin += size


@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("run", [resident._run_blocks, resident._run_groups])
def test_the_experts_of_a_layer_are_those_decoded_first(form, run):
    shapes = ((EMBED, FFW), (EMBED, FFW), (FFW, EMBED))
    stacks = [stack(form, *shape) for shape in shapes]
    stacks = tuple(
        jax.tree.map(lambda a: a.reshape(LAYERS, EXPERTS, *a.shape[1:]), w) for w in stacks
    )
    args = (jnp.asarray(drawn(20, EMBED) / 100), jnp.asarray(drawn(20, 1)))
    more = (jnp.int32(1), jnp.asarray(SIZES["some have none"], jnp.int32))
    ours = run(*args, stacks, *more)[:17]
    plain = run(*args, tuple(decode(w) for w in stacks), *more)[:17]
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
