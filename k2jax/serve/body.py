"""The JSON object of a request, read field by field; a wrong field is refused by its name."""

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from k2jax.serve.refusal import Refusal
from k2jax.text.unicode import replace_surrogates_in

CLOSE = 0.8  # difflib's ratio from which an unknown field counts as misspelt


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is.

    Raises:
        Refusal: it is something else.
    """
    try:
        parsed = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise Refusal("the body must be a JSON object", code="invalid_json")
    return replace_surrogates_in(parsed)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class Body:
    """A JSON object whose fields are read one after the other. null counts as absent."""

    def __init__(
        self,
        content: Mapping[str, Any],
        known: Collection[str],
        neutral: Mapping[str, tuple[Any, ...]],
    ):
        """See that no field is misspelt or asks for what there is not.

        A field of any other name is passed over, as open-source servers do.

        Args:
            content: the object.
            known: names of the fields that are read.
            neutral: fields that are not supported, and the values that ask for nothing.

        Raises:
            Refusal: a field is close to a known one, or not supported.
        """
        self._content = {name: value for name, value in content.items() if value is not None}
        for name, value in self._content.items():
            if name in neutral and value not in neutral[name]:
                raise Refusal(f"{name} is not supported", name, code="unsupported_parameter")
            if name in known or name in neutral:
                continue
            if near := difflib.get_close_matches(name, known, 1, CLOSE):
                message = f"there is no {name!r}; did you mean {near[0]!r}?"
                raise Refusal(message, name, code="unknown_parameter")

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def value(self, name: str) -> Any:
        """Whatever the field holds; None where it is absent."""
        return self._content.get(name)

    def number(
        self, name: str, default: float, least: float, most: float, *, above: bool = False
    ) -> float:
        """A number in [least, most], or in (least, most] if `above`."""
        value = self._content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "must be a number")
        inside = least < value <= most if above else least <= value <= most
        if not inside or not math.isfinite(value):
            relation = "above" if above else "at least"
            self.refuse(name, f"is {value:g}; it must be {relation} {least:g} and at most {most:g}")
        return float(value)

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """An integer in [least, most]."""
        value = self._content.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, "must be an integer")
        if not least <= value <= most:
            shown = value if abs(value) < 2**80 else "too large"
            self.refuse(name, f"is {shown}; it must be at least {least} and at most {most}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._content.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        value = self._content.get(name, default)
        if not isinstance(value, str):
            self.refuse(name, "must be a text")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; empty where it is absent."""
        value = self._content.get(name, {})
        if not isinstance(value, Mapping):
            self.refuse(name, "must be an object")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty."""
        value = self._content.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            self.refuse(name, "must be a text or a list of texts")
        if "" in values:
            self.refuse(name, "has an empty text")
        if len(values) > most:
            self.refuse(name, f"has {len(values)} texts; at most {most}")
        return tuple(values)

    def ids(self, name: str, vocab: int) -> tuple[int, ...]:
        """A list of token ids."""
        value = self._content.get(name, [])
        return check_ids(value, vocab, name)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Refuse a field."""
        raise Refusal(f"{name} {why}", name, code="invalid_value")


def check_ids(value: Any, vocab: int, name: str) -> tuple[int, ...]:
    """Token ids.

    Raises:
        Refusal: it is no list of them.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise Refusal(f"{name} must be a list of token ids", name, code="invalid_value")
    if wrong := [i for i in value if not 0 <= i < vocab]:
        message = f"{name} has the id {wrong[0]}; ids are 0..{vocab - 1}"
        raise Refusal(message, name, code="invalid_value")
    return tuple(value)
