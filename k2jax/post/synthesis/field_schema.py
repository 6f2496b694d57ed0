"""Fields as JSON schemas, and values drawn for them."""

import datetime
import random
from collections.abc import Callable
from typing import Any

from k2jax.post.synthesis.words import DAY_ZERO, POOLS, TIMES, draw_day, draw_word
from k2jax.post.synthesis.world_file import Entity, Field

DAY = r"^\d{4}-\d{2}-\d{2}$"
TIME = r"^([01]\d|2[0-3]):[0-5]\d$"
LONGEST = 200  # characters of a text
SAMPLE = 3  # flags that a drawn record has at most

Schema = dict[str, Any]


def field_schema(field: Field) -> Schema:
    """The JSON schema of a field's values, described as the world file does."""
    schema = _plain_schema(field)
    text = field.text or field.label
    units = {"money": "in dollars", "date": "as YYYY-MM-DD", "time": "as HH:MM"}.get(field.kind)
    if field.kind == "ref":
        text = f"id of the {field.target.replace('_', ' ')}: {text}"
    schema["description"] = _sentence(f"{text}, {units}" if units else text)
    return schema


def _plain_schema(field: Field) -> Schema:
    one_of = {"type": "string", "enum": list(field.choices)}
    least = {"minimum": min(field.low, 0)}
    schemas: dict[str, Schema] = {
        "enum": one_of,
        "flags": {"type": "array", "items": one_of, "uniqueItems": True},
        "texts": {"type": "array", "items": {"type": "string"}},
        "int": {"type": "integer", **least},
        "money": {"type": "number", **least},
        "bool": {"type": "boolean"},
        "date": {"type": "string", "pattern": DAY},
        "time": {"type": "string", "pattern": TIME},
    }
    if field.kind == "object":
        return object_schema(field.inner)
    return schemas.get(field.kind, {"type": "string", "minLength": 1, "maxLength": LONGEST})


def object_schema(fields: tuple[Field, ...] | list[Field]) -> Schema:
    """The schema of an object with these fields and no others."""
    schema: Schema = {
        "type": "object",
        "properties": {field.name: field_schema(field) for field in fields},
        "required": [field.name for field in fields if not field.optional],
        "additionalProperties": False,
    }
    if not schema["required"]:
        del schema["required"]
    return schema


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def draw_value(field: Field, today: datetime.date, rng: random.Random) -> Any:
    """Draw a value of any kind but a reference."""
    if field.kind == "object":
        return {inner.name: draw_value(inner, today, rng) for inner in field.inner}
    if field.kind == "date":
        return draw_day(today, field.low, field.high, rng)
    return DRAW[field.kind](field, rng)


def _draw_flags(field: Field, rng: random.Random) -> list[str]:
    chosen = set(rng.sample(field.choices, rng.randint(1, min(SAMPLE, len(field.choices)))))
    return [choice for choice in field.choices if choice in chosen]


def _draw_texts(field: Field, rng: random.Random) -> list[str]:
    return rng.sample(POOLS["tag"], rng.randint(0, 2)) if field.name == "tags" else []


DRAW: dict[str, Callable[[Field, random.Random], Any]] = {
    "pick": lambda field, rng: rng.choice(field.choices),
    "enum": lambda field, rng: rng.choice(field.choices),
    "flags": _draw_flags,
    "int": lambda field, rng: rng.randint(field.low, field.high),
    "money": lambda field, rng: round(rng.randint(field.low * 20, field.high * 20) / 20, 2),
    "bool": lambda field, rng: rng.random() < 0.5,
    "time": lambda field, rng: rng.choice(TIMES),
    "texts": _draw_texts,
    "word": lambda field, rng: draw_word(field.target, rng),
}


def initial_value(field: Field) -> Any:
    """What a field has that is not set by who creates the record."""
    if field.kind in ("enum", "pick"):
        return field.choices[0]
    zeros = {"int": 0, "money": 0.0, "bool": False, "texts": [], "flags": []}
    if field.kind == "date":
        return DAY_ZERO.isoformat()
    return zeros.get(field.kind, "")


def shown_fields(entity: Entity) -> list[str]:
    """Fields that lists show: what a record is called by, its state, what it belongs to."""
    refs = [field.name for field in entity.fields if field.kind == "ref"]
    names = [entity.key, *["status"] * entity.has("status"), *refs[:2]]
    return ["id", *dict.fromkeys(names)]
