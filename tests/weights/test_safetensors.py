import json

import ml_dtypes
import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.weights.safetensors import DTYPES, Reader, write

RNG = np.random.default_rng(0)


def random_bytes(shape, dtype):
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(RNG.bytes(count), dtype).reshape(shape)


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, kind):
    tensors = {
        "matrix": random_bytes((3, 5), DTYPES[kind]),
        "scalar": random_bytes((), DTYPES[kind]),
        "empty": np.zeros((0, 4), DTYPES[kind]),
    }
    write(tmp_path / "x", tensors, {"format": "pt"})
    reader = Reader(tmp_path / "x")
    assert reader.metadata == {"format": "pt"} and len(reader) == 3
    for name, tensor in tensors.items():
        assert reader.dtype(name) == tensor.dtype and reader.shape(name) == tensor.shape
        assert reader[name].tobytes() == tensor.tobytes()


def test_written_tensors_are_aligned_and_leave_no_holes(tmp_path):
    tensors = {
        "a": np.zeros(3, ml_dtypes.float8_e4m3fn),
        "b": np.zeros(3, ml_dtypes.bfloat16),
        "c": np.zeros(3, np.float64),
    }
    write(tmp_path / "x", tensors)
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and content[8:9] == b"{"
    assert [header[n]["data_offsets"] for n in "cba"] == [[0, 24], [24, 30], [30, 33]]
    assert len(content) == 8 + length + 33


def test_a_strided_or_big_endian_array_is_written_as_it_reads(tmp_path):
    tensors = {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.arange(3, dtype=">i4")}
    write(tmp_path / "x", tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(Reader(tmp_path / "x")[name], tensor)


def test_reading_copies_nothing_and_forbids_writing(tmp_path):
    write(tmp_path / "x", {"a": np.zeros(4, np.float32)})
    tensor = Reader(tmp_path / "x")["a"]
    assert not tensor.flags.owndata and not tensor.flags.writeable


def test_a_dtype_the_format_lacks_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ConfigError, match="'a' is complex64"):
        write(tmp_path / "x", {"a": np.zeros(1, np.complex64)})
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "empty": (b"", "cut short or not a safetensors file"),
    "header_beyond_the_end": (raw({}, length=999), "cut short or not a safetensors file"),
    "pickle": (b"\x80\x04" + b"x" * 40, "cut short or not a safetensors file"),
    "no_json": (raw(b"{nope}"), "malformed header"),
    "no_object": (raw(b"[1]"), "malformed header: it is not a JSON object"),
    "no_utf8": (raw(b"\xff\xfe{}"), "malformed header"),
    "name_twice": (raw(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "metadata": (raw({"__metadata__": [1]}), "__metadata__ is not a JSON object"),
    "no_shape": (raw({"a": {"dtype": "F32"}}), "tensor 'a' lacks dtype, shape or data_offsets"),
    "no_entry": (raw({"a": 3}), "tensor 'a' lacks"),
    "three_offsets": (raw({"a": entry(0, 4) | {"data_offsets": [0, 1, 4]}}), "tensor 'a' lacks"),
    "dtype": (raw({"a": entry(0, 4, "BF61")}, bytes(4)), "unknown dtype 'BF61'; did you mean 'BF"),
    "negative": (raw({"a": entry(-4, 0)}, bytes(4)), "no count"),
    "negative_shape": (raw({"a": entry(0, 4, shape=(-1, -1))}, bytes(4)), "no count"),
    "size": (raw({"a": entry(0, 8)}, bytes(8)), r"takes 4 bytes, its offsets span 8"),
    "truncated": (raw({"a": entry(0, 4)}, bytes(3)), "cut short: tensor 'a' ends at byte 4"),
    "hole": (raw({"a": entry(4, 8)}, bytes(8)), "tensor 'a' begins at byte 4 of the data; 0 was"),
    "overlap": (
        raw({"a": entry(0, 8, shape=(2,)), "b": entry(4, 8)}, bytes(8)),
        "tensor 'b' begins at byte 4 of the data; 8 was",
    ),
    "trailing": (raw({"a": entry(0, 4)}, bytes(9)), "has 5 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_in_one_line_that_names_the_file(tmp_path, case):
    content, message = DAMAGE[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Reader(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_tensor_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent: No such file"):
        Reader(tmp_path / "absent")
    write(tmp_path / "x", {"norm": np.zeros(1, np.float32)})
    with pytest.raises(ConfigError, match="no tensor 'nrom'; did you mean 'norm'"):
        Reader(tmp_path / "x")["nrom"]
