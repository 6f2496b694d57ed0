"""One weight as the tensors that hold it: plain, FP8 or INT4; and a folder seen in another form.

"Tensors" is what `Folder`, `ConvertedCheckpoint` and `ReencodedTensors` have in common: names to
iterate over, `shape`, `dtype`, `file` and `read(name, rows)` of each, all under published names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from k2jax.config import ConfigError
from k2jax.params.low_bit_parts import RELEASED
from k2jax.weights import quant

Kind = tuple[np.dtype, tuple[int, ...]]

F32, I32, I64 = (np.dtype(name) for name in ("float32", "int32", "int64"))
PLAIN = (quant.BF16, np.dtype(np.float16), F32)
FORMATS = ("keep", "bfloat16", "float32", "fp8", *quant.GRIDS)
SCALE = "_scale_inv"
INT4_PARTS = ("_packed", "_scale", "_shape")
BIAS = "e_score_correction_bias"
# Of wrong length in the FP8 releases, and not trained (trap 13).
JUNK = "rotary_emb.inv_freq"


class Tensors(Protocol):
    """Published tensors by name."""

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def file(self, name: str) -> Path:
        """Where it is, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype as published."""
        ...

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """All of it, or some rows."""
        ...


def encoding(tensors: Tensors, weight: str) -> str:
    """How a weight is held: "fp8", "int4", "plain", or "" where it is not there at all."""
    if weight + SCALE in tensors:
        return "fp8"
    if any(weight + part in tensors for part in INT4_PARTS):
        return "int4"
    return "plain" if weight in tensors else ""


def weight_of(name: str) -> str:
    """The weight that a tensor is a part of: `x.weight` of `x.weight_scale_inv`."""
    for part in (SCALE, *INT4_PARTS):
        if name.endswith(f".weight{part}"):
            return name.removesuffix(part)
    return name


def parts(weight: str, shape: tuple[int, ...], how: str, dtype: np.dtype) -> dict[str, Kind]:
    """Dtype and shape of each tensor of a weight of `shape`; `dtype` is that of a plain one."""
    if how == "plain":
        return {weight: (dtype, shape)}
    rows, columns = shape
    if how == "fp8":
        scales = quant.blocks(rows), quant.blocks(columns)
        return {weight: (quant.FP8, shape), weight + SCALE: (F32, scales)}
    return {
        f"{weight}_packed": (I32, (rows, columns // quant.PER_WORD)),
        f"{weight}_scale": (quant.BF16, (rows, columns // quant.GROUP)),
        f"{weight}_shape": (I32, (2,)),
    }


def check_parts(tensors: Tensors, weight: str, shape: tuple[int, ...]) -> None:
    """Refuse a weight whose tensors are not those of its encoding, or of another shape.

    Raises:
        ConfigError: names the tensor and its file.
    """
    how = encoding(tensors, weight)
    if how == "int4" and shape[1] % quant.GROUP:
        raise ConfigError(
            f"{tensors.file(weight + '_packed')}: {weight!r} has {shape[1]} columns; INT4 needs"
            f" groups of {quant.GROUP}"
        )
    for name, (dtype, wanted) in parts(weight, shape, how, F32).items():
        if name not in tensors:
            raise ConfigError(f"{how.upper()} weight {weight!r} lacks its tensor {name!r}")
        if tensors.shape(name) != wanted:
            raise ConfigError(
                f"{tensors.file(name)}: {name!r} has shape {list(tensors.shape(name))}; the model"
                f" needs {list(wanted)}"
            )
        allowed: tuple[np.dtype, ...] = PLAIN if how == "plain" else (dtype,)
        allowed = (I32, I64) if name.endswith("_shape") else allowed
        if tensors.dtype(name) not in allowed:
            raise ConfigError(
                f"{tensors.file(name)}: {name!r} is {tensors.dtype(name)}; it is read as"
                f" {' or '.join(map(str, allowed))}"
            )
    if how == "int4" and weight in tensors:
        raise ConfigError(f"{tensors.file(weight)}: {weight!r} is there both plain and as INT4")


def decode(tensors: Tensors, weight: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a weight as its plain dtype; bfloat16 if it is quantised."""
    how = encoding(tensors, weight)
    if how == "plain":
        return tensors.read(weight, rows)
    if how == "int4":
        check_int4_shape(tensors, weight)
        packed, scale = (tensors.read(weight + part, rows) for part in ("_packed", "_scale"))
        return quant.decode_int4(packed, scale)
    begin, end, _ = rows.indices(tensors.shape(weight)[0])
    first = begin // quant.BLOCK
    q = tensors.read(weight, slice(first * quant.BLOCK, end))
    scale = tensors.read(weight + SCALE, slice(first, quant.blocks(end)))
    return quant.decode_fp8(q, scale)[begin - first * quant.BLOCK :]


def check_int4_shape(tensors: Tensors, weight: str) -> None:
    """Refuse an INT4 weight whose `weight_shape` is not that of its words.

    Raises:
        ConfigError: names the tensor and its file.
    """
    name = f"{weight}_shape"
    rows, words = tensors.shape(f"{weight}_packed")
    told = tensors.read(name).tolist()
    if told != [rows, words * quant.PER_WORD]:
        raise ConfigError(
            f"{tensors.file(name)}: {name!r} says {told}; the weight is"
            f" {[rows, words * quant.PER_WORD]}"
        )


class Adapter(Protocol):
    """What is added to some weights; `k2jax.weights.adapter_files` has the one."""

    name: str
    identity: str

    def __len__(self) -> int: ...
    def __contains__(self, weight: object) -> bool: ...
    def delta(self, weight: str, rows: slice) -> np.ndarray:
        """Float32 rows, the same bits whichever rows are asked for."""
        ...


class ReencodedTensors:
    """Tensors seen in another format; values are made when they are read.

    Attributes:
        source: what is read.
        encoded: how each weight is held here: "plain", "fp8" or "int4".
    """

    def __init__(
        self,
        source: Tensors,
        form: str,
        skip: tuple[str, ...] = (),
        adapter: Adapter | None = None,
    ):
        """Nothing is read.

        Args:
            source: the tensors.
            form: one of FORMATS, or "decode"; "keep" changes nothing but what the adapter does.
            skip: starts of names that are left out.
            adapter: is added to its weights before they are encoded. With "decode" these are
                plain, and the others are kept.
        """
        self.source, self.form, self.adapter = source, form, adapter
        self.encoded: dict[str, str] = {}
        self._kinds: dict[str, Kind] = {}
        self._weight: dict[str, str] = {}
        self._same: set[str] = set()
        weights = dict.fromkeys(weight_of(n) for n in source if not n.startswith(skip))
        for weight in weights:
            self._add(weight)

    def _add(self, weight: str) -> None:
        have = encoding(self.source, weight)
        how, dtype = self._target(weight, have)
        adapted = self._is_adapted(weight)
        if adapted and self.form == "decode":
            kinds = parts(weight, self._shape(weight, have), "plain", dtype)
            how = "plain"
        elif how == have and (how != "plain" or dtype == self.source.dtype(weight)):
            names = [n for n in (weight, weight + SCALE) if n in self.source]
            names += [weight + p for p in INT4_PARTS if have == "int4"]
            kinds = {n: (self.source.dtype(n), self.source.shape(n)) for n in names}
            if not adapted:
                self._same.add(weight)
        else:
            kinds = parts(weight, self._shape(weight, have), how, dtype)
        self.encoded[weight] = how
        self._kinds |= kinds
        self._weight |= dict.fromkeys(kinds, weight)

    def _target(self, weight: str, have: str) -> tuple[str, np.dtype]:
        """Encoding, and dtype if plain."""
        plain = self.source.dtype(weight) if have == "plain" else quant.BF16
        if self.form in ("keep", "decode") or weight.endswith(JUNK):
            return have, plain
        if weight.endswith(BIAS):
            return "plain", F32
        how = "int4" if self.form in quant.GRIDS else self.form
        chosen = RELEASED.get(how)
        if chosen and chosen.fullmatch(weight):
            if how == "int4" and self._shape(weight, have)[-1] % quant.GROUP:
                raise ConfigError(
                    f"{weight!r} has {self._shape(weight, have)[-1]} columns; INT4 needs groups of"
                    f" {quant.GROUP}"
                )
            return how, plain
        return "plain", F32 if self.form == "float32" else quant.BF16

    def _shape(self, weight: str, have: str) -> tuple[int, ...]:
        if have != "int4":
            return self.source.shape(weight)
        rows, words = self.source.shape(f"{weight}_packed")
        return rows, words * quant.PER_WORD

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def kind(self, name: str) -> Kind:
        """Dtype and shape of a tensor."""
        return self._kinds[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._kinds[name][1]

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor."""
        return self._kinds[name][0]

    def file(self, name: str) -> Path:
        """The source's file."""
        weight = self._weight[name]
        return self.source.file(weight if weight in self.source else f"{weight}_packed")

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor or some of its rows, made now.

        Args:
            name: of the tensor.
            rows: for FP8, from the first row of a block on.
        """
        weight = self._weight[name]
        if weight in self._same:
            return self.source.read(name, rows)
        if name.endswith("_shape"):
            return np.array(self._shape(weight, encoding(self.source, weight)), self.dtype(name))
        how = self.encoded[weight]
        if how == "plain":
            return np.asarray(self._decode(weight, rows), self.dtype(name))
        if name == weight + SCALE:
            return quant.fp8_scales(self._decode(weight, _widen(rows)))
        plain = self._decode(weight, rows)
        if how == "fp8":
            return quant.encode_fp8(plain)[0]
        grid = quant.GRIDS.get(self.form, quant.KIMI)
        if grid is quant.KIMI and self._is_adapted(weight):
            grid = quant.KIMI_RULE
        only_scales = name.endswith("_scale")
        return quant.int4_scales(plain, grid) if only_scales else quant.encode_int4(plain, grid)[0]

    def _decode(self, weight: str, rows: slice) -> np.ndarray:
        plain = decode(self.source, weight, rows)
        if not self._is_adapted(weight):
            return plain
        assert self.adapter is not None
        return np.add(self.adapter.delta(weight, rows), plain, dtype=F32)

    def _is_adapted(self, weight: str) -> bool:
        return self.adapter is not None and weight in self.adapter


def _widen(rows: slice) -> slice:
    """Rows of a weight that the given rows of scales come from."""
    begin, end = rows.start or 0, rows.stop
    return slice(begin * quant.BLOCK, None if end is None else end * quant.BLOCK)
