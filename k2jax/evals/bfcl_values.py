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
# Reads a value from source text and the type of its items; what is none stays the text.
Reader = Callable[[str, str | None], Any]


def convert_java(source: str, kind: str, inner: str | None = None) -> Any:
    """A Java value of a type; the text itself where it is none.

    Args:
        source: an expression.
        kind: one of `JAVA_TYPES`.
        inner: type of the items, where there are some.
    """
    return JAVA[kind](source, inner) if kind in JAVA else source


def convert_script(source: str, kind: str, inner: str | None = None) -> Any:
    """A JavaScript value of one of `SCRIPT_TYPES`, as `convert_java` does it."""
    return SCRIPT[kind](source, inner) if kind in SCRIPT else source


def _make_reader(pattern: str, suffix: str, read: Callable[[str], Any]) -> Reader:
    """Return a reader of literals that match a pattern and end by one letter of `suffix`."""
    end = f"[{suffix}]" if suffix else ""

    def read_literal(source: str, _: str | None) -> Any:
        if not re.match(f"^{pattern}{end}$", source):
            return source
        return read(source[: -1 if suffix else None])

    return read_literal


def _read_boolean(source: str, _: str | None) -> Any:
    return BOOLEANS.get(source, source)


def _read_java_array(source: str, inner: str | None) -> Any:
    match = re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", source)
    if not match:
        return source
    items = [item.strip() for item in match.group(1).split(",") if item.strip()]
    return [convert_java(one, inner) if inner else guess_java(one) for one in items]


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


def _read_hash_map(source: str, _: str | None) -> Any:
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
    for kind in ("long", "float"):
        if (value := convert_java(source, kind)) is not source:
            return value
    return _guess_number(source)


def _guess_number(source: str) -> Any:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(source)
    return source


def _read_string(source: str, _: str | None) -> Any:
    return source[1:-1] if _is_quoted(source) else source


def _is_quoted(source: str) -> bool:
    return any(source.startswith(mark) and source.endswith(mark) for mark in "\"'")


ROWS = (
    r"\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]"
    r"|\bnew\s+Array\(\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\)"
)


def _read_array(source: str, inner: str | None) -> Any:
    source = source.strip()
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


def _read_object(source: str, _: str | None = None) -> Any:
    source = source.strip()
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


JAVA: dict[str, Reader] = {
    **dict.fromkeys(("byte", "short", "integer"), _make_reader(WHOLE, "", int)),
    "long": _make_reader(WHOLE, "lL", int),
    "float": _make_reader(NUMBER, "fF", float),
    "double": _make_reader(NUMBER, "", float),
    "boolean": _read_boolean,
    "Array": _read_java_array,
    "ArrayList": _read_array_list,
    "HashMap": _read_hash_map,
}
SCRIPT: dict[str, Reader] = {
    "integer": _make_reader(WHOLE, "", int),
    "float": _make_reader(r"-?\d+(\.\d+)?", "", float),
    "Bigint": _make_reader(WHOLE, "n", int),
    "String": _read_string,
    "Boolean": _read_boolean,
    "dict": _read_object,
    "array": _read_array,
}
