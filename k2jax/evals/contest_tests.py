"""Tests of contest problems: reading them, and comparing what a program says with them.

Private tests are published as base64 of zlib of a pickled text. A pickle may run code when it is
loaded; here only its text is taken, by reading its instructions.
"""

import base64
import binascii
import json
import pickletools
import zlib
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from k2jax.config import ConfigError

MOST = 1 << 30  # bytes of a problem's tests
# What a pickled text consists of: its version, the text, where it is remembered, the end.
TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


class Case(NamedTuple):
    """One test of a problem.

    Attributes:
        input: standard input, or the arguments of a call, one JSON value a line.
        output: what is expected on standard output, or as value.
        kind: "stdin" or "functional".
    """

    input: str
    output: str
    kind: str


def read_cases(text: str, place: str) -> list[Case]:
    """Tests from a JSON list, or from its compressed form.

    Args:
        text: the field of the file.
        place: for messages.

    Raises:
        ConfigError: it is neither.
    """
    if not text.lstrip().startswith("["):
        text = _unpack(text, place)
    try:
        return [_make_case(one) for one in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{place} has malformed tests: {error}") from None


def _make_case(fields: dict[str, Any]) -> Case:
    kind = fields.get("testtype", "stdin")
    if kind not in ("stdin", "functional"):
        raise ValueError(f"'testtype' is {kind!r}; it must be 'stdin' or 'functional'")
    return Case(str(fields["input"]), str(fields["output"]), kind)


def _unpack(text: str, place: str) -> str:
    try:
        packed = zlib.decompressobj()
        data = packed.decompress(base64.b64decode(text, validate=True), MOST)
        if packed.unconsumed_tail:
            raise ConfigError(f"{place} has more than {MOST >> 30} GB of tests")
        return read_pickled_text(data)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ConfigError(f"{place} has tests that cannot be unpacked: {error}") from None


def read_pickled_text(data: bytes) -> str:
    """The text that a pickle holds; nothing is loaded or run.

    Raises:
        ValueError: it holds anything else than one text.
    """
    texts = []
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name in TEXTS:
            texts.append(argument)
        elif instruction.name not in HARMLESS:
            raise ValueError(f"the pickle has {instruction.name}, and only a text is read")
    if len(texts) != 1:
        raise ValueError(f"the pickle has {len(texts)} texts, not one")
    return str(texts[0])


def is_same_output(printed: str, expected: str) -> bool:
    """Whether lines agree: as texts without blanks at their ends, or number by number."""
    ours, theirs = (
        [line.strip() for line in text.strip().split("\n")] for text in (printed, expected)
    )
    if len(ours) != len(theirs):
        return False
    return all(a == b or _are_same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _are_same_numbers(ours: str, theirs: str) -> bool:
    a, b = (_read_numbers(line) for line in (ours, theirs))
    return a is not None and a == b


def _read_numbers(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def is_same_value(printed: str, expected: str) -> bool:
    """Whether two JSON values are equal."""
    try:
        return bool(json.loads(printed) == json.loads(expected))
    except ValueError:
        return False
