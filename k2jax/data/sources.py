"""Documents: Python's standard library by default, or any files of text or of records.

A document's name decides whether it is held out, never its content or its neighbours.
"""

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.config import ConfigError, nearest
from k2jax.data import kinds, readers
from k2jax.data.readers import Share
from k2jax.data.tally import Tally
from k2jax.data.values import FIELD, Chat, Value
from k2jax.data.walk import TOKENS, WORK, LeftOut, Walk, describe

STDLIB = "stdlib"
HELD_OUT_ONE_IN = 25
DICT = "dataset_dict.json"  # in a folder of folders of the datasets package
# Of the standard library are no part: tests, what is not its own, and what is written when Python
# is built.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


class Document(NamedTuple):
    """One text with a name that does not depend on where the source lies."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read, in a fixed order.

    Attributes:
        title: the path that was opened.
        root: folder of the files, or the only file.
        files: in order.
        field: of records that have the text.
        left_out: what of a folder is not read.
    """

    title: str
    root: Path
    files: tuple[Path, ...]
    field: str = FIELD
    left_out: tuple[LeftOut, ...] = ()

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Every document that has text, in order; reads the files again each time.

        Raises:
            ConfigError: one is a conversation, or cannot be read.
        """
        for file in self.files:
            for name, value in self.records(file, tally=tally):
                if isinstance(value, Chat):
                    raise ConfigError(
                        f"{name} is a conversation; make tokens of it first:"
                        f" k2jax data {self.title} DST --tokenizer FILE"
                    )
                yield Document(name, value)

    def records(
        self, file: Path, share: Share = readers.WHOLE, tally: Tally | None = None
    ) -> Iterator[tuple[str, Value]]:
        """Names and values of what is not empty in a file, or in a share of it.

        Args:
            file: one of `files`.
            share: of its records.
            tally: to count what is empty or replaced.
        """
        name, tally = self.name(file), tally or Tally()
        values: Iterator[tuple[int, Value]]
        if readers.has_records(file):
            values = readers.read(file, self.field, share, tally)
        elif file == self.root:
            values = readers.read_blocks(file, share, tally)
        else:
            if text := readers.read_text(file, tally):
                yield name, text
            else:
                tally.empty += 1
            return
        for place, value in values:
            if value:
                yield f"{name}:{place}", value
            else:
                tally.empty += 1

    def describe_left_out(self) -> str:
        """One line on what of the folder is not read; "" where all is."""
        words = describe(self.left_out)
        return f"{self.title}: {words}" if words else ""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written; reads no file."""
        stats = [(self.name(file), file.stat()) for file in self.files]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        python = platform.python_version() if self.title == STDLIB else ""
        return hashlib.sha256(repr((str(self.root), python, facts)).encode()).hexdigest()

    def name(self, file: Path) -> str:
        """What the documents of a file are called after."""
        if self.title == STDLIB:
            return module_name(file.relative_to(self.root))
        return file.name if file == self.root else file.relative_to(self.root).as_posix()


def find(path: str, field: str = "text") -> Source:
    """The documents at `path`, or Python's standard library where it is empty or "stdlib".

    Args:
        path: a text file, a folder of text files (.txt .md .rst .py) and shards, or a shard:
            .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow (a folder of the datasets package),
            .arrayrecord (texts, or JSON records). What is no table of these may be compressed
            (.gz .zst .xz .bz2). A single file of another name is known by its content.
        field: of JSON records, and column of tables, that has the text.

    Raises:
        ConfigError: nothing there, or nothing in it that can be read.
    """
    if path in ("", STDLIB):
        return _find_stdlib(Path(sysconfig.get_path("stdlib")))
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"no data at {path}{_describe_near(root)}")
    if root.is_dir():
        source = _find_in_folder(path, root, field)
    elif root.is_file():
        source = Source(path, root, (root,), field)
    else:
        raise ConfigError(f"{path} is no regular file; data is read more than once, so save it")
    if not any(file.stat().st_size for file in source.files):
        raise ConfigError(f"data at {path} is empty")
    if root.is_file():
        kinds.form_of(root)  # is it of a kind that is read?
    return source


def _find_in_folder(path: str, root: Path, field: str) -> Source:
    if (root / TOKENS).is_file() or (root / WORK).is_dir():
        raise ConfigError(f"{path} holds tokens, not text; train on it: --data.path {path}")
    if (root / DICT).is_file():
        parts = ", ".join(sorted(part.name for part in root.iterdir() if part.is_dir()))
        raise ConfigError(f"folder {path} holds the splits {parts}; name one of them")
    walk = Walk(root, field)
    if not walk.files:
        rest = f"; {words}" if (words := describe(walk.left_out)) else ""
        raise ConfigError(
            f"folder {path} has no data files; it may hold {kinds.describe_kinds()}{rest}"
        )
    return Source(path, root, tuple(walk.files), field, walk.left_out)


def held_out(name: str, one_in: int = HELD_OUT_ONE_IN) -> bool:
    """Whether the document of that name is kept from training: one name in 25, by its hash."""
    return _hash(name) % one_in == 0


class Split(NamedTuple):
    """Which documents are held out, by name and in order, and how much the others hold."""

    heldout: tuple[str, ...]
    train_characters: int
    tally: Tally


def split(source: Source) -> Split:
    """Read the source once and keep from training what `held_out` picks, else the first by hash.

    Raises:
        ConfigError: fewer than two documents, so that one side would be empty.
    """
    tally = Tally()
    sizes = {name: len(text) for name, text in source.documents(tally)}
    if len(sizes) < 2:
        raise ConfigError(
            f"data at {source.title} has {len(sizes)} document(s) with text; training and "
            "held-out text need at least one each"
        )
    chosen = tuple(name for name in sizes if held_out(name))
    if not 0 < len(chosen) < len(sizes):
        chosen = (min(sizes, key=_hash),)
    return Split(chosen, sum(sizes.values()) - sum(sizes[name] for name in chosen), tally)


def module_name(file: Path) -> str:
    """Dotted name of a module file: `asyncio/tasks.py` is asyncio.tasks, a package its folder."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big"
    )


def _describe_near(path: Path) -> str:
    if not path.parent.is_dir():
        hub = not path.is_absolute() and len(path.parts) == 2
        return "; only local files are read: save that dataset and name its folder" if hub else ""
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; {near}" if near.startswith("did you mean") else ""


def _find_stdlib(root: Path) -> Source:
    files = tuple(file for file in _walk_stdlib(root) if file.suffix == ".py")
    if not files:
        raise ConfigError(f"no standard library source under {root}; give a path as data")
    return Source(STDLIB, root, files)


def _walk_stdlib(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if _is_library(name))
        yield from (Path(folder, name) for name in sorted(files) if _is_library(name))


def _is_library(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith((".", *_SKIPPED_PREFIXES))
