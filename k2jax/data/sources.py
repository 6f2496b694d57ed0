"""Documents: Python's standard library by default, or any text, JSONL, Parquet or ArrayRecord.

A document's name decides whether it is held out, never its content or its neighbours.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from k2jax.config import ConfigError, nearest

STDLIB = "stdlib"
HELD_OUT_ONE_IN = 25
BLOCK = 16_384  # characters: a lone text file becomes documents of about this size
TEXT = (".txt", ".text", ".md", ".rst", ".py")
RECORDS = 1_024  # ArrayRecord entries read at once

# Tests, what is not the library's own, and what is written when Python is built.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


class Document(NamedTuple):
    """One text with a name that does not depend on where the source lies."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read, in a fixed order."""

    title: str
    root: Path
    files: tuple[Path, ...]

    def documents(self) -> Iterator[Document]:
        """Every document that has text, in order; reads the files again each time."""
        for file in self.files:
            for name, text in self._read(file):
                if text:
                    yield Document(name, text)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written; reads no file."""
        stats = [(self._name(file), file.stat()) for file in self.files]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        python = platform.python_version() if self.title == STDLIB else ""
        return hashlib.sha256(repr((str(self.root), python, facts)).encode()).hexdigest()

    def _name(self, file: Path) -> str:
        if self.title == STDLIB:
            return module_name(file.relative_to(self.root))
        return file.name if file == self.root else file.relative_to(self.root).as_posix()

    def _read(self, file: Path) -> Iterator[tuple[str, str]]:
        name = self._name(file)
        if reader := READERS.get(file.suffix.lower()):
            for index, text in enumerate(reader(file)):
                yield f"{name}:{index}", text
        elif file == self.root:
            for index, text in enumerate(_blocks(file)):
                yield f"{name}:{index}", text
        else:
            yield name, file.read_bytes().decode("utf-8", errors="replace")


def find(path: str) -> Source:
    """The documents at `path`, or Python's standard library where it is empty or "stdlib".

    Args:
        path: a text file, a folder of text files (.txt .md .rst .py) and shards, or a shard:
            .jsonl (field "text"), .parquet (column "text"), .arrayrecord (UTF-8 records).

    Raises:
        ConfigError: nothing there, or nothing in it that can be read.
    """
    if path in ("", STDLIB):
        return _find_stdlib(Path(sysconfig.get_path("stdlib")))
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"no data at {path}{_near(root)}")
    if not root.is_dir():
        source = Source(path, root, (root,))
    else:
        kinds = (*TEXT, *READERS)
        files = tuple(file for file in _walk(root) if file.suffix.lower() in kinds)
        if not files:
            raise ConfigError(f"folder {path} has no data files; it may hold {' '.join(kinds)}")
        source = Source(path, root, files)
    if not any(file.stat().st_size for file in source.files):
        raise ConfigError(f"data at {path} is empty")
    return source


def held_out(name: str) -> bool:
    """Whether the document of that name is kept from training: one name in 25, by its hash."""
    return _hash(name) % HELD_OUT_ONE_IN == 0


class Split(NamedTuple):
    """What `split` found: held-out documents by name, in order, and how much the others hold."""

    heldout: tuple[str, ...]
    train_characters: int


def split(source: Source) -> Split:
    """Read the source once and keep from training what `held_out` picks, else the first by hash.

    Raises:
        ConfigError: fewer than two documents, so that one side would be empty.
    """
    sizes = {name: len(text) for name, text in source.documents()}
    if len(sizes) < 2:
        raise ConfigError(
            f"data at {source.title} has {len(sizes)} document(s) with text; training and "
            "held-out text need at least one each"
        )
    chosen = tuple(name for name in sizes if held_out(name))
    if not 0 < len(chosen) < len(sizes):
        chosen = (min(sizes, key=_hash),)
    return Split(chosen, sum(sizes.values()) - sum(sizes[name] for name in chosen))


def module_name(file: Path) -> str:
    """Dotted name of a module file: `asyncio/tasks.py` is asyncio.tasks, a package its folder."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; {near}" if near.startswith("did you mean") else ""


def _find_stdlib(root: Path) -> Source:
    files = tuple(file for file in _walk(root) if file.suffix == ".py")
    if not files:
        raise ConfigError(f"no standard library source under {root}; give a path as data")
    return Source(STDLIB, root, files)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if _wanted(name))
        yield from (Path(folder, name) for name in sorted(files) if _wanted(name))


def _wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith((".", *_SKIPPED_PREFIXES))


def _blocks(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        while text := lines.read(BLOCK):
            # To the end of the line, unless that is far away.
            yield text + lines.readline(BLOCK)


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{file} line {number} is not JSON: {error.msg}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ConfigError(f'{file} line {number} has no field "text"; it has: {fields}')
            yield record["text"]


def _read_parquet(file: Path) -> Iterator[str]:
    parquet = _module("pyarrow.parquet", "pip install 'k2jax[parquet]'")
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ConfigError(f"{file} is no Parquet file: {_first_line(error)}") from None
    if "text" not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise ConfigError(f'{file} has no column "text"; it has: {columns}')
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            # An empty cell keeps its place, so that names do not move.
            yield "" if text is None else _as_text(text)


def _read_array_record(file: Path) -> Iterator[str]:
    module = _module("array_record.python.array_record_module", "pip install 'k2jax[arrayrecord]'")
    try:
        reader = module.ArrayRecordReader(str(file))
        total = reader.num_records()
        if not total:  # also what the reader says of a file of another format
            raise ValueError("it has no records")
        for start in range(0, total, RECORDS):
            for record in reader.read(start, min(start + RECORDS, total)):
                yield _as_text(record)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"{file} is no ArrayRecord file: {_first_line(error)}") from None


def _as_text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _module(name: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(f"this data needs the package {package}: {remedy}") from None


# Called with a file; each yields the text of its records in order.
READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrayrecord": _read_array_record,
    ".array_record": _read_array_record,
}
