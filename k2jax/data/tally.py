"""What reading replaces and passes over, counted."""

import json
import re
from dataclasses import dataclass
from typing import Any

from k2jax.text.unicode import replace_surrogates_in

_LONE = re.compile("[\ud800-\udfff]")


@dataclass
class Tally:
    """Counts of one reading.

    Attributes:
        replaced: characters that became U+FFFD, since their bytes are no UTF-8.
        replaced_at: where the first of them is.
        empty: records and files without text.
        untaught: conversations of which no token is learned.
    """

    replaced: int = 0
    replaced_at: str = ""
    empty: int = 0
    untaught: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        """Both, the first places being `self`'s."""
        return Tally(
            self.replaced + other.replaced,
            self.replaced_at or other.replaced_at,
            self.empty + other.empty,
            self.untaught + other.untaught,
        )

    def decode(self, raw: bytes, where: str) -> str:
        """UTF-8 bytes as text; what is no UTF-8 is replaced and counted."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "replace")
        self._count(text.count("\ufffd") - raw.count("\ufffd".encode()), where)
        return text

    def mend(self, text: str, where: str) -> str:
        """Text that was decoded with "surrogateescape", its wrong bytes replaced and counted."""
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            return self.decode(text.encode("utf-8", "surrogateescape"), where)
        return text

    def mend_record(self, record: Any, line: bytes | str, where: str) -> Any:
        """A JSON record, half surrogate pairs in it replaced and counted.

        Args:
            record: parsed from `line`.
            line: tells at once that there are none.
            where: for people.
        """
        if isinstance(record, dict) and all(map(_is_plain, record.values())):
            return record
        raw = line if isinstance(line, bytes) else line.encode("utf-8", "replace")
        if b"\\ud" not in raw and b"\\uD" not in raw:
            return record
        self._count(len(_LONE.findall(json.dumps(record, ensure_ascii=False))), where)
        return replace_surrogates_in(record)

    def describe(self) -> list[str]:
        """What is worth saying, in a few words each."""
        return [
            words
            for count, words in (
                (self.empty, f"{self.empty:,} records or files without text"),
                (
                    self.replaced,
                    f"{self.replaced:,} characters that are no UTF-8 replaced by"
                    f" U+FFFD, the first in {self.replaced_at}",
                ),
                (self.untaught, f"{self.untaught:,} conversations that teach nothing"),
            )
            if count
        ]

    def _count(self, count: int, where: str) -> None:
        if count:
            self.replaced += count
            self.replaced_at = self.replaced_at or where


def _is_plain(value: Any) -> bool:
    """Whether a member has no half pair, as far as that is seen at once."""
    return value.isascii() if isinstance(value, str) else not isinstance(value, list | dict)
