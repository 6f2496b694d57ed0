"""Our checkpoints, converted or trained, seen as published tensors."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.params.spec import ParamSpec
from k2jax.weights import quant
from k2jax.weights.converted_write import LEAVES, key
from k2jax.weights.mapping import StackIndex, stack_slots
from k2jax.weights.safetensors import Reader

EXTRA = "extra.safetensors"


class ConvertedCheckpoint:
    """The weights of one of our checkpoints, converted or trained, as published tensors."""

    def __init__(self, step: Path, meta: Mapping[str, Any], specs: Mapping[str, ParamSpec]):
        """Open a complete checkpoint; arrays are read when they are used.

        Args:
            step: its folder.
            meta: what is beside the arrays.
            specs: the model's parameters.

        Raises:
            ConfigError: it is of another model, or damaged.
        """
        self.path, self._specs = step, specs
        self._saved = meta["arrays"]["params"]
        quantised = meta.get("quantised", {})
        self._int4_shape = np.dtype(meta.get("int4_shape", "int32"))
        self._at: dict[str, tuple[str, str, StackIndex]] = {}
        for name, spec in specs.items():
            for part, suffix in LEAVES[quantised.get(name, "plain")].items():
                if name + suffix not in self._saved:
                    raise ConfigError(f"{step} has no parameter {name + suffix!r}")
                for where, weight in stack_slots(spec):
                    self._at[weight + part] = (name + suffix, name, where)
                    if part == "_packed":
                        self._at[f"{weight}_shape"] = ("", name, where)
            for copy in spec.copies:
                self._at[copy] = (name, name, ())
        extra = step / EXTRA
        self._extra = Reader(extra) if extra.exists() else None
        self._open: dict[str, Any] = {}
        for leaf in {at[0] for at in self._at.values()} - {""}:
            self._open[leaf] = _open(step / "params", leaf)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._at, self._extra or ())

    def __len__(self) -> int:
        return len(self._at) + len(self._extra or ())

    def __contains__(self, name: object) -> bool:
        return name in self._at or (self._extra is not None and name in self._extra)

    def file(self, name: str) -> Path:
        """The leaf's folder."""
        if name not in self._at:
            return self.path / EXTRA
        leaf, _, where = self._at[name]
        return self.path / "params" / leaf / key(where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as published."""
        if self._extra is not None and name in self._extra:
            return self._extra.shape(name)
        leaf, ours_, where = self._at[name]
        if not leaf:
            return (2,)
        spec = self._specs[ours_]
        inner = tuple(self._saved[leaf][0][len(where) :])
        return spec.published_shape if leaf == ours_ else inner[::-1]

    def dtype(self, name: str) -> np.dtype:
        """Dtype as published."""
        if self._extra is not None and name in self._extra:
            return self._extra.dtype(name)
        leaf = self._at[name][0]
        if not leaf:
            return self._int4_shape
        return quant.FP8 if leaf.endswith(".fp8") else np.dtype(self._saved[leaf][1])

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor or some of its rows, from the chunks that hold them."""
        if self._extra is not None and name in self._extra:
            return self._extra[name][rows] if self._extra.shape(name) else self._extra[name]
        leaf, ours_, where = self._at[name]
        if not leaf:
            rows_, words = self.shape(name.removesuffix("_shape") + "_packed")
            return np.array([rows_, words * quant.PER_WORD], self._int4_shape)
        spec, array = self._specs[ours_], self._open[leaf][where] if where else self._open[leaf]
        if leaf != ours_ or (spec.contracted == 1 and array.ndim == 2):
            found = array[:, rows].read(order="F").result().T
        elif spec.contracted:
            whole = array.read(order="F").result()
            outs = range(spec.contracted, whole.ndim)
            published = whole.transpose(*outs, *range(spec.contracted))
            found = np.ascontiguousarray(published).reshape(spec.published_shape)[rows]
        else:
            found = array[rows].read().result()
        return found.view(quant.FP8) if leaf.endswith(".fp8") else found


def _open(params: Path, leaf: str) -> Any:
    import tensorstore as ts

    base = {"driver": "file", "path": f"{params}/"}
    if (params / "manifest.ocdbt").exists():
        store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{leaf}/"}
    else:
        store = {"driver": "file", "path": f"{params / leaf}/"}
    spec = {"driver": "zarr", "kvstore": store}
    try:
        return ts.open(spec, open=True, read=True, context=_context()).result()
    except Exception as error:
        raise ConfigError(f"{params / leaf} is damaged: {one_line(error, typed=True)}") from None


def _context() -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})
