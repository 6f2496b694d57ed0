"""Which reader a file needs: its suffix says, or its content where the suffix does not."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from k2jax.config import ConfigError, one_line
from k2jax.data.optional import import_optional
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign

TEXT = (".txt", ".text", ".md", ".rst", ".py")
LINES = (".jsonl", ".ndjson")
CELLS = (".csv", ".tsv")
ARROW = (".arrow", ".feather")
ARRAY_RECORD = (".arrayrecord", ".array_record")
RECORDS = (*LINES, ".json", *CELLS, ".parquet", *ARROW, *ARRAY_RECORD)
KINDS = (*TEXT, *RECORDS)
PACKED = (".gz", ".zst", ".xz", ".bz2")
PACKABLE = (*TEXT, *LINES, ".json", *CELLS)
SOUGHT = (*LINES, ".parquet", *ARRAY_RECORD)  # a share is read without reading the rest
HEAD = 1 << 16  # bytes that are looked at to know a file
LARGEST_FIRST = 1 << 24  # bytes in which the first record of a JSON file must end

_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\0": ".xz",
    b"BZh": ".bz2",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"PK\x03\x04": ".zip",
    b"%PDF-": ".pdf",
}
_MAGICS = tuple(_MAGIC)
_WIDE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8
LFS = b"version https://git-lfs.github.com/spec/"
REMEDY = "convert it to UTF-8 first, as with iconv -f ENCODING -t utf-8"


_NOUNS = {
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".arrayrecord": "ArrayRecord",
    ".array_record": "ArrayRecord",
}


class Form(NamedTuple):
    """How a file is read.

    Attributes:
        kind: one of KINDS; ".txt" for any text, "" for what is not read.
        packing: one of PACKED, or "".
    """

    kind: str
    packing: str = ""


def form_by_name(file: Path) -> Form:
    """What a file's suffixes say; the kind is "" where they say nothing."""
    stem, suffix = os.path.splitext(file.name.lower())
    packing = suffix if suffix in PACKED else ""
    suffix = os.path.splitext(stem)[1] if packing else suffix
    return Form(suffix if suffix in (PACKABLE if packing else KINDS) else "", packing)


def form_of(file: Path) -> Form:
    """What a file's suffixes say, or its content where they say nothing.

    Raises:
        ConfigError: it is no text and none of the kinds that are read.
    """
    form = form_by_name(file)
    if form.kind:
        return form
    packing = form.packing
    magic = find_magic(read_head(file, "", 16))
    if magic in PACKED:
        packing = magic
    elif magic in KINDS:
        return Form(magic)
    with explain(file):
        head = read_head(file, packing)
    try:
        check_text(head, file)
    except ConfigError as error:
        raise ConfigError(f"{error}; read are {describe_kinds()}") from None
    begins = head.removeprefix(MARK).lstrip()[:1]
    is_json = begins in (b"{", b"[") and isinstance(first_record(file, packing), dict)
    return Form(".json" if is_json else ".txt", packing)


@contextlib.contextmanager
def explain(file: Path) -> Iterator[None]:
    """Turn what goes wrong with a file's content into one line that names the file."""
    try:
        yield
    except ConfigError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ConfigError(f"{file} is damaged or cut short: {one_line(error)}") from None
    except csv.Error as error:
        raise ConfigError(f"{file} is no CSV file: {one_line(error)}") from None
    except (OSError, ValueError, RuntimeError, LookupError, MemoryError) as error:
        if getattr(error, "filename", None):
            raise  # the system's: no such file, no permission
        if "too much memory for decoding" in str(error):
            raise ConfigError(
                f"{file} was compressed with a long window, which is not read here; unpack it"
                f" first: zstd -d --long=31 {file}"
            ) from None
        foreign = describe_foreign(read_head(file, "", FOREIGN_BYTES))
        if foreign and not form_by_name(file).packing:
            raise ConfigError(f"{file} is {foreign}") from None
        noun = _NOUNS.get(form_by_name(file).kind, f"readable {file.suffix}")
        raise ConfigError(f"{file} is no {noun} file, or damaged: {one_line(error)}") from None


def dialect(kind: str) -> str:
    """How the csv package calls a kind of CELLS."""
    return "excel-tab" if kind == ".tsv" else "excel"


def describe_kinds() -> str:
    """The kinds, for messages."""
    return f"{' '.join(KINDS)}, and text and JSON also as {' '.join(PACKED)}"


def find_magic(head: bytes) -> str:
    """The suffix that the first bytes of a file ask for, or ""."""
    if not head.startswith(_MAGICS):
        return ""
    return next(suffix for magic, suffix in _MAGIC.items() if head.startswith(magic))


def unpack(file: Path, packing: str) -> IO[bytes]:
    """Open a file for reading, unpacked."""
    if packing == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if packing == ".xz":
        return lzma.open(file, "rb")
    if packing == ".bz2":
        return bz2.open(file, "rb")
    if packing == ".zst":
        arrow = import_optional("pyarrow", "pip install 'k2jax[parquet]'")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd"))
    return file.open("rb")


def read_head(file: Path, packing: str, size: int = HEAD) -> bytes:
    """The first bytes of a file, unpacked."""
    with unpack(file, packing) as raw:
        return raw.read(size)


def check_text(head: bytes, file: Path) -> None:
    """See that the first bytes of a file are UTF-8.

    Single bytes may be wrong: they are replaced and counted. More than one in a hundred says that
    the file is in another encoding, or no text.

    Raises:
        ConfigError: they are not; the message says what they are.
    """
    magic = find_magic(head)
    if not magic and head.isascii() and b"\0" not in head:
        return
    wide = next((name for mark, name in _WIDE.items() if head.startswith(mark)), "")
    if wide:
        raise ConfigError(f"{file} is {wide}; {REMEDY}")
    if magic:
        raise ConfigError(f"{file} is no text, but a {magic} file by its first bytes")
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start >= len(head) - 3 and len(head) == HEAD:
            return  # the head ends within a character
        text = head.decode("utf-8", "replace")
        where = f"byte {error.start} is 0x{head[error.start]:02x}"
    else:
        if b"\0" not in head:
            return
        where = f"byte {head.find(0)} is NUL"
    wrong = text.count("\ufffd") - head.count("\ufffd".encode()) + text.count("\0")
    if wrong * 100 > len(head) and (wrong > 16 or wrong * 3 >= len(head)):
        raise ConfigError(f"{file} is no UTF-8 text: {where}, and {wrong} more like it; {REMEDY}")


def refuse_pointer(file: Path) -> None:
    """See that a file is the data, not what Git LFS leaves in its place.

    Raises:
        ConfigError: it is a pointer.
    """
    if read_head(file, "", len(LFS)) == LFS:
        raise ConfigError(f"{file} is {describe_foreign(LFS)}")


def first_record(file: Path, packing: str) -> Any:
    """The first record of a JSON file: of its array, or of its lines; None: there is none."""
    size = HEAD
    while True:
        head = read_head(file, packing, size)
        text = head.removeprefix(MARK).decode("utf-8", "replace").lstrip()
        text = text[1:].lstrip() if text.startswith("[") else text
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except (ValueError, RecursionError):
            if len(head) < size or size >= LARGEST_FIRST:
                return None
        size *= 8


def is_array(file: Path, packing: str) -> bool:
    """Whether a JSON file is one array, to be read at once."""
    with explain(file):
        return read_head(file, packing).removeprefix(MARK).lstrip().startswith(b"[")
