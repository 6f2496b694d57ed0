"""JSON schemas, compiled once for a vocabulary."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from k2jax.config import ConfigError
from k2jax.constrain.bounds import MAPS, Bounds, bound_schema, drop_endless
from k2jax.constrain.position import Position
from k2jax.constrain.shortest import Shortest
from k2jax.constrain.vocabulary import Vocabulary, byte_tokenizer, import_llguidance

# Nothing in a schema can change these. White space is bounded: endless white space would be valid.
# No character is written by its number: an undeclared member could so get a declared one's name.
OPTIONS = {
    "whitespace_pattern": r" |\n[ \t]{0,32}",
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": '"\\bfnrt',
    "coerce_one_of": False,
    "lenient": False,
}
# Of strings; others only describe, as JSON Schema has it for all of them, and are left out.
FORMATS = (
    *("date", "time", "date-time", "duration", "email", "hostname"),
    *("ipv4", "ipv6", "uri", "uuid"),
)
COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties")
DEEPEST = 160  # levels of lists and objects in a schema
KEPT = 256  # compiled schemas a vocabulary keeps
SHOWN = 200  # characters of a compiler's message
UNKNOWN = re.compile(r"Unimplemented keys: (\[[^]]*\])")  # llguidance's message


class Schema:
    """One schema for one vocabulary: matchers to copy, bounds, and how its values can be closed.

    Attributes:
        matcher: over tokens, before the value.
        byte_matcher: over bytes, before the value.
        bounds: how long closing may take.
        shortest: how to close.
        least: tokens of a short value.
    """

    def __init__(self, schema: Any, vocabulary: Vocabulary, name: str):
        """Compile `schema`, which a message calls `name`.

        Raises:
            ConfigError: it cannot be compiled, or no value was found.
        """
        ll = import_llguidance()
        try:
            drop_endless(schema, vocabulary.count)
            self.bounds: Bounds = bound_schema(schema, vocabulary.count)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            RecursionError,
        ) as error:
            raise ConfigError(f"{name}: {_explain(ll, schema) or error}") from None
        grammar = ll.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
        self.vocabulary = vocabulary
        self.byte_matcher = ll.LLMatcher(byte_tokenizer(), grammar, log_level=0)
        if self.byte_matcher.is_error():
            raise ConfigError(f"{name}: {_shorten(self.byte_matcher.get_error())}")
        self.shortest = Shortest(vocabulary.fillers, self.bounds.hints, self.bounds.required)
        text = self.shortest.complete(self.byte_matcher, Position())
        if text is None:
            raise ConfigError(f"{name}: no value of the schema was found")
        self.matcher = ll.LLMatcher(vocabulary.ll_tokenizer, grammar, log_level=0)
        if self.matcher.is_error():
            raise ConfigError(f"{name}: {_shorten(self.matcher.get_error())}")
        self.first = tuple(vocabulary.split(text))
        self.least = len(self.first)


def compile_schema(schema: Any, vocabulary: Vocabulary, name: str) -> Schema:
    """Compile a schema, or take it from those compiled before.

    Args:
        schema: a JSON schema; true and {} allow anything.
        vocabulary: of the model.
        name: of the schema, for messages.

    Raises:
        ConfigError: it is no JSON, or cannot be compiled; one line says whose it is and why.
    """
    if _measure_depth(schema) > DEEPEST:
        raise ConfigError(f"{name}: the schema is nested more than {DEEPEST} levels deep")
    try:
        text = json.dumps({} if schema is True else schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: the schema is not JSON: {error}") from None
    if not text.startswith("{"):
        raise ConfigError(f"{name}: the schema must be an object, not {text[:40]}")
    return _compile(json.dumps(_drop_notes(json.loads(text))), vocabulary, name)


@functools.lru_cache(KEPT)
def _compile(text: str, vocabulary: Vocabulary, name: str) -> Schema:
    return Schema(json.loads(text), vocabulary, name)


def prepare_arguments(parameters: Any, name: str) -> dict[str, Any]:
    """The schema of a tool's arguments: `{}` where the tool says nothing of them.

    They are an object where the schema allows one, and else of the type that it names.

    Raises:
        ConfigError: it is no schema.
    """
    if _measure_depth(parameters) > DEEPEST:
        raise ConfigError(f"{name}: the schema is nested more than {DEEPEST} levels deep")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{name}: parameters must be a JSON schema, an object")
    schema = dict(parameters)
    if not {*COMPOSED, "enum", "const"} & set(schema):
        schema.setdefault("type", "object")
    if schema.get("type") and "object" in schema["type"]:
        schema["type"] = "object"
    return close_objects(schema)


def close_objects(schema: Any) -> Any:
    """The schema with objects closed that list their properties and do not say they are open.

    A subset of what the schema allows: an answer then has no member that nobody declared. Parts of
    compositions stay as they are, since what one part does not list another may.
    """
    if isinstance(schema, list):
        return [close_objects(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {key: _close_inner(key, value) for key, value in schema.items()}
    required = set(closed.get("required") or ())
    listed = closed.get("properties")
    if isinstance(listed, Mapping) and not set(COMPOSED) & set(closed) and required <= set(listed):
        closed.setdefault("additionalProperties", False)
    return closed


def _close_inner(key: str, value: Any) -> Any:
    if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
        return {name: close_objects(inner) for name, inner in value.items()}
    if key in ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf"):
        return close_objects(value)
    return value


def _measure_depth(schema: Any) -> int:
    """Levels of nesting, counted up to one more than may be."""
    level, depth = [schema], 0
    while level and depth <= DEEPEST:
        inner = [list(s.values()) if isinstance(s, Mapping) else s for s in level]
        level = [part for parts in inner if isinstance(parts, list) for part in parts]
        depth += 1
    return depth


def _drop_notes(schema: Any) -> Any:
    """The schema without formats that say nothing here, and demands that forbid nothing."""
    if isinstance(schema, list):
        return [_drop_notes(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _drop_inner(key, value) for key, value in schema.items()}
    if isinstance(out.get("format"), str) and out["format"] not in FORMATS:
        del out["format"]
    if out.get("uniqueItems") is False or out.get("maxItems") in (0, 1):
        out.pop("uniqueItems", None)
    return out


def _drop_inner(key: str, value: Any) -> Any:
    if key in (*MAPS, "dependentSchemas") and isinstance(value, dict):
        return {name: _drop_notes(inner) for name, inner in value.items()}
    return value if key in ("enum", "const", "default", "examples") else _drop_notes(value)


def _explain(ll: Any, schema: Any) -> str:
    """What the compiler says of a schema that could not be read; "" if it has nothing to say."""
    grammar = ll.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    message = _shorten(ll.LLMatcher.validate_grammar(grammar, byte_tokenizer()))
    return message or "the schema is malformed"


def _shorten(message: str) -> str:
    """A compiler's message on one line."""
    line = " ".join(message.split())
    if named := UNKNOWN.search(line):
        keywords = ", ".join(json.loads(named[1]))
        return f"answers cannot be held to the keyword {keywords}; leave it out"
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
