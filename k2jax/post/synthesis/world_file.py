"""Worlds as they are written: entities with typed fields, and what can be done to them.

A world file has a line `world NAME | what it is | whose it is | role of the assistant`, then
entities:

    entity order | orders | a purchase in the shop | by item
      item!      {Desk lamp; Wool rug}      -- what was bought
      shopper_id -> shopper                 -- who bought it
      status     pending/shipped/cancelled =
      * cancel: pending -> cancelled; total to shopper_id.credit; confirm -- Cancel an order.

A field is a name with marks, a type, and a description after `--`. Marks: `?` optional, `!` fixed
once created, `~` unique. Types: `{A; B}` a text, drawn from these; `a/b/c` one of these, and with
`list` before it some of them; `int 1..9`, `money 1..9`, `bool`, `date -9..9` (days from today),
`time`; `-> entity` an id; `(name type, name type)` an object; a word of `words.PLACED`. `=` behind
a type: not set by who creates the record. The field `status` makes an entity's states; the first
is a new record's. `by FIELD` is what people call a record by.

Operations begin with `*`: `NAME: from, from -> to` moves a record between states; `adjust FIELD:
up, down`; `transfer FIELD: name`; `assign FIELD: name`; `total FIELD`; `create as VERB`; `tags`;
`notes`; `no delete, create` leaves out; `clash FIELDS`: two records that agree in them all are a
conflict. After `;` come conditions: `confirm`, `needs ROLE`, `AMOUNT from FIELD.FIELD` and
`AMOUNT to FIELD.FIELD` (an amount is a number or a field's name, paid by or to another record).
"""

import dataclasses
import re
from importlib import resources

from k2jax.config import ConfigError
from k2jax.post.synthesis.words import PLACED

GENERIC = ("get", "list", "search", "count", "create", "update", "delete")
LINE = re.compile(r"(?P<name>\w+)(?P<marks>[?!~]*)\s+(?P<type>.+?)(?P<initial>\s*=)?$")
RANGE = re.compile(r"(int|money|date)(?:\s+(-?\d+)\.\.(-?\d+))?$")
EFFECT = re.compile(r"(\w+) (from|to) (\w+)\.(\w+)$")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a record; see the module for the kinds."""

    name: str
    kind: str  # word, pick, enum, flags, int, money, bool, date, time, ref, object, texts
    text: str = ""
    optional: bool = False
    fixed: bool = False
    unique: bool = False
    initial: bool = False  # not set by who creates the record
    choices: tuple[str, ...] = ()  # of pick, enum, flags
    low: int = 0
    high: int = 0
    target: str = ""  # the entity of a ref, the pool of a word
    inner: tuple["Field", ...] = ()

    @property
    def label(self) -> str:
        """The name as people say it."""
        return self.name.removesuffix("_id").replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Effect:
    """What an operation takes from, or adds to, another record."""

    amount: str  # a field's name, or digits
    sign: int
    ref: str
    field: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """What can be done to an entity beyond reading and writing its fields."""

    kind: str  # move, adjust, transfer, assign, total, tags, notes
    names: tuple[str, ...] = ()
    field: str = ""
    before: tuple[str, ...] = ()
    after: str = ""
    effects: tuple[Effect, ...] = ()
    confirm: bool = False
    role: str = ""
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Entity:
    """A kind of record."""

    name: str
    plural: str
    text: str
    key: str
    fields: tuple[Field, ...]
    operations: tuple[Operation, ...] = ()
    creates: str = "create"
    created: Operation = Operation("create")
    absent: tuple[str, ...] = ()  # generic operations that are left out
    clash: tuple[str, ...] = ()
    numbered: bool = False  # ids are numbers, not texts

    def field(self, name: str) -> Field:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    def has(self, name: str) -> bool:
        """Whether there is a field of that name."""
        return any(field.name == name for field in self.fields)


@dataclasses.dataclass(frozen=True)
class Domain:
    """A world: its entities, each after those that it refers to."""

    name: str
    text: str
    owner: str
    role: str
    entities: tuple[Entity, ...]
    origin: str = "composed"


def load_domains() -> list[Domain]:
    """The worlds that come with k2jax, by name."""
    files = resources.files("k2jax.post.synthesis").joinpath("worlds").iterdir()
    texts = {file.name: file.read_text() for file in files if file.name.endswith(".world")}
    return [parse_domain(texts[name], name) for name in sorted(texts)]


def parse_domain(text: str, where: str = "world") -> Domain:
    """Read one world.

    Raises:
        ConfigError: a line has no meaning; it is named.
    """
    head: list[str] = []
    blocks: list[tuple[list[str], list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        try:
            if not words or words.startswith("#"):
                continue
            if words.startswith("world "):
                head = _split(words.removeprefix("world "), "|", 4)
            elif words.startswith("entity "):
                blocks.append((_split(words.removeprefix("entity "), "|", 4), []))
            else:
                blocks[-1][1].append(words)
        except (ValueError, IndexError):
            raise ConfigError(f"{where} line {number} has no meaning: {words}") from None
    if not head:
        raise ConfigError(f"{where} has no line 'world NAME | ...'")
    entities = tuple(_parse_entity(names, lines, where) for names, lines in blocks)
    return Domain(head[0], head[1], head[2], head[3], entities)


def _split(text: str, mark: str, count: int) -> list[str]:
    parts = [part.strip() for part in text.split(mark)]
    if len(parts) != count:
        raise ValueError(text)
    return parts


def _parse_entity(names: list[str], lines: list[str], where: str) -> Entity:
    fields: list[Field] = []
    options: dict = {"operations": []}
    for line in lines:
        body, _, text = line.partition(" -- ")
        try:
            if body.startswith("*"):
                _parse_operation(body[1:].strip(), text.strip(), options)
            else:
                fields.append(parse_field(body.strip(), text.strip()))
        except (ValueError, StopIteration):
            raise ConfigError(
                f"{where}: entity {names[0]} has a line without meaning: {line}"
            ) from None
    operations = tuple(options.pop("operations"))
    kinds = {operation.kind for operation in operations}
    fields += [Field("tags", "texts", "short labels", initial=True)] * ("tags" in kinds)
    fields += [Field("notes", "texts", "notes of the staff", initial=True)] * ("notes" in kinds)
    key = names[3].removeprefix("by ")
    return Entity(names[0], names[1], names[2], key, tuple(fields), operations, **options)


def parse_field(body: str, text: str = "") -> Field:
    """Read a field's line, without its description.

    Raises:
        ValueError: it is none.
    """
    parts = LINE.fullmatch(body)
    if not parts:
        raise ValueError(body)
    marks = parts["marks"]
    return Field(
        name=parts["name"],
        text=text,
        optional="?" in marks,
        fixed="!" in marks,
        unique="~" in marks,
        initial=bool(parts["initial"]) or parts["name"] == "status",
        **_parse_type(parts["type"].strip()),
    )


def _parse_type(text: str) -> dict:
    if parts := RANGE.fullmatch(text):
        low, high = int(parts[2] or 0), int(parts[3] or 30)
        return {"kind": parts[1], "low": low, "high": high}
    if text.startswith("("):
        inner = tuple(parse_field(part.strip()) for part in text[1:-1].split(","))
        return {"kind": "object", "inner": inner}
    if text in ("bool", "time"):
        return {"kind": text}
    return _parse_text_type(text)


def _parse_text_type(text: str) -> dict:
    if text.startswith("{"):
        return {"kind": "pick", "choices": tuple(map(str.strip, text.strip("{}").split(";")))}
    if text.startswith("->"):
        return {"kind": "ref", "target": text[2:].strip()}
    if text in PLACED:
        return {"kind": "word", "target": text}
    if "/" in text:
        kind = "flags" if text.startswith("list ") else "enum"
        return {"kind": kind, "choices": tuple(text.removeprefix("list ").split("/"))}
    raise ValueError(text)


def _parse_operation(body: str, text: str, options: dict) -> None:
    """Add an operation's line to an entity's options."""
    first, *conditions = [part.strip() for part in body.split(";")]
    rest = _parse_conditions(conditions)
    word, _, tail = first.partition(" ")
    if word == "no":
        options["absent"] = tuple(_names(tail))
    elif word == "clash":
        options["clash"] = tuple(_names(tail))
    elif word == "create":
        options["creates"] = tail.removeprefix("as ").strip() or "create"
        options["created"] = Operation("create", text=text, **rest)
    elif word == "delete":
        options["operations"].append(Operation("delete", text=text, **rest))
    elif word in ("tags", "notes"):
        options["operations"].append(Operation(word))
    elif word == "total":
        options["operations"].append(Operation(word, field=tail, text=text))
    elif word in ("adjust", "transfer", "assign"):
        field, _, names = tail.partition(":")
        operation = Operation(word, tuple(_names(names)), field.strip(), text=text, **rest)
        options["operations"].append(operation)
    else:
        options["operations"].append(_parse_move(first, text, rest))


def _parse_move(first: str, text: str, rest: dict) -> Operation:
    name, colon, states = first.partition(":")
    before, arrow, after = states.partition("->")
    if not colon or not arrow:
        raise ValueError(first)
    return Operation("move", (name,), "", tuple(_names(before)), after.strip(), text=text, **rest)


def _parse_conditions(conditions: list[str]) -> dict:
    rest: dict = {}
    effects = []
    for condition in conditions:
        if condition == "confirm":
            rest["confirm"] = True
        elif condition.startswith("needs "):
            rest["role"] = condition.removeprefix("needs ")
        elif parts := EFFECT.fullmatch(condition):
            effects.append(Effect(parts[1], 1 if parts[2] == "to" else -1, parts[3], parts[4]))
        else:
            raise ValueError(condition)
    return {**rest, "effects": tuple(effects)}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
