"""Settings by name (`--section.field VALUE`), and configs as JSON."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from k2jax.config.errors import ConfigError, nearest
from k2jax.config.schema import RENAMED, RunConfig
from k2jax.config.suggest import describe_unknown


def override(config: Any, settings: Mapping[str, str]) -> Any:
    """Return `config` with each `dotted.name: value` applied.

    Raises:
        ConfigError: unknown name (the nearest one is named), or a value of the wrong type.
    """
    for name, value in settings.items():
        config = _set(config, name, name, value)
    return config


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings by dotted name, as the command line has them.

    Args:
        settings: a value by `"section.field"`, or a mapping of fields by `"section"`:
            `{"train": {"steps": 30}, "data.rows": 16}`.
    """
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            nested = flatten_settings(value)
            flat |= {f"{name}.{field}": text for field, text in nested.items()}
        else:
            flat[name] = str(value)
    return flat


def _set(node: Any, full: str, path: str, value: str) -> Any:
    """Set what `path` names below `node`; `full` is the whole name, for messages."""
    name, _, rest = path.partition(".")
    kinds = typing.get_type_hints(type(node))
    if name not in [field.name for field in dataclasses.fields(node)]:
        raise ConfigError(describe_unknown(full, field_names()))
    old = getattr(node, name)
    if dataclasses.is_dataclass(old):
        if not rest:
            fields = ", ".join(field.name for field in dataclasses.fields(old))
            raise ConfigError(f"{full} is a section; set one of its fields: {fields}")
        new = _set(old, full, rest, value)
    elif rest:
        raise ConfigError(f"{full.removesuffix('.' + rest)} has no fields")
    else:
        new = _parse(full, value, kinds[name])
    return dataclasses.replace(node, **{name: new})


def field_names() -> dict[str, list[str]]:
    """Return the names of the fields of every section of a run; "" is the run itself."""
    return dict(_each_section(RunConfig(), ""))


def _each_section(node: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    yield name, [field.name for field in dataclasses.fields(node)]
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(getattr(node, field.name)):
            yield from _each_section(getattr(node, field.name), f"{name}.{field.name}".lstrip("."))


def _parse(name: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
    except ValueError:
        raise ConfigError(f"{name} is {kind.__name__}, {value!r} is not") from None
    if kind is float and not math.isfinite(number):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return RENAMED.get(name.rpartition(".")[2], {}).get(number, number)


def to_json(run: Any) -> dict[str, Any]:
    """The config as plain numbers, strings and dicts; `from_json` reads it back."""
    return dataclasses.asdict(run)


def from_json(fields: dict[str, Any], kind: type = RunConfig) -> Any:
    """The config that `to_json` wrote.

    Raises:
        ConfigError: a field that this version does not know.
    """
    kinds = typing.get_type_hints(kind)
    for name in fields:
        if name not in kinds:
            raise ConfigError(f"saved config has an unknown field {name!r}; {nearest(name, kinds)}")
    nested = {
        name: from_json(value, kinds[name])
        if isinstance(value, dict)
        else RENAMED.get(name, {}).get(value, value)
        for name, value in fields.items()
    }
    return kind(**nested)
