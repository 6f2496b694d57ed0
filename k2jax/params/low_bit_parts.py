"""Which parameters are published in few bits, and how their parts are laid out. Needs no jax."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from k2jax.ops.limits import BLOCK, GROUP, PER_WORD
from k2jax.params.spec import ParamSpec

# What the FP8 releases quantise: every projection of attention and MLPs [JLE manifest], and INT4
# ones: those of routed experts [K25DUMP]. eh_proj of an MTP layer stays bfloat16.
_PROJECTION = r"(gate|up|down)_proj\.weight"
RELEASED = {
    "fp8": re.compile(
        r".*\.(self_attn\.(q|q_a|q_b|kv_a|kv_b|o)_proj(_with_mqa)?\.weight"
        rf"|mlp\.(.+\.)?{_PROJECTION})"
    ),
    "int4": re.compile(rf".*\.mlp\.experts\.\d+\.{_PROJECTION}"),
}


def _kinds() -> dict[str, type]:
    """The pytree of each form. Imported here: the planner needs the parts only, without jax."""
    from k2jax.ops.lowbit import Fp8, Int4

    return {"fp8": Fp8, "int4": Int4}


def is_released_in(spec: ParamSpec, form: str) -> bool:
    """Whether releases of a form, "fp8" or "int4", have this parameter in few bits."""
    return bool(RELEASED[form].fullmatch(spec.published.format(l=0, e=0)))


def can_stay(spec: ParamSpec, form: str) -> bool:
    """Whether the parameter can be resident as such a form publishes it."""
    matrix = spec.group == "muon"
    if form == "fp8":
        return matrix
    inner = len(spec.shape) - spec.stacked
    return matrix and inner == 2 and spec.contracted == 1 and spec.matrix[0] % GROUP == 0


def parts_of(spec: ParamSpec, form: str) -> dict[str, ParamSpec]:
    """The parts of a low-bit parameter by the names of their attributes, as parameters."""
    rows, columns = spec.matrix

    def part(shape: tuple[int, ...], axes: tuple[str, ...], dtype: str) -> ParamSpec:
        return dataclasses.replace(
            spec, shape=(*spec.stack, *shape), axes=axes, contracted=1, dtype=dtype
        )

    if form == "int4":
        return {
            "word": part((rows // PER_WORD, columns), spec.axes, "int32"),
            "scale": part((rows // GROUP, columns), spec.axes, "bfloat16"),
        }
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    return {
        "code": dataclasses.replace(spec, dtype="float8_e4m3fn"),
        "scale": part(blocks, (*spec.axes[: spec.stacked], "", ""), "float32"),
    }


def build(spec: ParamSpec, form: str, make: Callable[[str, ParamSpec], Any]) -> Any:
    """A parameter made part by part; "plain" has one.

    Args:
        spec: the parameter.
        form: "plain", "fp8" or "int4".
        make: makes a part from its name, "" of a plain one, and what `parts_of` says of it.
    """
    if form == "plain":
        return make("", spec)
    return _kinds()[form](**{name: make(name, part) for name, part in parts_of(spec, form).items()})


def map_parts(stored: Any, spec: ParamSpec, change: Callable[[Any, ParamSpec], Any]) -> Any:
    """A parameter, plain or low-bit, with every array of it changed."""
    form = next((form for form, kind in _kinds().items() if isinstance(stored, kind)), "plain")
    return build(
        spec, form, lambda name, part: change(getattr(stored, name) if name else stored, part)
    )


def forms_of(specs: Mapping[str, ParamSpec], form: str) -> dict[str, str]:
    """How each parameter is resident if the weights are those of a release of this form."""
    return {
        name: form
        if form in RELEASED and is_released_in(spec, form) and can_stay(spec, form)
        else "plain"
        for name, spec in specs.items()
    }
