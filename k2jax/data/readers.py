"""Records of one file, whole or a share of it: lines, rows, entries, or stretches of a text.

Several processes may read one file, each its share. JSON lines, Parquet and ArrayRecord are sought
into; what can only be read from its beginning (compressed files, lone text, Arrow streams) every
process reads, and takes every n-th stretch of. A record's place does not depend on the shares.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from k2jax.config import ConfigError, one_line
from k2jax.data import kinds, tables
from k2jax.data.kinds import Form, form_of
from k2jax.data.optional import import_optional
from k2jax.data.tally import Tally
from k2jax.data.values import FIELD, Value, is_record, to_value

BLOCK = 16_384  # characters: a lone text file becomes documents of about this size
RECORDS = 1_024  # ArrayRecord entries read at once
RULES = 2  # of what is read and how; changes when the same files give other documents
STRETCH = 64  # records in a row that one process takes of what every process reads


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
Records = Iterator[tuple[int, Value]]


class _Job(NamedTuple):
    """What a reader is to read, and how."""

    file: Path
    form: Form
    field: str
    share: Share
    tally: Tally


def is_sought(file: Path) -> bool:
    """Whether a share is read without reading the rest of the file."""
    form = form_of(file)
    return form.kind in kinds.SOUGHT and not form.packing


def is_whole(file: Path) -> bool:
    """Whether a file is read at once whatever the share: a JSON array."""
    form = form_of(file)
    return form.kind == ".json" and kinds.is_array(file, form.packing)


def has_records(file: Path) -> bool:
    """Whether a file is made of records; else it is a text."""
    return form_of(file).kind in READERS


def describe_place(file: Path, place: int) -> str:
    """What the record at `place` is called in messages."""
    return f"line {place + 1}" if form_of(file).kind in kinds.LINES else f"record {place}"


def read(
    file: Path, field: str = FIELD, share: Share = WHOLE, tally: Tally | None = None
) -> Records:
    """Records with their places in the file: texts, or conversations where there are `messages`.

    Raises:
        ConfigError: the file is damaged, cut short or of another kind, or a record is neither.
    """
    with kinds.explain(file):
        job = _Job(file, form_of(file), field, share, tally or Tally())
        kinds.refuse_pointer(file)
        yield from READERS[job.form.kind](job)


def read_blocks(
    file: Path, share: Share = WHOLE, tally: Tally | None = None
) -> Iterator[tuple[int, str]]:
    """Stretches of a text of about BLOCK characters, each to the end of a line."""
    tally = tally or Tally()
    kinds.refuse_pointer(file)
    with kinds.explain(file), _open_text(file, form_of(file).packing) as lines:
        place = 0
        while text := lines.read(BLOCK):
            # To the end of the line, unless that is far away.
            text += lines.readline(BLOCK)
            if share.has(place):
                yield place, tally.mend(text, str(file))
            place += 1


def read_text(file: Path, tally: Tally | None = None) -> str:
    """A text file as one document."""
    with kinds.explain(file), kinds.unpack(file, form_of(file).packing) as raw:
        content = raw.read()
    if content.startswith(kinds.LFS):
        kinds.refuse_pointer(file)
    kinds.check_text(content[: kinds.HEAD], file)
    return (tally or Tally()).decode(content.removeprefix(kinds.MARK), str(file))


def _open_text(file: Path, packing: str) -> io.TextIOWrapper:
    """A text from behind its mark on; bytes that are no UTF-8 are for `Tally.mend`."""
    kinds.check_text(kinds.read_head(file, packing), file)
    raw = kinds.unpack(file, packing)
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_lines(job: _Job) -> Iterator[tuple[int, bytes]]:
    """Lines of a share with their numbers from 0; a line belongs to where it begins."""
    file, share = job.file, job.share
    kinds.check_text(kinds.read_head(file, job.form.packing), file)
    with kinds.unpack(file, job.form.packing) as lines:
        if job.form.kind not in kinds.SOUGHT or job.form.packing:
            for number, line in enumerate(lines):
                if share.has(number):
                    yield number, line if number else line.removeprefix(kinds.MARK)
            return
        begin, end = share.of_range(file.stat().st_size)
        number = _seek_line(lines, begin) if begin else 0
        at = lines.tell()
        while at < end and (line := lines.readline()):
            yield number, line if number else line.removeprefix(kinds.MARK)
            at, number = at + len(line), number + 1


def _seek_line(lines: IO[bytes], begin: int) -> int:
    """Go to the first line that begins at `begin` or later; its number."""
    number = 0
    for start in range(0, begin - 1, 1 << 24):
        number += lines.read(min(1 << 24, begin - 1 - start)).count(b"\n")
    return number + lines.readline().endswith(b"\n")


def _read_jsonl(job: _Job) -> Records:
    for number, line in _read_lines(job):
        if not line.strip():
            continue
        where = f"{job.file} line {number + 1}"
        yield number, _parse(line, where, job)


def _parse(content: bytes, where: str, job: _Job) -> Value:
    try:
        record = json.loads(job.tally.decode(content, where))
        record = job.tally.mend_record(record, content, where)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise ConfigError(f"{where} is not JSON: {reason}") from None
    return to_value(record, job.field, where)


def _read_json(job: _Job) -> Records:
    """A file that is an array of records, one record, or lines of them."""
    file, packing = job.file, job.form.packing
    kinds.check_text(kinds.read_head(file, packing), file)
    if not kinds.is_array(file, packing) and not _is_one_object(file, packing):
        yield from _read_jsonl(job)
        return
    with kinds.unpack(file, packing) as raw:
        content = raw.read().removeprefix(kinds.MARK)
    try:
        records = json.loads(job.tally.decode(content, str(file)))
        records = job.tally.mend_record(records, content, str(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {one_line(error)}") from None
    alone = not isinstance(records, list)
    for place, record in enumerate([records] if alone else records):
        if job.share.has(place):
            where = str(file) if alone else f"{file} record {place}"
            yield place, to_value(record, job.field, where)


def _is_one_object(file: Path, packing: str) -> bool:
    """Whether a JSON file is an object over several lines."""
    with kinds.unpack(file, packing) as lines:
        for line in lines:
            if content := line.removeprefix(kinds.MARK).strip():
                try:
                    return not isinstance(json.loads(content), dict)
                except (ValueError, RecursionError):
                    return True
    return False


def _read_cells(job: _Job) -> Records:
    """Rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    with _open_text(job.file, job.form.packing) as lines:
        rows = csv.reader(lines, kinds.dialect(job.form.kind), strict=True)
        names = next(rows, [])
        if job.field not in names:
            raise ConfigError(
                f'{job.file} has no column "{job.field}" in its first line, which has:'
                f" {', '.join(names) or 'nothing'}"
            )
        column = names.index(job.field)
        for place, row in enumerate(row for row in rows if row):
            where = f"{job.file} line {rows.line_num}"
            if len(row) != len(names):
                raise ConfigError(f"{where} has {len(row)} cells, the first line {len(names)}")
            if job.share.has(place):
                yield place, job.tally.mend(row[column], where)


def _read_array_record(job: _Job) -> Records:
    """Entries: texts, or JSON records where the first one is one."""
    array_record = import_optional(
        "array_record.python.array_record_module", "pip install 'k2jax[arrayrecord]'"
    )
    reader = array_record.ArrayRecordReader(os.fsencode(job.file))
    total = reader.num_records()
    if not total:  # also what the reader says of a file of another format
        raise ValueError("it has no records")
    first = reader.read(0, min(RECORDS, total))
    kinds.check_text(b"".join(first)[: kinds.HEAD], job.file)
    as_json = _holds_record(first[0], job.field)
    begin, end = job.share.of_range(total)
    for start in range(begin, end, RECORDS):
        for place, entry in enumerate(reader.read(start, min(start + RECORDS, end)), start):
            where = f"{job.file} record {place}"
            yield place, _parse(entry, where, job) if as_json else job.tally.decode(entry, where)


def _holds_record(entry: bytes, field: str) -> bool:
    try:
        return is_record(json.loads(entry), field)
    except (ValueError, RecursionError):
        return False


# Each yields records in order.
READERS: dict[str, Callable[[_Job], Records]] = {
    **dict.fromkeys(kinds.LINES, _read_jsonl),
    ".json": _read_json,
    **dict.fromkeys(kinds.CELLS, _read_cells),
    ".parquet": lambda job: tables.read_parquet(job.file, job.field, job.share, job.tally),
    **dict.fromkeys(
        kinds.ARROW, lambda job: tables.read_arrow(job.file, job.field, job.share, job.tally)
    ),
    **dict.fromkeys(kinds.ARRAY_RECORD, _read_array_record),
}
