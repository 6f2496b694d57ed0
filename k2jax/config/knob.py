"""A knob is one field of a config, with its explanation, choices, bounds and when it has effect."""

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from k2jax.config.errors import ConfigError, check_float32, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """What `knob` was called with."""

    text: str
    choices: tuple[str, ...] = ()
    several: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    unless: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """Return the explanation with the choices, as `k2jax train CONFIG --help` prints it."""
        return f"{self.text}: {', '.join(self.choices)}" if self.choices else self.text

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is no choice or out of bounds.

        Raises:
            ConfigError: names the setting, its value and what is allowed.
        """
        if self.several:
            for part in filter(None, value.split(",")):
                if part not in self.choices:
                    raise ConfigError(f"{name} names {part!r}; {nearest(part, self.choices)}")
        elif self.choices and value not in self.choices:
            raise ConfigError(f"{name} is {value!r}; {nearest(value, self.choices)}")
        elif bounds := self._describe_broken_bounds(value):
            raise ConfigError(f"{name} is {value}; it must be {bounds}")
        elif isinstance(value, float):
            check_float32(name, value)

    def _describe_broken_bounds(self, value: float) -> str:
        # Negated, so that NaN is out of bounds too.
        too_low = self.low is not None and not value >= self.low
        too_high = self.high is not None and not value <= self.high
        if self.high is not None and (too_low or too_high):
            return f"in {self.low:g}..{self.high:g}"
        if too_low:
            return f"at least {self.low:g}"
        return (
            f"more than {self.above:g}" if self.above is not None and not value > self.above else ""
        )

    def describe_idleness(self, config: Any) -> str:
        """Name the other setting that leaves this one without effect in `config`, if one does."""
        for name, value in self.unless.items():
            if operator.attrgetter(name)(config) == value:
                return f"{name} {value}"
        return ""


def knob(default: Any, text: str, **rules: Any) -> Any:
    """Declare a dataclass field: `knob("full", "what is recomputed", choices=REMAT)`.

    Args:
        default: its value where none is set.
        text: one line for `k2jax train CONFIG --help`.
        **rules: `choices` (the values that are allowed; with `several=True` a list a,b of them);
            `low` and `high` (bounds, both included) or `above` (a bound, excluded); `unless`
            (values of other settings, each of which leaves this one without effect).
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(text=text, **rules)})


def each_knob(node: Any, prefix: str = "") -> Iterator[tuple[str, Knob, Any]]:
    """Yield dotted name, knob and value of every setting, those of nested sections last."""
    values = {field: getattr(node, field.name) for field in dataclasses.fields(node)}
    for field, value in values.items():
        if "knob" in field.metadata:
            yield f"{prefix}{field.name}", field.metadata["knob"], value
    for field, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from each_knob(value, f"{prefix}{field.name}.")


def check_fields(section: str, node: Any) -> None:
    """Check every field of one section by its own knob.

    Raises:
        ConfigError: the first value that cannot be.
    """
    for name, each, value in each_knob(node, f"{section}."):
        each.check(name, value)
