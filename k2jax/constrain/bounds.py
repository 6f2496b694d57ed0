"""How many tokens it can take at most to end a value that a schema allows, from anywhere inside.

This is a bound from above that comes from the schema alone, so that a constraint need not search
while many tokens are left. Costs are tokens: the pieces of the text that a value needs at least,
each spelled by as few tokens as can be.
"""

import json
import math
import re
import re._parser as regex_parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
SINGLE = ("items", "additionalProperties", "additionalItems")
TYPES = ("object", "array", "string", "number", "boolean", "null")
NUMBER = 3  # tokens of a number without bounds, as "-0.": what it takes from anywhere inside
BOUNDED_NUMBER = 40  # with bounds
FORMAT = 48  # of a string with a format
FEW_HINTS, MOST_HINTS = 4, 64  # contents of strings that are kept, of a node and of a schema
# Contents of strings by format, short ones.
EXAMPLES = {
    "date": "0000-01-01",
    "time": "00:00:00Z",
    "date-time": "0000-01-01T00:00:00Z",
    "duration": "P0D",
    "email": "a@a.aa",
    "hostname": "a.aa",
    "ipv4": "0.0.0.0",
    "ipv6": "0:0:0:0:0:0:0:0",
    "uuid": "00000000-0000-0000-0000-000000000000",
    "uri": "a://a",
}


class Bounds(NamedTuple):
    """What a schema asks for.

    Attributes:
        level: most tokens that it takes to end one open value, from a token's border.
        determined: how a value begins says which branch of a union it is of.
        plain: moreover no string has a pattern or a format.
        hints: contents of strings that the schema may ask for, as JSON writes them.
        required: names of the members that some object requires, as JSON writes them.
    """

    level: int
    determined: bool
    plain: bool
    hints: tuple[bytes, ...]
    required: tuple[bytes, ...]


def bound_schema(schema: Any, count: Callable[[bytes], int]) -> Bounds:
    """Look at a schema.

    Args:
        schema: that llguidance compiles.
        count: the fewest tokens of a text.
    """
    return _Walk(schema, count).bounds()


def drop_endless(schema: dict[str, Any], count: Callable[[bytes], int]) -> None:
    """Take from a schema, in place, what no finite value has: members that must contain themselves.

    Compilers accept such a member, and a text that begins one can never be ended.
    """
    walk = _Walk(schema, count)
    for node in walk.nodes:
        for key in ("properties", "patternProperties"):
            for name, inner in node.get(key, {}).items():
                node[key][name] = False if walk.is_endless(inner) else inner
        for key in SINGLE:
            if walk.is_endless(node.get(key)):
                node[key] = False
        for key in ("anyOf", "oneOf"):
            if key in node:
                ends = [branch for branch in node[key] if not walk.is_endless(branch)]
                node[key] = ends or node[key]


class _Walk:
    """One schema and the costs of its parts."""

    def __init__(self, schema: Any, count: Callable[[bytes], int]):
        self._root = schema
        self._count = count
        self._nodes = list(_list_nodes(schema))
        self._low: dict[int, float] = {}
        for _ in range(len(self._nodes) + 1):
            before = dict(self._low)
            for node in self._nodes:
                self._low[id(node)] = self._cost(node, least=True)
            if before == self._low:
                break

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The schema and all schemas in it."""
        return self._nodes

    def is_endless(self, schema: Any) -> bool:
        """Whether it allows no finite value."""
        return isinstance(schema, dict) and self._of(schema) == math.inf

    def bounds(self) -> Bounds:
        costs = [self._cost(node, least=False) for node in self._nodes]
        level = max([c for c in costs if c < math.inf], default=1.0)
        determined = all(self._is_determined(node) for node in self._nodes)
        keys = {key for node in self._nodes for key in node}
        plain = determined and not keys & {"pattern", "format", "patternProperties"}
        names = {
            name: _dump(name)[1:-1] for node in self._nodes for name in node.get("required", ())
        }
        hints = tuple(dict.fromkeys(self._hints()))[:MOST_HINTS]
        return Bounds(int(level), determined, plain, hints, tuple(names.values()))

    def _of(self, schema: Any) -> float:
        """The least cost of a value."""
        if not isinstance(schema, dict) or not schema:
            return 1 if schema is not False else math.inf
        return self._low.get(id(schema), math.inf)

    def _resolve(self, ref: str) -> Any:
        node = self._root
        if not ref.startswith("#"):
            return {}
        for part in ref[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")  # noqa: PLW2901
            node = node[int(part)] if isinstance(node, list) else node[part]
        return node

    def _cost(self, node: dict[str, Any], least: bool, depth: int = 0) -> float:
        """Tokens of a value: at least, or what it takes at most from anywhere inside."""
        if depth > 20:
            return math.inf
        if "const" in node or "enum" in node:
            return self._listed([node["const"]] if "const" in node else node["enum"], least)

        def part(schema: Any) -> float:
            if least or not isinstance(schema, dict):
                return self._of(schema)
            return self._cost(schema, False, depth + 1)

        parts = [part(schema) for schema in node.get("allOf", ())]
        if "$ref" in node:
            parts.append(part(self._resolve(node["$ref"])))
        own = self._own(node, least)
        for key in ("anyOf", "oneOf"):
            if key in node:
                alone = least and not own and not parts
                branches = [part(schema) for schema in node[key]]
                finite = [cost for cost in branches if cost < math.inf] or [math.inf]
                parts.append(min(finite) if alone else max(finite))
        total = own + sum(parts)
        return max(total, self._patterns(node)) if total else (1 if least else 5)

    def _listed(self, values: list[Any], least: bool) -> float:
        """The cost of one of a list of values."""
        texts = sorted(map(_dump, values), key=len)
        if least or len(texts) <= MOST_HINTS:
            costs = [self._count(text) + 2.0 for text in texts[:MOST_HINTS]] or [math.inf]
            return min(costs) if least else max(costs)
        return len(texts[-1]) + 2.0

    def _own(self, node: dict[str, Any], least: bool) -> float:
        """The cost of what stands in the node itself; 0 where nothing does."""
        if not node.keys() & _CONSTRAINING:
            return 0
        types = node.get("type", _guess_types(node))
        types = [types] if isinstance(types, str) else types
        costs = [self._typed(node, "number" if t == "integer" else t, least) for t in types]
        return (min if least else max)(costs) if costs else 1

    def _typed(self, node: dict[str, Any], kind: str, least: bool) -> float:
        if kind == "string":
            return self._string(node, least)
        if kind == "number":
            return _bound_number(node) if node.keys() & _NUMERIC else NUMBER
        if kind == "array":
            items = [*node.get("prefixItems", ())][: node.get("minItems", 0)]
            more = max(0, node.get("minItems", 0) - len(items))
            rest = more * (self._of(node.get("items", {})) + 1) if more else 0
            return 2 + sum(self._of(item) + 1 for item in items) + rest
        if kind == "object":
            return self._object(node)
        return 2

    def _string(self, node: dict[str, Any], least: bool) -> float:
        if least and node.get("format") in EXAMPLES and "pattern" not in node:
            return 2 + self._count(EXAMPLES[node["format"]].encode()) + node.get("minLength", 0)
        cost = 2.0 + (self._count(b" " * n) if (n := node.get("minLength", 0)) else 0)
        if "format" in node:
            cost += FORMAT
        if "pattern" in node:
            example, most = measure_pattern(node["pattern"])
            if least and example and not n and "format" not in node:
                return 2 + self._count(_dump(example)[1:-1])
            cost += n + most
        return cost

    def _object(self, node: dict[str, Any]) -> float:
        properties = node.get("properties", {})
        cost = 2.0
        for name in node.get("required", ()):
            value = properties.get(name, node.get("additionalProperties", {}))
            cost += self._count(_dump(name) + b":") + 1 + self._of(value)
        more = node.get("minProperties", 0) - len(node.get("required", ()))
        if more > 0:
            members = [
                self._count(_dump(name) + b":") + 1 + self._of(value)
                for name, value in properties.items()
            ]
            members.append(6 + self._of(node.get("additionalProperties", {})))
            cost += more * max([cost for cost in members if cost < math.inf], default=8)
        return cost

    def _patterns(self, node: dict[str, Any]) -> float:
        """A bound where several patterns must hold at once: the product of their lengths."""
        patterns = [
            measure_pattern(inner["pattern"])[1]
            for inner in _list_nodes(node)
            if "pattern" in inner and "allOf" in node
        ]
        return math.prod(patterns) if len(patterns) > 1 else 0

    def _is_determined(self, node: dict[str, Any]) -> bool:
        for key in ("anyOf", "oneOf"):
            seen: set[str] = set()
            for branch in node.get(key, ()):
                types = self._types(branch)
                if types is None or seen & types or node.keys() & _CONSTRAINING:
                    return False
                seen |= types
        return True

    def _types(self, node: Any) -> set[str] | None:
        """The types of a branch's values, None: not known."""
        for _ in range(20):
            if not isinstance(node, dict):
                return None
            if set(node) - _NOTES == {"$ref"}:
                node = self._resolve(node["$ref"])
        types = node.get("type")
        if types is None or node.keys() & {"anyOf", "oneOf", "allOf", "$ref"}:
            return None
        types = {types} if isinstance(types, str) else set(types)
        return {"number" if t == "integer" else t for t in types}

    def _hints(self) -> Iterator[bytes]:
        for node in self._nodes:
            values = [node["const"]] if "const" in node else node.get("enum", ())
            texts = [_dump(value)[1:-1] for value in values if isinstance(value, str)]
            yield from sorted(texts, key=len)[:FEW_HINTS]
            if node.get("format") in EXAMPLES:
                yield EXAMPLES[node["format"]].encode()
            if "pattern" in node:
                example = measure_pattern(node["pattern"])[0]
                yield _dump(example)[1:-1]


_NUMERIC = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_OBJECT = {"properties", "required", "additionalProperties", "patternProperties", "minProperties"}
_ARRAY = {"items", "prefixItems", "minItems", "maxItems"}
_STRING = {"minLength", "maxLength", "pattern", "format"}
_CONSTRAINING = _NUMERIC | _OBJECT | _ARRAY | _STRING | {"type", "maxProperties"}
_NOTES = {"title", "description", "default", "examples", "$comment", "deprecated"}


def _bound_number(node: dict[str, Any]) -> float:
    """Tokens of a number within bounds, from anywhere inside: a sign, the digits, a fraction."""
    limits = [node.get(key, 0) for key in _NUMERIC]
    if "multipleOf" in node or any(isinstance(limit, bool) for limit in limits):
        return BOUNDED_NUMBER
    digits = max(len(str(limit)) for limit in limits)
    return min(BOUNDED_NUMBER, 3 + 2 * digits)


def _guess_types(node: dict[str, Any]) -> list[str]:
    groups = (("object", _OBJECT), ("array", _ARRAY), ("string", _STRING), ("number", _NUMERIC))
    return [kind for kind, keys in groups if node.keys() & keys] or ["null"]


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _list_nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in LISTS:
        for inner in schema.get(key, ()):
            yield from _list_nodes(inner)
    for key in MAPS:
        for inner in schema.get(key, {}).values():
            yield from _list_nodes(inner)
    for key in SINGLE:
        yield from _list_nodes(schema.get(key))


def measure_pattern(pattern: str) -> tuple[str, int]:
    """A short text that a pattern matches, and what it takes at most from anywhere inside.

    The second is in bytes, of which a character has up to four, or six as an escape.
    """
    try:
        parsed = regex_parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return "", 6 * len(pattern)
    text, most = _measure(parsed)
    return text, 4 * most + 12


def _measure(parts: Any) -> tuple[str, int]:
    """The same of a parsed pattern, in characters."""
    text, most = "", 0
    for op, value in reversed(list(parts)):
        shortest, inside = _measure_part(str(op), value)
        most = max(most, inside + len(text))
        text = shortest + text
    return text, max(most, len(text))


def _measure_part(op: str, value: Any) -> tuple[str, int]:
    if op == "LITERAL":
        return chr(value), 1
    if op == "IN":
        return _pick(value), 1
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, _, inner = value
        text, inside = _measure(inner)
        return text * least, inside + len(text) * max(0, least - 1)
    if op in ("SUBPATTERN", "ATOMIC_GROUP"):
        return _measure(value[-1] if op == "SUBPATTERN" else value)
    if op == "BRANCH":
        branches = [_measure(inner) for inner in value[1]]
        return min((text for text, _ in branches), key=len), max(most for _, most in branches)
    other = "b" if value == ord("a") else "a"  # than a character that may not be
    return (other, 1) if op in ("ANY", "NOT_LITERAL") else ("", 0)


def _pick(choices: Any) -> str:
    """A character of a class."""
    negated = any(str(op) == "NEGATE" for op, _ in choices)
    if negated:
        inner = [c for c in choices if str(c[0]) != "NEGATE"]
        return next((c for c in "a0 -_A." if not _contains(inner, c)), "~")
    op, value = choices[0]
    if str(op) == "LITERAL":
        return chr(value)
    if str(op) == "RANGE":
        return chr(value[0])
    return next((c for c in "0a A.-" if _contains(choices, c)), "0")


def _contains(choices: Any, character: str) -> bool:
    for op, value in choices:
        if str(op) == "LITERAL" and value == ord(character):
            return True
        if str(op) == "RANGE" and value[0] <= ord(character) <= value[1]:
            return True
        if str(op) == "CATEGORY":
            word = {"DIGIT": character.isdigit(), "WORD": character.isalnum() or character == "_"}
            kind = str(value).removeprefix("CATEGORY_")
            inside = word.get(kind.removeprefix("NOT_"), character.isspace())
            if inside != kind.startswith("NOT_"):
                return True
    return False
