"""Tools as a TypeScript namespace, which K2.5 and its successors read instead of JSON.

Source: the rules of Kimi-K2.5's `tool_declaration_ts.py`, on which a copy of it (Tinker's cookbook)
and two ports (SMG's in Rust, Prime's renderers) agree. What has no such form is left to JSON.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

INDENT = "  "
LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
PYTHON: dict[str, Any] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}
DEFINITIONS = "#/$defs/"
EMPTY = "interface parameters {}"


def sort_keys(value: Any) -> Any:
    """The value with the keys of every object in alphabetical order, as the tokenizer puts them."""
    if isinstance(value, Mapping):
        return {key: sort_keys(value[key]) for key in sorted(value)}
    return [sort_keys(item) for item in value] if isinstance(value, list | tuple) else value


def declare_tools(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The declaration of tools; None where a schema has no such form, or there is nothing to say.

    Args:
        tools: from `messages.check_tools`, `sort_keys`.
    """
    functions = [tool["function"] for tool in tools if tool.get("type") == "function"]
    try:
        declarations = [_Function(function).text() for function in functions]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None  # schemas are anybody's JSON: whatever does not fit has no such form
    lines = ("# Tools", "", "## functions", "namespace functions {", *declarations, "}", "")
    return "\n".join(lines) if declarations else None


class _Function:
    """One function's declaration."""

    def __init__(self, function: Mapping[str, Any]):
        self.function = function
        self.definitions: dict[str, Any] = {}
        self.refers_to_itself = False

    def text(self) -> str:
        """Interfaces that it needs, its description, its type."""
        schema = self.function.get("parameters") or {}
        parameters = self._object(schema, "")
        lines = []
        if self.refers_to_itself:
            parameters = "parameters"
            fields = ",\n".join(self._fields(schema, INDENT, schema.get("properties", {})))
            lines.append(f"interface parameters {{\n{fields}\n}}" if fields else EMPTY)
        for name, definition in list(self.definitions.items()):
            lines += _described(definition, "")
            lines.append(f"interface {name} {self._type(definition, '')}")
        lines += _described(self.function, "")
        return "\n".join([*lines, f"type {self.function['name']} = (_: {parameters}) => any;"])

    def _type(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool) or schema == {}:
            return "null" if schema is False else "any"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join([self._type(choice, indent) for choice in schema["anyOf"]])
        return _enum(schema) if "enum" in schema else self._named(schema, indent)

    def _named(self, schema: Mapping[str, Any], indent: str) -> str:
        kind = schema["type"]
        if isinstance(kind, list):
            return " | ".join([UNION[word] for word in kind])
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema.get("items"), indent)
        return "number" if kind == "integer" else str(kind)

    def _reference(self, to: str) -> str:
        if to == "#":
            self.refers_to_itself = True
            return "parameters"
        name = to.rpartition("/")[2]
        if not to.startswith(DEFINITIONS) or name not in self.definitions:
            raise ValueError(f"{to!r} is not defined")
        return name

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        self.definitions |= schema.get("$defs") or {}
        inner, properties = indent + INDENT, schema.get("properties", {})
        required = set(schema.get("required", ()))
        first = sorted(properties, key=lambda name: (name not in required, name))
        lines = list(self._fields(schema, inner, first))
        rest = schema.get("additionalProperties")
        if rest is not None:
            kind = "never" if rest is False else self._type(rest, inner)
            lines.append(f"{inner}[k: string]: {kind}")
        fields = ",\n".join(lines)
        return f"{{\n{fields}\n{indent}}}" if lines else "{}"

    def _fields(
        self, schema: Mapping[str, Any], indent: str, names: Iterable[str]
    ) -> Iterator[str]:
        required = schema.get("required", ())
        for name in names:
            of = schema["properties"][name]
            lines = _comment(of, indent)
            default = of.get("default") if isinstance(of, Mapping) else None
            if default is not None:
                plain = isinstance(default, int | float)  # as Python writes them
                shown = repr(default) if plain else json.dumps(default, ensure_ascii=False)
                lines.append(f"{indent}// Default: {shown}")
            mark = "" if name in required else "?"
            yield "\n".join([*lines, f"{indent}{name}{mark}: {self._type(of, indent)}"])

    def _array(self, of: Any, indent: str) -> str:
        inner = indent + INDENT
        if not of:
            return "Array<any>"
        if lines := _comment(of, inner):
            return "\n".join(["Array<", *lines, inner + self._type(of, inner), f"{indent}>"])
        return f"Array<{self._type(of, indent)}>"


def _comment(schema: Any, indent: str) -> list[str]:
    """Description and limits, a line each."""
    if not isinstance(schema, Mapping):
        return []
    lines = _described(schema, indent)
    plain = not any(word in schema for word in ("$ref", "anyOf", "enum"))
    kind = schema.get("type") if plain else None
    limits = LIMITS.get(kind, ()) if isinstance(kind, str) else ()
    if limited := [f"{name}: {schema[name]}" for name in limits if name in schema]:
        lines.append(f"{indent}// {', '.join(limited)}")
    return lines


def _described(schema: Mapping[str, Any], indent: str) -> list[str]:
    text = schema.get("description") or ""
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")] if text else []


def _enum(schema: Mapping[str, Any]) -> str:
    """The values; of the type that is named, or null."""
    kind = schema.get("type")
    if isinstance(kind, list):
        (kind,) = [word for word in kind if word != "null" or len(kind) == 1]
    for value in schema["enum"]:
        if value is not None and not isinstance(value, PYTHON.get(str(kind), object)):
            raise ValueError(f"{value!r} is no {kind}")
    values = [f'"{v}"' if isinstance(v, str) else str(v) for v in schema["enum"]]
    return " | ".join(values)
