"""Arguments against a tool's schema: the first thing that is wrong, in words a model can use."""

import re
from collections.abc import Mapping
from typing import Any

from k2jax.config import nearest

TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "array": list,
    "object": Mapping,
}


def describe_mistake(schema: Any, value: Any, name: str = "") -> str:
    """Return what is wrong with a value; "" where it fits.

    Reads the keywords that tools here are made of, and `anyOf`, `oneOf` and lists of types of
    imported ones; other keywords hold nothing back.

    Args:
        schema: of a tool's parameters, or a part of it.
        value: parsed JSON.
        name: dotted path of the value, "" for all arguments.
    """
    if not isinstance(schema, Mapping):
        return ""
    if wrong := _type_mistake(schema, value, name) or _choice_mistake(schema, value, name):
        return wrong
    if isinstance(value, Mapping):
        return _object_mistake(schema, value, name)
    if isinstance(value, list):
        return _list_mistake(schema, value, name)
    if isinstance(value, str):
        return _text_mistake(schema, value, name)
    return _number_mistake(schema, value, name)


def _type_mistake(schema: Mapping[str, Any], value: Any, name: str) -> str:
    kind = schema.get("type")
    if isinstance(kind, str) and not _is_of_type(kind, value):
        return f"{name or 'arguments'} must be of type {kind}"
    if isinstance(kind, list) and not any(_is_of_type(one, value) for one in kind):
        return f"{name or 'arguments'} must be of one of the types {', '.join(kind)}"
    return ""


def _choice_mistake(schema: Mapping[str, Any], value: Any, name: str) -> str:
    if "enum" in schema and value not in schema["enum"]:
        hint = nearest(str(value), [str(choice) for choice in schema["enum"]])
        return f"{name} is {value!r}; {hint}"
    choices = schema.get("anyOf") or schema.get("oneOf") or ()
    mistakes = [describe_mistake(choice, value, name) for choice in choices]
    return mistakes[0] if mistakes and all(mistakes) else ""


def _is_of_type(kind: str, value: Any) -> bool:
    if kind == "null":
        return value is None
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (
            whole or (kind == "number" and isinstance(value, float))
        )
    return isinstance(value, TYPES.get(kind, object))


def _object_mistake(schema: Mapping[str, Any], value: Mapping[str, Any], name: str) -> str:
    prefix = f"{name}." if name else ""
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in value:
            return f"{prefix}{key} is missing"
    if schema.get("additionalProperties") is False:
        for key in value:
            if key not in properties:
                return f"there is no {prefix}{key}; {nearest(str(key), properties)}"
    if len(value) < schema.get("minProperties", 0):
        return f"{name or 'arguments'} must not be empty"
    for key, of in value.items():
        if key in properties and (wrong := describe_mistake(properties[key], of, prefix + key)):
            return wrong
    return ""


def _list_mistake(schema: Mapping[str, Any], value: list[Any], name: str) -> str:
    for i, item in enumerate(value):
        if wrong := describe_mistake(schema.get("items"), item, f"{name}[{i}]"):
            return wrong
    if schema.get("uniqueItems") and any(item in value[:i] for i, item in enumerate(value)):
        return f"{name} has one item twice"
    return ""


def _text_mistake(schema: Mapping[str, Any], value: str, name: str) -> str:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{name} has {len(value)} characters"
    pattern = schema.get("pattern")
    if pattern and not _matches(pattern, value):
        return f"{name} is {value!r}, which does not match {pattern}"
    return ""


def _number_mistake(schema: Mapping[str, Any], value: Any, name: str) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if "minimum" in schema and value < schema["minimum"]:
        return f"{name} is {value}; it must be at least {schema['minimum']}"
    if "maximum" in schema and value > schema["maximum"]:
        return f"{name} is {value}; it must be at most {schema['maximum']}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return f"{name} is {value}; it must be more than {schema['exclusiveMinimum']}"
    return ""


def _matches(pattern: str, value: str) -> bool:
    try:
        return re.search(pattern, value) is not None
    except re.error:
        return True  # a pattern of another dialect holds nothing back
