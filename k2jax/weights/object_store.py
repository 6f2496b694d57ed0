"""A published folder in object storage: tensors by byte ranges, through tensorstore.

What is small is fetched into a folder on this machine, which is then read like any other; weights
stay where they are, and of each just the bytes that are asked for travel.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.weights.hf_folder import INDEX, SINGLE
from k2jax.weights.safetensors import Reader

REMOTE = ("gs://", "file://")
SUFFIX = ".safetensors"
WINDOW = 2**26  # bytes that are summed at a time
# Some 15 seconds of trouble are waited out; the same command goes on with what stopped.
RETRIES = {"gcs_request_retries": {"max_retries": 4}}


class Bucket:
    """The files of one folder in object storage."""

    def __init__(self, store: Any, url: str):
        """List them.

        Args:
            store: a `tensorstore.KvStore` of the folder.
            url: for messages.

        Raises:
            ConfigError: it cannot be read, or nothing is there.
        """
        self._store, self.url = store, url.rstrip("/")
        keys = [key.decode() for key in self._ask(store.list, self.url)]
        self.names = sorted(key for key in keys if key and "/" not in key)
        if not self.names:
            below = f"; {keys[0]} is further below" if keys else ""
            raise ConfigError(f"no files in {self.url}{below}")

    @classmethod
    def open(cls, url: str) -> "Bucket":
        """The bucket's folder that a URL names.

        Raises:
            ConfigError: as the constructor, or it is no such URL.
        """
        import tensorstore as ts

        context, folder = ts.Context(RETRIES), url if url.endswith("/") else f"{url}/"
        opened = cls._ask(lambda: ts.KvStore.open(folder, context=context), url)
        return cls(opened, url)

    @property
    def weights(self) -> list[str]:
        """Names of safetensors files."""
        return [name for name in self.names if name.endswith(SUFFIX)]

    def ranges(self, name: str) -> "Ranges":
        """A file's bytes."""
        return Ranges(self, name)

    def sha256(self, name: str) -> str:
        """A file's sum, read from end to end."""
        found, size = hashlib.sha256(), self._size(name)
        for begin in range(0, size, WINDOW):
            found.update(self.read(name, begin, min(begin + WINDOW, size)) or b"")
        return found.hexdigest()

    def _size(self, name: str) -> int:
        """Bytes of a file, by bisection: object stores are asked for bytes, not for sizes."""
        low, high = 0, 1  # the first is no more, the second more than the size
        while self.read(name, high - 1, high) is not None:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            there = self.read(name, middle - 1, middle) is not None
            low, high = (middle, high) if there else (low, middle)
        return low

    def fetch(self, folder: Path, wanted: Callable[[str], bool], largest: int) -> None:
        """Copy what is small, and write an index where there is one file without.

        Args:
            folder: to copy into.
            wanted: says by its name whether a file may matter.
            largest: bytes of a file that is copied.
        """
        for name in filter(wanted, self.names):
            if self.read(name, largest, largest + 1) is None:
                (folder / name).write_bytes(self.read(name) or b"")
        if SINGLE in self.names and INDEX not in self.names:
            tensors = dict.fromkeys(Reader(folder / SINGLE, self.ranges(SINGLE)), SINGLE)
            (folder / INDEX).write_text(json.dumps({"weight_map": tensors}))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes | None:
        """Bytes of a file; None where it ends before."""
        where = f"{self.url}/{name}"
        span = slice(begin, end)
        try:
            found = self._ask(lambda: self._store.read(name, byte_range=span), where)
        except _Beyond:
            return None
        if found.state != "value":
            raise ConfigError(f"{where} is missing")
        return bytes(found.value)

    @staticmethod
    def _ask(question: Callable[[], Any], where: str) -> Any:
        try:
            return question().result()
        except Exception as error:  # tensorstore tells kinds by words only
            text = one_line(error)
            if "OUT_OF_RANGE" in text:
                raise _Beyond from None
            raise ConfigError(f"cannot read {where}: {text}") from None


class _Beyond(Exception):
    """Bytes were asked for that a file does not have."""


class Ranges:
    """The bytes of one file, as `Reader` takes them; a slice past the end is empty."""

    def __init__(self, bucket: Bucket, name: str):
        self._bucket, self._name = bucket, name

    def __getitem__(self, span: slice) -> np.ndarray:
        found = self._bucket.read(self._name, span.start, span.stop)
        return np.frombuffer(found or b"", np.uint8)

    def size(self, expected: int) -> int:
        """Bytes of the file where they are as many as expected; else one less or one more.

        Asks whether the last one is there, and no other.
        """

        def ask(at):
            return self._bucket.read(self._name, at, at + 1) is not None

        if expected and not ask(expected - 1):
            return expected - 1
        return expected + ask(expected)


@contextlib.contextmanager
def fetched(
    source: str, wanted: Callable[[str], bool], largest: int
) -> Iterator[tuple[Path, Bucket | None]]:
    """The folder to read a source's small files from, and where its weights are, if not there too.

    Errors inside name the source, not the copy.

    Args:
        source: a path, or a URL that begins with one of REMOTE.
        wanted: as for `Bucket.fetch`.
        largest: as for `Bucket.fetch`.

    Raises:
        ConfigError: the source is elsewhere, or what `Bucket` raises.
    """
    if "://" in source and not source.startswith(REMOTE):
        raise ConfigError(f"{source} is not on this machine; of such, {REMOTE[0]} is read alone")
    if not source.startswith(REMOTE):
        yield Path(source), None
        return
    with tempfile.TemporaryDirectory(prefix="k2jax-") as copy:
        bucket = Bucket.open(source)
        try:
            bucket.fetch(Path(copy), wanted, largest)
            yield Path(copy), bucket
        except ConfigError as error:
            raise ConfigError(str(error).replace(copy, bucket.url)) from error
