"""Stage files: JSON lines that a kill leaves whole but for the last line, and that are resumed."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from k2jax.config import ConfigError
from k2jax.post.synthesis.applications import Application
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world_file import Domain, Effect, Entity, Field, Operation

T = TypeVar("T")


def to_line(value: Any) -> str:
    """One line of JSON, the same for equal values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def read_lines(path: Path, needed: Sequence[str] = ()) -> list[Any]:
    """All whole lines of a stage file.

    Args:
        path: of the file.
        needed: members that each line must have.

    Raises:
        ConfigError: it is missing, or a line is damaged; it is named.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing; run its stage first")
    return [value for value, _ in _parse_lines(path, needed)]


def read_all(path: Path, reader: Callable[[Any], T]) -> list[T]:
    """All whole lines of a stage file, each read into what it was written from.

    Raises:
        ConfigError: it is missing, or a line is damaged; it is named.
    """
    out = []
    for number, value in enumerate(read_lines(path), start=1):
        try:
            out.append(reader(value))
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} line {number} is damaged; delete the file") from None
    return out


def _parse_lines(path: Path, needed: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """Values with the byte behind their lines; a last line without its end is left out."""
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} line {number} is not JSON; delete the file") from None
        if needed and not (isinstance(value, dict) and all(name in value for name in needed)):
            raise ConfigError(f"{path} line {number} is of no such stage; delete the file")
        yield value, end


def write_stage(
    path: Path, items: Callable[[int], Iterable[Any]], needed: Sequence[str] = ()
) -> list[Any]:
    """Write the lines of a stage that are not there yet; all lines.

    Args:
        path: of the file.
        items: the stage's values from that number on.
        needed: members that each line must have.
    """
    parsed = list(_parse_lines(path, needed)) if path.exists() else []
    values = [value for value, _ in parsed]
    with path.open("ab") as file:
        file.truncate(parsed[-1][1] if parsed else 0)
        for value in items(len(values)):
            line = to_line(value)
            file.write(line.encode() + b"\n")
            file.flush()
            values.append(json.loads(line))
    return values


def read_field(data: dict[str, Any]) -> Field:
    """A field from JSON."""
    inner = tuple(read_field(one) for one in data["inner"])
    return Field(**{**data, "choices": tuple(data["choices"]), "inner": inner})


def read_operation(data: dict[str, Any]) -> Operation:
    """An operation from JSON."""
    effects = tuple(Effect(**one) for one in data["effects"])
    tuples = {name: tuple(data[name]) for name in ("names", "before")}
    return Operation(**{**data, **tuples, "effects": effects})


def read_domain(data: dict[str, Any]) -> Domain:
    """A world from JSON."""
    return Domain(**{**data, "entities": tuple(_read_entity(one) for one in data["entities"])})


def _read_entity(data: dict[str, Any]) -> Entity:
    return Entity(
        **{
            **data,
            "fields": tuple(map(read_field, data["fields"])),
            "operations": tuple(map(read_operation, data["operations"])),
            "created": read_operation(data["created"]),
            "absent": tuple(data["absent"]),
            "clash": tuple(data["clash"]),
        }
    )


def read_tool(data: dict[str, Any]) -> Tool:
    """A tool from JSON."""
    return Tool(**{**data, "operation": read_operation(data["operation"])})


def read_application(data: dict[str, Any]) -> Application:
    """An agent from JSON."""
    tuples = {name: tuple(data[name]) for name in ("domains", "entities", "tools", "roles")}
    return Application(**{**data, **tuples})
