"""Read and write the safetensors format: a JSON header, then plain little-endian arrays.

A file is an unsigned 64-bit header length, the header {name: {"dtype", "shape", "data_offsets":
[begin, end]}} with an optional "__metadata__" of strings, and a buffer that the offsets, counted
from its start, cover without holes or overlaps. Reading maps the file: a tensor costs memory only
where it is touched.
"""

import difflib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from k2jax.config import ConfigError, nearest
from k2jax.runtime.files import open_atomic
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    # Of weights that are not read, so that they can be named.
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
# The format's own limit; a longer header is not a header.
MAX_HEADER = 100_000_000
ALIGNMENT = 8


class Data(Protocol):
    """The bytes of a file, wherever it is."""

    def __getitem__(self, span: slice) -> np.ndarray:
        """Some of them; fewer where the file ends before."""
        ...

    def size(self, expected: int) -> int:
        """How many; may be one off where they are not as many as expected."""
        ...


class Mapped:
    """A file of this machine, mapped."""

    def __init__(self, path: Path):
        """Open it.

        Raises:
            ConfigError: it is missing, or not readable.
        """
        try:
            empty = path.stat().st_size == 0  # such files cannot be mapped
            self._bytes = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None

    def __getitem__(self, span: slice) -> np.ndarray:
        return self._bytes[span]

    def size(self, expected: int) -> int:
        """Bytes of the file."""
        del expected
        return len(self._bytes)


class Reader:
    """The tensors of one file, by name. Iterating gives the names in the order of the header."""

    def __init__(self, path: str | os.PathLike[str], data: Data | None = None):
        """Read the header.

        Args:
            path: of the file.
            data: its bytes, where it is not on this machine.

        Raises:
            ConfigError: the file is missing, cut short or malformed; one line names the tensor.
        """
        self.path = Path(path)
        self._data = Mapped(self.path) if data is None else data
        header, self._start = _header(self.path, self._data)
        metadata = header.pop(METADATA, None) or {}
        if not isinstance(metadata, dict):
            raise ConfigError(f"{path}: {METADATA} is not a JSON object")
        self.metadata: dict[str, str] = metadata
        self._entries = {name: _entry(self.path, name, entry) for name, entry in header.items()}
        size = self._data.size(self._start + self.size)
        _check_cover(self.path, self._entries, size - self._start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self._start + self.size

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(end - begin for _, _, begin, end in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._find(name)[1]

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor; bfloat16 and float8 are those of ml_dtypes."""
        return self._find(name)[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor, read-only; where it is mapped, bytes are read when they are used."""
        return self.read(name)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor or some of its rows, one after the other."""
        dtype, shape, begin, end = self._find(name)
        if shape and shape[0]:
            first, last, _ = rows.indices(shape[0])
            row = (end - begin) // shape[0]
            begin, end = begin + first * row, begin + max(first, last) * row
            shape = (max(0, last - first), *shape[1:])
        if begin == end:
            return np.empty(shape, dtype)
        found = self._data[self._start + begin : self._start + end]
        if len(found) < end - begin:
            raise ConfigError(f"{self.path} was cut short while tensor {name!r} was read")
        return found.view(dtype).reshape(shape)

    def _find(self, name: str) -> "Entry":
        if name not in self._entries:
            raise ConfigError(f"{self.path} has no tensor {name!r}{near(name, self)}")
        return self._entries[name]


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing: files have too many tensors to list them."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


Entry = tuple[np.dtype, tuple[int, ...], int, int]


def _header(path: Path, data: Data) -> tuple[dict[str, Any], int]:
    prefix = data[0:8].tobytes()
    length = int.from_bytes(prefix, "little")
    whole = len(prefix) == 8 and length <= MAX_HEADER
    text = data[8 : 8 + length].tobytes() if whole else b""
    if not whole or len(text) < length:
        if foreign := describe_foreign(data[0:FOREIGN_BYTES].tobytes()):
            raise ConfigError(f"{path} is {foreign}")
        raise ConfigError(
            f"{path} is cut short or not a safetensors file: its header should have {length} bytes"
        )
    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} has a malformed header: {error}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{path} has a malformed header: it is not a JSON object")
    return header, 8 + length


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: a key that is there twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(a for a, b in itertools.pairwise(names) if a == b)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> Entry:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: tensor {name!r} lacks dtype, shape or data_offsets in the header"
        ) from None
    if kind not in DTYPES:
        raise ConfigError(
            f"{path}: tensor {name!r} has the unknown dtype {kind!r}; {nearest(str(kind), DTYPES)}"
        )
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ConfigError(f"{path}: tensor {name!r} has a shape or offset that is no count")
    if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise ConfigError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {kind} takes"
            f" {math.prod(shape) * DTYPES[kind].itemsize} bytes, its offsets span {end - begin}"
        )
    return DTYPES[kind], shape, begin, end


def _check_cover(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Tensors fill the buffer one after the other; anything else is damage."""
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise ConfigError(
                f"{path} is cut short: tensor {name!r} ends at byte {end} of the data, which has"
                f" {size}"
            )
        if begin != at:
            raise ConfigError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data; {at} was expected"
            )
        at = end
    if at != size:
        raise ConfigError(f"{path} has {size - at} bytes after its last tensor")


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, all or nothing.

    Args:
        path: the file.
        tensors: arrays of a dtype in DTYPES, by name.
        metadata: strings by name, for `__metadata__`; readers expect {"format": "pt"}.

    Raises:
        ConfigError: a dtype that the format, or this reader, does not have.
    """
    kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    stream(path, kinds, lambda name: [tensors[name]], metadata)


def stream(
    path: str | os.PathLike[str],
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write` for tensors that are made when their turn comes.

    Tensors are laid out by falling item size, then by name, so that each is aligned.

    Args:
        path: the file.
        kinds: dtype and shape of each tensor, by name.
        pieces: gives a tensor's rows, one group after the other.
        metadata: as for `write`.
    """
    path = Path(path)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    at = 0
    for name in order:
        dtype, shape = kinds[name][0].newbyteorder("<"), kinds[name][1]
        if dtype not in NAMES:
            known = ", ".join(str(dtype) for dtype in NAMES)
            raise ConfigError(f"tensor {name!r} is {dtype}; safetensors here has: {known}")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open_atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in pieces(name):
                array = np.ascontiguousarray(piece, kinds[name][0].newbyteorder("<"))
                file.write(array.reshape(-1).view(np.uint8).data)
        assert file.tell() == 8 + len(text) + at, f"{path}: pieces do not add up"
