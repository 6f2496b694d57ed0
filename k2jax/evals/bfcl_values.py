"""Values that BFCL has as source text of Java or JavaScript, as Python's.

What does not read as its type stays the text; comparing it then fails. Source: [BFCL].
"""

import contextlib
import re
from collections.abc import Callable
from typing import Any

JAVA_TYPES: dict[str, type] = {
    **dict.fromkeys(("byte", "short", "integer", "long"), int),
    **dict.fromkeys(("float", "double"), float),
    **dict.fromkeys(("Array", "ArrayList", "Queue", "Stack"), list),
    **dict.fromkeys(("HashMap", "Hashtable"), dict),
    **dict.fromkeys(("char", "String", "any"), str),
    "boolean": bool,
    "Set": set,
}
SCRIPT_TYPES: dict[str, type] = {
    "String": str,
    "integer": int,
    "float": float,
    "Bigint": int,
    "Boolean": bool,
    "dict": dict,
    "array": list,
    "any": str,
}
BOOLEANS = {"true": True, "false": False}
WHOLE, NUMBER = r"-?\d+", r"-?\d+(\.\d+)?([eE][+-]?\d+)?"
# Of each type, what its source looks like, letters of a suffix, and what reads it.
Literal = tuple[str, str, Callable[[str], Any]]
JAVA: dict[str, Literal] = {
    **dict.fromkeys(("byte", "short", "integer"), (WHOLE, "", int)),
    "long": (WHOLE, "lL", int),
    "float": (NUMBER, "fF", float),
    "double": (NUMBER, "", float),
}
SCRIPT: dict[str, Literal] = {
    "integer": (WHOLE, "", int),
    "float": (r"-?\d+(\.\d+)?", "", float),
    "Bigint": (WHOLE, "n", int),
}


def convert_java(source: str, kind: str, inner: str | None = None) -> Any:
    """A Java value of a type; the text itself where it is none.

    Args:
        source: an expression.
        kind: one of `JAVA_TYPES`.
        inner: type of the items, where there are some.
    """
    if kind in JAVA:
        return _read_literal(source, *JAVA[kind])
    if kind == "boolean":
        return BOOLEANS.get(source, source)
    if kind == "ArrayList":
        return _read_array_list(source, inner)
    if kind == "Array":
        match = re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", source)
        if not match:
            return source
        items = [item.strip() for item in match.group(1).split(",") if item.strip()]
        return [convert_java(one, inner) if inner else guess_java(one) for one in items]
    return _read_hash_map(source) if kind == "HashMap" else source


def _read_literal(source: str, pattern: str, suffix: str, read: Callable[[str], Any]) -> Any:
    end = f"[{suffix}]" if suffix else ""
    if not re.match(f"^{pattern}{end}$", source):
        return source
    return read(source[: -1 if suffix else None])


def _read_array_list(source: str, inner: str | None) -> Any:
    if match := re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", source):
        return [_read_item(item.strip(), inner) for item in match.group(1).split(",")]
    filled = r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*(.+?)\s*\}\}"
    if match := re.search(filled, source, re.DOTALL):
        items = re.findall(r"add\((.+?)\)", match.group(1))
        return [_read_item(item.strip(), inner) for item in items]
    return [] if re.search(r"new\s+ArrayList<\w*>\(\)", source) else source


def _read_item(source: str, inner: str | None) -> Any:
    if inner in ("char", "String"):
        return source[1:-1]  # without quotes
    return convert_java(source, inner) if inner else guess_java(source)


def _read_hash_map(source: str) -> Any:
    filled = r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?\s*(.*?)\s*\}?\s*\}"
    if match := re.search(filled, source, re.DOTALL):
        pairs = re.findall(r"put\(\"(.*?)\",\s*(.*?)\)", match.group(1))
        return {key: guess_java(value.strip()) for key, value in pairs}
    return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", source) else source


def guess_java(source: str) -> Any:
    """A Java value whose type shows only in how it is written."""
    if source in BOOLEANS:
        return BOOLEANS[source]
    if source.startswith('"') and source.endswith('"'):
        return source[1:-1]
    for literal in (JAVA["long"], JAVA["float"]):
        if (value := _read_literal(source, *literal)) is not source:
            return value
    return _guess_number(source)


def _guess_number(source: str) -> Any:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(source)
    return source


def convert_script(source: str, kind: str, inner: str | None = None) -> Any:
    """A JavaScript value of a type; the text itself where it is none.

    Args:
        source: an expression.
        kind: one of `SCRIPT_TYPES`.
        inner: type of the items, where there are some.
    """
    if kind in SCRIPT:
        return _read_literal(source, *SCRIPT[kind])
    if kind == "String":
        return source[1:-1] if _is_quoted(source) else source
    if kind == "Boolean":
        return BOOLEANS.get(source, source)
    if kind == "dict":
        return _read_object(source.strip())
    return _read_array(source.strip(), inner) if kind == "array" else source


def _is_quoted(source: str) -> bool:
    return any(source.startswith(mark) and source.endswith(mark) for mark in "\"'")


ROWS = (
    r"\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]"
    r"|\bnew\s+Array\(\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\)"
)


def _read_array(source: str, inner: str | None) -> Any:
    if match := re.match(ROWS, source):
        rows = re.findall(r"\[(.*?)\]", match.group(0))
        rows[0] = rows[0].strip().removeprefix("[")
        return [[guess_script(item.strip()) for item in row.strip().split(",")] for row in rows]
    match = re.match(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)", source)
    if not match:
        return source
    content = next(part for part in match.groups() if part is not None).strip()
    items = [item.strip() for item in content.split(",")] if content else []
    if inner is None:
        return [guess_script(item) for item in items]
    try:
        return [_convert_item(item, inner) for item in items]
    except KeyError:
        return source


def _convert_item(source: str, inner: str) -> Any:
    if inner not in SCRIPT_TYPES:
        raise KeyError(inner)
    return convert_script(source, inner, "String" if source[:1] in ("'", '"') else None)


def _read_object(source: str) -> Any:
    if source == "{}":
        return {}
    match = re.match(r"\{(.*?)\}", source)
    if not match:
        return source
    pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", match.group(1))
    return {key.strip().strip("'\""): _read_member(value.strip()) for key, value in pairs}


def _read_member(source: str) -> Any:
    if source.startswith("[") and source.endswith("]"):
        return _read_array(source, None)
    if source.startswith("{") and source.endswith("}"):
        return _read_object(source)
    return guess_script(source.strip("'\""))


def guess_script(source: str) -> Any:
    """A JavaScript value whose type shows only in how it is written."""
    source = source.strip()
    if source in BOOLEANS:
        return BOOLEANS[source]
    return source[1:-1] if _is_quoted(source) else _guess_number(source)
