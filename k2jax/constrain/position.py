"""Where in a JSON text its end is."""

import dataclasses

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_LIST, CLOSE_LIST = b"{}[]"
SPACE = frozenset(b" \t\r\n")


@dataclasses.dataclass
class Position:
    """Where in a JSON text its end is.

    Attributes:
        opened: brackets that are open, outermost first.
        names: of the last member of each, raw; b"" in lists.
        inside: "" between tokens, "string", "name" or "scalar".
        after_colon: a member's value comes next.
        written: bytes of the string or scalar so far.
    """

    opened: bytearray = dataclasses.field(default_factory=bytearray)
    names: list[bytes] = dataclasses.field(default_factory=list)
    inside: str = ""
    after_colon: bool = False
    escaped: bool = False
    written: bytearray = dataclasses.field(default_factory=bytearray)

    def copy(self) -> "Position":
        """An independent copy."""
        return Position(
            bytearray(self.opened),
            list(self.names),
            self.inside,
            self.after_colon,
            self.escaped,
            bytearray(self.written),
        )

    def feed(self, text: bytes) -> None:
        """Move over more of the text."""
        for byte in text:
            if self.inside in ("string", "name"):
                self._in_string(byte)
            else:
                self._outside(byte)

    def _in_string(self, byte: int) -> None:
        if byte == QUOTE and not self.escaped:
            if self.inside == "name":
                self.names[-1] = bytes(self.written)
            self.inside = ""
            return
        self.escaped = byte == BACKSLASH and not self.escaped
        self.written.append(byte)

    def _outside(self, byte: int) -> None:
        if byte in SPACE or byte in (COMMA, CLOSE_OBJECT, CLOSE_LIST):
            self.inside = ""
            if byte in (CLOSE_OBJECT, CLOSE_LIST):
                self.opened.pop()
                self.names.pop()
        elif byte == COLON:
            self.after_colon = True
        elif byte in (OPEN_OBJECT, OPEN_LIST):
            self.opened.append(byte)
            self.names.append(b"")
            self.after_colon = False
        elif byte == QUOTE:
            in_object = bool(self.opened) and self.opened[-1] == OPEN_OBJECT
            self.inside = "name" if in_object and not self.after_colon else "string"
            self.written.clear()
            self.after_colon = self.escaped = False
        else:
            if self.inside != "scalar":
                self.written.clear()
            self.inside, self.after_colon = "scalar", False
            self.written.append(byte)

    @property
    def depth(self) -> int:
        """Values that are open."""
        return len(self.opened) + (self.inside != "")
