"""The ledger of an evaluation: a header, and one JSON line for each sample.

Samples are appended as they end, and put in the order of the task at the end, so that the file does
not depend on the order in which they ended. A process that is killed leaves whole lines and
perhaps a torn one, which is dropped; whoever evaluates the same again goes on from there.
"""

import fcntl
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from k2jax.config import ConfigError
from k2jax.runtime.files import write_atomic

FORMAT = 1
Key = tuple[str, int]  # an item and the number of its sample
Record = dict[str, Any]


class Ledger:
    """The file of one evaluation, held by one process at a time.

    Attributes:
        path: of the file.
        records: samples that have ended, by item and number.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        """Begin the file, or go on with it.

        Args:
            path: of the file; its folder is made.
            header: what scores depend on: of another evaluation the file is refused.

        Raises:
            ConfigError: it belongs to another evaluation, is damaged, or another process has it.
        """
        self.path, self.header = path, {"k2jax_ledger": FORMAT, **header}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{path} is being written by another process") from None
        try:
            self.records = self._resume()
        except BaseException:
            self._file.close()
            raise

    def _resume(self) -> dict[Key, Record]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # killed while it wrote a line
            self._file.truncate(whole)
        if not whole:
            self._file.write(encode_line(self.header))
            return {}
        header, records = parse_ledger(self.path, content[:whole])
        difference = describe_difference(header, json.loads(json.dumps(self.header)))
        if difference:
            raise ConfigError(
                f"{self.path} belongs to another evaluation, {difference}; choose another --out"
            )
        return {(record["item"], record["sample"]): record for record in records}

    def add(self, record: Record) -> None:
        """Append a sample, once."""
        key = record["item"], record["sample"]
        if key in self.records:
            raise ValueError(f"sample {key} is in the ledger already")
        self.records[key] = record
        line = encode_line(record)
        while line:
            line = line[self._file.write(line) :]

    def finish(self, order: Sequence[Key]) -> None:
        """Put the samples in order; the file is the old or the new one at any moment."""
        ordered = [self.header, *(self.records[key] for key in order)]
        content = b"".join(map(encode_line, ordered))
        self._file.seek(0)
        if self._file.read() != content:
            write_atomic(self.path, content)

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()


def encode_line(value: Mapping[str, Any]) -> bytes:
    """Return one line of a ledger."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def read_ledger(path: str | Path) -> tuple[Record, list[Record]]:
    """Return the header and the samples of a ledger; a torn last line is left out.

    Raises:
        ConfigError: it is missing, or no ledger.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse_ledger(Path(path), content[: content.rfind(b"\n") + 1])


def parse_ledger(path: Path, content: bytes) -> tuple[Record, list[Record]]:
    """Return the header and the samples of whole lines.

    Raises:
        ConfigError: a line is no sample; it is named.
    """
    records: list[Record] = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ConfigError(f"{path}, line {number} is damaged: it is not JSON") from None
        if not isinstance(record, dict) or not _is_whole(record, number == 1):
            kind = "no ledger of an evaluation" if number == 1 else f"damaged in line {number}"
            raise ConfigError(f"{path} is {kind}")
        records.append(record)
    if not records:
        raise ConfigError(f"{path} is empty")
    return records[0], records[1:]


def _is_whole(record: Record, is_header: bool) -> bool:
    if is_header:
        return "k2jax_ledger" in record
    return isinstance(record.get("item"), str) and isinstance(record.get("sample"), int)


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in what two headers differ first; "" they do not."""
    for name, (here, there) in list_differences(new, old).items():
        return f"{name} is {_short(there)} there and {_short(here)} here"
    return ""


def list_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each name whose value differs between two headers, as `settings.samples`."""
    a, b = _flatten(a), _flatten(b)
    return {
        name: (a.get(name), b.get(name))
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    }


def _flatten(header: Mapping[str, Any]) -> dict[str, Any]:
    settings = header.get("settings")
    if not isinstance(settings, dict):
        return dict(header)
    inner = {f"settings.{name}": value for name, value in settings.items()}
    return {name: value for name, value in header.items() if name != "settings"} | inner


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
