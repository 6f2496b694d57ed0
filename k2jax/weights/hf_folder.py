"""A published folder: safetensors files, found by the index and never by a computed name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign
from k2jax.weights.safetensors import Data, Reader, near, once

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# K2.5 has its text model below this name, beside a vision tower [K25DUMP].
TEXT = "language_model."


class Remote(Protocol):
    """Weights that are not on this machine: `k2jax.weights.object_store.Bucket`."""

    names: list[str]  # of all files

    @property
    def weights(self) -> list[str]:
        """Names of safetensors files."""
        ...

    def ranges(self, name: str) -> Data:
        """A file's bytes."""
        ...

    def sha256(self, name: str) -> str:
        """A file's sum."""
        ...


class Folder:
    """The tensors of a published folder by name, `language_model.` removed, files kept open."""

    def __init__(self, path: str | Path, remote: Remote | None = None):
        """Read the index, or the header of the single file.

        Args:
            path: of the folder.
            remote: where its weights are, if not there too.

        Raises:
            ConfigError: neither is there, or it is malformed.
        """
        self.path, self.remote = Path(path), remote
        self._readers: dict[str, Reader] = {}
        index = self.path / INDEX
        if index.is_file():
            self.source, files = index, _weight_map(index)
        elif (self.path / SINGLE).is_file():
            self.source = self.path / SINGLE
            files = dict.fromkeys(self._reader(SINGLE), SINGLE)
        else:
            raise ConfigError(f"{path} has neither {INDEX} nor {SINGLE}")
        self._at = {name.removeprefix(TEXT): (file, name) for name, file in files.items()}
        if len(self._at) < len(files):
            twice = next(n for n in files if n.startswith(TEXT) and n.removeprefix(TEXT) in files)
            raise ConfigError(f"{self.source} has {twice!r} with and without {TEXT!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, name: object) -> bool:
        return name in self._at

    @property
    def files(self) -> list[str]:
        """The names of the files, in the order of their names."""
        return sorted({file for file, _ in self._at.values()})

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._at[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        file, full = self._at[name]
        return self._reader(file).shape(full)

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor in its file."""
        file, full = self._at[name]
        return self._reader(file).dtype(full)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor or some of its rows, mapped: bytes are read when they are used."""
        file, full = self._at[name]
        return self._reader(file).read(full, rows)

    def inspect(self) -> None:
        """Read every header and hold it against the index.

        Raises:
            ConfigError: a file or tensor that the index does not have, or has elsewhere; a file
                that is damaged or missing. One line names both.
        """
        placed: dict[str, set[str]] = {file: set() for file in self.files}
        for file, full in self._at.values():
            placed[file].add(full)
        for file, names in placed.items():
            found = set(self._reader(file))
            if missing := sorted(names - found):
                hint = near(missing[0], found)
                raise ConfigError(f"{self.path / file} has no tensor {missing[0]!r}{hint}")
            if extra := sorted(found - names):
                home = self._at.get(extra[0].removeprefix(TEXT))
                where = f"which the index has in {home[0]}" if home else "unknown to the index"
                raise ConfigError(f"{self.path / file} has the tensor {extra[0]!r}, {where}")
        there = self.remote.weights if self.remote else _names(self.path)
        stray = sorted(set(there) - set(placed))
        if stray:
            raise ConfigError(f"{self.path / stray[0]} is not in {self.source.name}")

    def notes(self) -> list[str]:
        """What is odd about the folder, but does no harm."""
        if self.source.name != INDEX:
            return []
        metadata = json.loads(self.source.read_text()).get("metadata")
        told = metadata.get("total_size") if isinstance(metadata, dict) else None
        size = sum(self._reader(file).size for file in self.files)
        return (
            []
            if told in (None, size)
            else [f"{INDEX} says total_size {told}; the tensors take {size} bytes"]
        )

    def headers(self) -> Iterator[str]:
        """One line for each file and tensor: where it is, what it is. For fingerprints."""
        for file in self.files:
            reader = self._reader(file)
            yield f"{file} {reader.bytes}"
            for name in reader:
                yield f"{name} {reader.dtype(name)} {reader.shape(name)}"

    def _reader(self, file: str) -> Reader:
        if file not in self._readers:
            if self.remote and file not in self.remote.weights:
                raise ConfigError(f"cannot read {self.path / file}: no such file")
            data = self.remote.ranges(file) if self.remote else None
            self._readers[file] = Reader(self.path / file, data)
        return self._readers[file]


def _names(path: Path) -> list[str]:
    return [file.name for file in path.glob("*.safetensors")]


def _weight_map(index: Path) -> dict[str, str]:
    content = b""
    try:
        content = index.read_bytes()
        files = json.loads(content, object_pairs_hook=once)["weight_map"]
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        foreign = describe_foreign(content[:FOREIGN_BYTES])
        unread = f"not a readable index of tensors: {one_line(error, typed=True)}"
        raise ConfigError(f"{index} is {foreign or unread}") from None
    plain = isinstance(files, dict) and all(
        isinstance(file, str) and Path(file).name == file and file.isprintable()
        for file in files.values()
    )
    if not plain:
        raise ConfigError(f"{index}: weight_map must map tensors to file names in this folder")
    return files
