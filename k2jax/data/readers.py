"""Records of one file, whole or a share of it: lines, Parquet and Arrow rows, ArrayRecord entries.

Several processes may read one file, each its share. JSON lines, Parquet and ArrayRecord are sought
into; what can only be read from its beginning (compressed files, lone text, Arrow streams) every
process reads, and takes every n-th stretch of. A record's place does not depend on the shares.
"""

import contextlib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from k2jax.config import ConfigError, one_line

TEXT = (".txt", ".text", ".md", ".rst", ".py")
PACKED = (".gz", ".zst")
BLOCK = 16_384  # characters: a lone text file becomes documents of about this size
RECORDS = 1_024  # ArrayRecord entries read at once
STRETCH = 64  # records in a row that one process takes of what every process reads


class Chat(NamedTuple):
    """A conversation, as `k2jax.text.messages` describes it."""

    messages: Any
    tools: Any


class Share(NamedTuple):
    """One of `of` equal parts of a file."""

    number: int = 0
    of: int = 1

    def has(self, place: int) -> bool:
        """Whether it takes the record at `place` of what every process reads."""
        return place // STRETCH % self.of == self.number

    def of_range(self, size: int) -> tuple[int, int]:
        """Its part of 0..size."""
        return size * self.number // self.of, size * (self.number + 1) // self.of


WHOLE = Share()
Value = str | Chat
Records = Iterator[tuple[int, Value]]


def kind(file: Path) -> str:
    """The suffix that says how a file is read, without that of its compression; "": no data."""
    name = file.with_suffix("") if file.suffix.lower() in PACKED else file
    suffix = name.suffix.lower()
    if suffix == ".json" and name != file:
        return ".jsonl"  # as the C4 corpus calls its lines
    packable = (*TEXT, ".jsonl")
    return suffix if suffix in (packable if name != file else KINDS) else ""


def is_sought(file: Path) -> bool:
    """Whether a share is read without reading the rest of the file."""
    sought = (".jsonl", ".parquet", ".arrayrecord", ".array_record")
    return kind(file) in sought and file.suffix.lower() not in PACKED


def read(file: Path, field: str = "text", share: Share = WHOLE) -> Records:
    """Records with their places in the file: texts, or conversations where there are `messages`.

    Raises:
        ConfigError: the file is damaged or cut short, or a record has none of them.
    """
    with _explained(file):
        yield from READERS[kind(file)](file, field, share)


def blocks(file: Path, share: Share = WHOLE) -> Iterator[tuple[int, str]]:
    """Stretches of a text of about BLOCK characters, each to the end of a line."""
    with (
        _explained(file),
        _unpacked(file) as raw,
        io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="") as lines,
    ):
        place = 0
        while text := lines.read(BLOCK):
            # To the end of the line, unless that is far away.
            text += lines.readline(BLOCK)
            if share.has(place):
                yield place, text
            place += 1


def whole_text(file: Path) -> str:
    """A text file as one document."""
    with _explained(file), _unpacked(file) as raw:
        return raw.read().decode("utf-8", errors="replace")


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{file} is damaged or cut short: {one_line(error)}") from None
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        if getattr(error, "filename", None):
            raise  # the system's: no such file, no permission
        noun = _NOUNS.get(kind(file), f"readable {file.suffix}")
        raise ConfigError(f"{file} is no {noun} file, or damaged: {one_line(error)}") from None


def _unpacked(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix.lower() == ".zst":
        arrow = module("pyarrow", "pip install 'k2jax[parquet]'")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd"))
    return file.open("rb")


def _lines(file: Path, share: Share) -> Iterator[tuple[int, bytes]]:
    """Lines of a share with their numbers from 0; a line belongs to where it begins."""
    with _unpacked(file) as lines:
        if not is_sought(file):
            yield from ((i, line) for i, line in enumerate(lines) if share.has(i))
            return
        begin, end = share.of_range(file.stat().st_size)
        number = _seek_line(lines, begin) if begin else 0
        at = lines.tell()
        while at < end and (line := lines.readline()):
            yield number, line
            at, number = at + len(line), number + 1


def _seek_line(lines: IO[bytes], begin: int) -> int:
    """Go to the first line that begins at `begin` or later; its number."""
    number = 0
    for start in range(0, begin - 1, 1 << 24):
        number += lines.read(min(1 << 24, begin - 1 - start)).count(b"\n")
    return number + lines.readline().endswith(b"\n")


def _read_jsonl(file: Path, field: str, share: Share) -> Records:
    for number, line in _lines(file, share):
        if not line.strip():
            continue
        where = f"{file} line {number + 1}"
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise ConfigError(f"{where} is not JSON: {said}") from None
        yield number, _value(record, field, where)


def _value(record: Any, field: str, where: str) -> Value:
    fields = record if isinstance(record, Mapping) else {}
    if isinstance(fields.get("messages"), list):
        return Chat(fields["messages"], fields.get("tools") or [])
    if isinstance(fields.get(field), str):
        return fields[field]
    found = ", ".join(fields) if fields else type(record).__name__
    raise ConfigError(f'{where} has no field "{field}" or "messages"; it has: {found}')


def _columns(names: list[str], field: str, file: Path) -> list[str]:
    if "messages" in names:
        return [name for name in ("messages", "tools") if name in names]
    if field not in names:
        raise ConfigError(
            f'{file} has no column "{field}" or "messages"; it has: {", ".join(names)}'
        )
    return [field]


def _rows(batch: Any, columns: list[str], file: Path, place: int) -> Records:
    """Rows of an Arrow batch. An empty cell keeps its place, so that names do not move."""
    for i, cells in enumerate(zip(*(batch[name].to_pylist() for name in columns), strict=True)):
        if cells[0] is None:
            yield place + i, ""
        elif columns[0] == "messages":
            yield place + i, Chat(cells[0], cells[-1] or [] if len(cells) > 1 else [])
        else:
            yield place + i, _as_text(cells[0])


def _read_parquet(file: Path, field: str, share: Share) -> Records:
    parquet = module("pyarrow.parquet", "pip install 'k2jax[parquet]'")
    table = parquet.ParquetFile(file)
    columns = _columns(table.schema_arrow.names, field, file)
    place = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if group % share.of == share.number:
            at = place
            for batch in table.iter_batches(1_024, row_groups=[group], columns=columns):
                yield from _rows(batch, columns, file, at)
                at += batch.num_rows
        place += count


def _read_arrow(file: Path, field: str, share: Share) -> Records:
    arrow = module("pyarrow", "pip install 'k2jax[parquet]'")
    importlib.import_module("pyarrow.ipc")
    with arrow.memory_map(str(file)) as source:
        try:
            batches: Any = arrow.ipc.open_stream(source)  # what the datasets package saves
        except arrow.ArrowInvalid:
            table = arrow.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        place = 0
        for number, batch in enumerate(batches):
            if number % share.of == share.number:
                yield from _rows(batch, _columns(batch.schema.names, field, file), file, place)
            place += batch.num_rows


def _read_array_record(file: Path, field: str, share: Share) -> Records:
    array_record = module(
        "array_record.python.array_record_module", "pip install 'k2jax[arrayrecord]'"
    )
    reader = array_record.ArrayRecordReader(str(file))
    total = reader.num_records()
    if not total:  # also what the reader says of a file of another format
        raise ValueError("it has no records")
    begin, end = share.of_range(total)
    for start in range(begin, end, RECORDS):
        records = reader.read(start, min(start + RECORDS, end))
        yield from ((start + i, _as_text(record)) for i, record in enumerate(records))


def _as_text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def module(name: str, remedy: str) -> ModuleType:
    """An optional package.

    Raises:
        ConfigError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(f"this data needs the package {package}: {remedy}") from None


# Called with a file, a field and a share; each yields records in order.
READERS: dict[str, Callable[[Path, str, Share], Records]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".arrayrecord": _read_array_record,
    ".array_record": _read_array_record,
}
KINDS = (*TEXT, *READERS)
_NOUNS = {
    ".parquet": "Parquet", ".arrow": "Arrow", ".arrayrecord": "ArrayRecord",
    ".array_record": "ArrayRecord",
}  # fmt: skip
