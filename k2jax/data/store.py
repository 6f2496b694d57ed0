"""Tokenised text on disk: one flat array and where its documents begin.

A document is stored as [BOS] tokens [EOS]. A finished store is a folder that appears by one
rename, so that a killed or a second process never leaves half of one.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from k2jax.config import ConfigError
from k2jax.data.stream import BEGIN, PADDING, UNSCORED
from k2jax.runtime.files import rename_durably
from k2jax.text.kimi_tokenizer import Tokenizer

FORMAT = 1  # part of every cache key: raise it when what is stored changes
BATCH = 128  # documents tokenised at once
STALE_SECONDS = 24 * 3600
_MARK = ".building-"


@dataclasses.dataclass(frozen=True)
class Store:
    """Documents as token ids.

    Attributes:
        tokens: all documents end to end, uint16 or int32 [tokens]; memory mapped when opened.
        offsets: where each document begins, int64 [documents + 1]; the last is len(tokens).
        bytes: UTF-8 bytes of all documents; of conversations, of what the assistant said.
        unscored: tokens that nothing is learned from predicting, bool [tokens]; None: there are
            none but those that begin a document.
        whole: documents are laid into rows whole, as conversations are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    bytes: int
    unscored: np.ndarray | None = None
    whole: bool = False

    @property
    def size(self) -> int:
        """How many tokens."""
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, with its [BOS] and [EOS]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Text of every document, exactly as it was read; of conversations, what is scored."""
        control = np.fromiter(tokenizer.specials.values(), np.int64)
        for index in range(self.documents):
            ids = self.document(index)
            kept = ~np.isin(ids, control)
            if self.unscored is not None:
                kept &= ~self.unscored[self.offsets[index] : self.offsets[index + 1]]
            yield tokenizer.decode(ids[kept])

    def cut(self, begin: np.ndarray, length: int) -> np.ndarray:
        """Stretches of the stream of documents; see `k2jax.data.stream.Stream`."""
        words = np.full((len(begin), length), PADDING)
        for row, first in zip(words, begin.tolist(), strict=True):
            low, high = max(first, 0), max(min(first + length, self.size), 0)
            inside = row[low - first : max(high - first, low - first)]
            inside[:] = self.tokens[low:high] if len(inside) else 0
            if self.unscored is not None:
                inside[self.unscored[low:high]] |= UNSCORED
            at = np.searchsorted(self.offsets, [low, high])
            inside[self.offsets[at[0] : at[1]] - low] |= BEGIN
        return words


def write(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Store:
    """Tokenise `texts` into `path`.tokens, `path`.offsets.npy and `path`.json, a batch at a time.

    Returns:
        The store, opened again from its files.
    """
    dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.int32
    lengths, offsets, size = tokenizer.byte_lengths(), [0], 0
    texts = iter(texts)
    with path.with_suffix(".tokens").open("wb") as file:
        while batch := list(islice(texts, BATCH)):
            for ids in tokenizer.encode_batch(batch):
                document = np.array([tokenizer.bos, *ids, tokenizer.eos], dtype)
                document.tofile(file)
                offsets.append(offsets[-1] + len(document))
                size += int(lengths[document].sum())
    np.save(path.with_suffix(".offsets.npy"), np.array(offsets, np.int64))
    facts = {"tokens": offsets[-1], "bytes": size, "dtype": np.dtype(dtype).name}
    path.with_suffix(".json").write_text(json.dumps(facts))
    return read(path)


def read(path: Path) -> Store:
    """Open what `write` wrote.

    Raises:
        OSError, ValueError: files are missing or damaged.
    """
    facts = json.loads(path.with_suffix(".json").read_text())
    offsets = np.load(path.with_suffix(".offsets.npy"), allow_pickle=False)
    file = path.with_suffix(".tokens")
    size = facts["tokens"] * np.dtype(facts["dtype"]).itemsize
    if file.stat().st_size != size or offsets[-1] != facts["tokens"]:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; {size} were written")
    tokens = np.memmap(file, facts["dtype"], "r") if size else np.zeros(0, facts["dtype"])
    return Store(tokens, offsets, facts["bytes"])


def cached(
    cache: Path, key: str, build: Callable[[Path], None], check: Callable[[Path], object]
) -> Path:
    """The folder `key` of `cache`, built if it is not there.

    Args:
        cache: a folder, made if needed.
        key: name of the folder; says everything its content depends on.
        build: fills an empty folder.
        check: raises OSError or ValueError where the folder is damaged; it is then built again.

    Raises:
        ConfigError: the cache cannot be written (no space, no permission).
    """
    folder = cache / key
    if folder.is_dir():
        try:
            check(folder)
            return folder
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        temporary = Path(tempfile.mkdtemp(prefix=_MARK, dir=cache))
    except OSError as error:
        raise _explain(cache, error) from None
    try:
        build(temporary)
        _publish(temporary, folder)
    except OSError as error:
        raise _explain(cache, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _publish(temporary: Path, folder: Path) -> None:
    temporary.chmod(0o755)
    try:
        rename_durably(temporary, folder)
    except OSError:
        # A folder cannot replace one with files in it: another process was first.
        if not folder.is_dir():
            raise


def _sweep(cache: Path) -> None:
    for left in cache.glob(f"{_MARK}*"):
        # It may be renamed or removed by its owner while we look.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _explain(cache: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(cache):
        return ConfigError(f"cannot read {os.fsdecode(error.filename)}: {reason}")
    return ConfigError(f"cannot write the data cache {cache}: {reason}; set K2JAX_CACHE elsewhere")
