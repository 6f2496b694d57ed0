"""Files of problems: JSON lines or one JSON list, gzipped or not; mistakes name the line."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.config import ConfigError, nearest


class Record(NamedTuple):
    """One object of a file.

    Attributes:
        place: "FILE, line N", for messages.
        fields: its members.
    """

    place: str
    fields: dict[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        """A member that is a text.

        Args:
            name: of the member.
            default: where it is absent or null; None: it must be there.

        Raises:
            ConfigError: it is absent, or no text; one line names the place.
        """
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            near = f"; {nearest(name, list(self.fields))}" if value is None else " as text"
            raise ConfigError(f"{self.place} has no {name!r}{near}")
        return value


def read_records(path: str | Path, needed: Sequence[str] = ()) -> list[Record]:
    """Read objects from JSON lines, or from one list.

    Args:
        path: the file; `.gz` is unpacked.
        needed: members that each must have as texts.

    Raises:
        ConfigError: the file is missing, empty or malformed; the line is named.
    """
    text = _read_text(Path(path))
    values = _values_of_list(path, text) if text[:1] == "[" else _values_of_lines(path, text)
    records = [_make_record(place, value) for place, value in values]
    if not records:
        raise ConfigError(f"{path} has no problems")
    for record in records:
        for name in needed:
            record.text(name)
    return records


def digest_files(*paths: str | Path, more: str = "") -> str:
    """SHA-256 over contents, in order, and over `more`: what else verdicts depend on."""
    digest = hashlib.sha256(more.encode())
    for path in paths:
        try:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()


def require_unique(ids: Sequence[str], path: str | Path) -> None:
    """Refuse a file that names two problems alike.

    Raises:
        ConfigError: names the id.
    """
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise ConfigError(f"{path} has two problems {one!r}")
        seen.add(one)


def _read_text(path: Path) -> str:
    try:
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file:
            return str(file.read()).lstrip()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _values_of_lines(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None


def _values_of_list(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    yield from ((f"{path}, entry {i}", value) for i, value in enumerate(values))


def _make_record(place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise ConfigError(f"{place} is not an object")
    return Record(place, value)
