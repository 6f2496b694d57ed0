import ml_dtypes
import numpy as np
import pytest

from k2jax.weights import quant

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


def formula_fp8(q, scale):
    """Spec 4.1, element by element."""
    out = np.empty(q.shape, ml_dtypes.bfloat16)
    for r, c in np.ndindex(*q.shape):
        out[r, c] = np.float32(q[r, c]) * scale[r // 128, c // 128]
    return out


def bits(array):
    return np.ascontiguousarray(array).view(np.uint16)


def fp8(rows, columns, seed=0, scale=1e-4):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 256, (rows, columns), np.uint8).view(ml_dtypes.float8_e4m3fn)
    shape = quant.blocks(rows), quant.blocks(columns)
    return q, (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (576, 130), (1, 1), (130, 300)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_fp8_is_decoded_by_the_formula_bit_for_bit(rows, columns):
    q, scale = fp8(rows, columns)
    np.testing.assert_array_equal(bits(quant.decode_fp8(q, scale)), bits(formula_fp8(q, scale)))


def test_the_576_rows_of_kv_a_have_five_blocks():
    scale = np.arange(5, dtype=np.float32)[:, None] + 1
    ones = np.ones((576, 7), ml_dtypes.float8_e4m3fn)
    row = quant.decode_fp8(ones, scale)[:, 3].astype(np.float32) - 1
    for at, block in {0: 0, 127: 0, 128: 1, 511: 3, 512: 4, 575: 4}.items():
        assert row[at] == block


@pytest.mark.parametrize("size", [1e-37, 1e-39, 3e37, np.inf])
@pytest.mark.filterwarnings("ignore:(invalid|overflow)")
def test_scales_that_leave_the_normal_range_are_exact_too(size):
    q = np.tile(CODES, (2, 1))
    scale = np.array([[size, -size]], np.float32)
    np.testing.assert_array_equal(bits(quant.decode_fp8(q, scale)), bits(formula_fp8(q, scale)))


def nearest_fp8(value):
    """By looking at every float8 value; ties go to the even code."""
    known = CODES[:127].astype(np.float64)
    size = np.abs(np.float64(value))
    gap = np.abs(known - size)
    near = np.flatnonzero(gap == gap.min())
    code = min(near, key=lambda n: n % 2)
    return np.copysign(known[code], value)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8_is_encoded_to_the_nearest_value(dtype):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((130, 140)) * 2.0 ** rng.integers(-20, 4, (130, 140))).astype(
        dtype
    )
    weight[:, 128:] = 0
    q, scale = quant.encode_fp8(weight)
    assert q.dtype == ml_dtypes.float8_e4m3fn and scale.shape == (2, 2)
    amax = np.abs(weight[:128, :128].astype(np.float32)).max()
    assert scale[0, 0] == amax / np.float32(448) and scale[1, 1] == 1
    assert np.abs(q[:128, :128].astype(np.float32)).max() == 448
    for r, c in [(i, (i * 37) % 140) for i in range(130)]:
        exact = np.float32(weight[r, c]) / scale[r // 128, c // 128]
        assert float(q[r, c]) == nearest_fp8(exact)


def test_every_float8_value_survives_decoding_and_encoding():
    finite = CODES[(CODES.view(np.uint8) & 127) != 127]
    q = np.tile(finite, (2, 1))[:, :128]
    q[:, 0] = 448
    scale = np.full((1, 1), 2.0**-9, np.float32)
    back, again = quant.encode_fp8(quant.decode_fp8(q, scale))
    np.testing.assert_array_equal(again, scale)
    np.testing.assert_array_equal(back.astype(np.float32), q.astype(np.float32))


def test_the_int4_word_of_the_spec():
    q = np.array([[-8, -1, 0, 7, 3, -5, 1, -2]], np.int32)
    assert np.asarray(quant._pack_int4(np.tile(q, 4)))[0].tolist() == [0x693BF870] * 4
    word = np.full((1, 4), 1765537904, np.int32)
    scale = np.ones((1, 1), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(quant.decode_int4(word, scale), np.tile(q, 4))


def test_int4_is_decoded_by_the_formula_bit_for_bit():
    rng = np.random.default_rng(0)
    packed = rng.integers(-(2**31), 2**31, (6, 16), np.int64).astype(np.int32)
    scale = rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16)
    want = np.empty((6, 128), ml_dtypes.bfloat16)
    for o, i in np.ndindex(6, 128):
        nibble = (int(packed[o, i // 8]) >> (4 * (i % 8))) & 15
        want[o, i] = np.float32(nibble - 8) * np.float32(scale[o, i // 32])
    np.testing.assert_array_equal(bits(quant.decode_int4(packed, scale)), bits(want))


@pytest.mark.parametrize("grid", [quant.KIMI, quant.MINMAX])
def test_int4_is_encoded_to_the_nearest_value(grid):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 96)).astype(np.float32)
    weight[2, 32:64] = 0
    packed, scale = quant.encode_int4(weight, grid)
    assert packed.shape == (5, 12) and scale.shape == (5, 3)
    each = np.repeat(scale.astype(np.float32), 32, axis=1)
    q = np.clip(np.rint(weight / each), grid.low, 7).astype(np.int32)
    want = (q.astype(np.float32) * each).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(quant.decode_int4(packed, scale)), bits(want))
    amax = np.abs(weight.reshape(5, 3, 32)).max(axis=2)
    rule = np.maximum(amax / np.float32(grid.top), np.float32(grid.floor))
    np.testing.assert_array_equal(scale, rule.astype(ml_dtypes.bfloat16))


def test_int4_words_survive_decoding_and_encoding():
    """Where a group uses -7.5 <= w / scale: a group that reaches -8 has another scale."""
    weight = np.tile(np.linspace(-7.5, 7.5, 32, dtype=np.float32), (3, 2))
    packed, scale = quant.encode_int4(weight, quant.MINMAX)
    assert (scale.astype(np.float32) == 1).all()
    q = quant.decode_int4(packed, scale).astype(np.float32)
    assert q.min() == -8 and q.max() == 7


def release(rows, columns, tops, seed=0):
    """Made-up words and scales on Kimi's grid, each group's largest size one of `tops`."""
    rng = np.random.default_rng(seed)
    groups = rows * columns // 32
    top = rng.choice(tops, groups)[:, None]
    q = rng.integers(-top, top + 1, (groups, 32))
    q[np.arange(groups), rng.integers(0, 32, groups)] = (top * rng.choice([-1, 1], top.shape))[:, 0]
    # Neighbouring sizes: a group of one size could have any scale.
    q[:, :2] = np.concatenate([top, top - 1], axis=1)
    scale = (2.0 ** rng.uniform(-14, 3, (rows, columns // 32))).astype(ml_dtypes.bfloat16)
    return np.array(quant._pack_int4(q.reshape(rows, columns).astype(np.int32))), scale


def test_weights_of_a_release_give_back_its_words_and_scales():
    packed, scale = release(640, 1024, [7])
    assert scale.size == 20_480
    again = quant.encode_int4(quant.decode_int4(packed, scale))
    np.testing.assert_array_equal(again[0], packed)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))
    minmax = quant.encode_int4(quant.decode_int4(packed, scale), quant.MINMAX)
    assert (minmax[1] != scale).all()


def test_odd_groups_of_a_release_give_back_their_words_and_scales():
    """Largest values below 7, zeros, and groups so small that the rule's floor is their scale."""
    packed, scale = release(64, 512, [2, 3, 4, 5, 6, 7], seed=1)
    packed[:, 0::16] = np.uint32(0x88888888).view(np.int32)  # zeros: a quarter of the groups
    packed[:, 1::16] = packed[:, 2::16] = packed[:, 3::16] = packed[:, 0::16]
    small, _ = release(64, 512, [1, 2, 3], seed=2)
    packed[:, 4:8] = small[:, 4:8]
    scale[:, 0::4] = scale[:, 1] = np.float32(quant.KIMI.floor)
    again = quant.encode_int4(quant.decode_int4(packed, scale))
    np.testing.assert_array_equal(again[0], packed)
    np.testing.assert_array_equal(bits(again[1]), bits(scale))


@pytest.mark.parametrize("grid", [quant.KIMI, quant.MINMAX])
def test_compressed_tensors_unpacks_our_int4_to_the_same_values(grid):
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = np.random.default_rng(3).standard_normal((48, 256)).astype(np.float32)
    packed, scale = quant.encode_int4(weight, grid)
    q = unpack_from_int32(torch.tensor(packed), 4, torch.Size(weight.shape)).numpy()
    assert q.min() == grid.low and q.max() == 7
    each = np.repeat(scale.astype(np.float32), 32, axis=1)
    want = (q.astype(np.float32) * each).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bits(quant.decode_int4(packed, scale)), bits(want))
