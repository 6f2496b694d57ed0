"""What the published files of each release hold: names, shapes and dtypes of all tensors.

Source: the published index files ([JLE manifest] for K2, [K25DUMP] for K2.5, [DSV3
README_WEIGHTS] for the MTP layer).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from k2jax.params.low_bit_parts import RELEASED
from k2jax.params.spec import LAYER_AXES, ParamSpec
from k2jax.weights import quant
from k2jax.weights.encodings import JUNK, Kind, parts
from k2jax.weights.hf_folder import TEXT
from k2jax.weights.mapping import stack_slots
from k2jax.weights.safetensors import NAMES

JUNK_LENGTH = 56


@dataclasses.dataclass(frozen=True)
class Release:
    """How a model is published.

    Attributes:
        form: "bf16", "fp8" or "int4".
        prefix: before every name.
        junk: whether each layer has a stray `inv_freq`.
        unlisted: tensors of other parts (vision), which are not listed.
        files: pattern of the file names; {i} counts layers from 1, {n} is the last.
        sure: whether the list was read from the published files; otherwise it follows from the
            config and a sister release.
    """

    form: str = "bf16"
    prefix: str = ""
    junk: bool = False
    unlisted: int = 0
    files: str = ""
    sure: bool = False


RELEASES = {
    "kimi_k2": Release("fp8", junk=True, files="model-{i}-of-{n}.safetensors", sure=True),
    "kimi_k2_0905": Release("fp8"),
    "kimi_k2_thinking": Release("int4"),
    "kimi_k2_5": Release("int4", prefix=TEXT, unlisted=335, sure=True),
    "moonlight_16b_a3b": Release(),
    "deepseek_v3": Release("fp8"),
}


def release_of(name: str, fields: Mapping[str, Any]) -> Release:
    """The release of that name, or what a published `config.json` tells.

    Args:
        name: of a named run.
        fields: of the `config.json`; empty for a named run.
    """
    if name in RELEASES and not fields:
        return RELEASES[name]
    text = fields.get("text_config", fields)
    found = fields.get("quantization_config") or text.get("quantization_config") or {}
    form = {"fp8": "fp8", "compressed-tensors": "int4"}.get(str(found.get("quant_method")), "bf16")
    prefix = TEXT if "text_config" in fields else ""
    return Release(form, prefix=prefix)


def published_tensors(specs: Mapping[str, ParamSpec], release: Release) -> dict[str, Kind]:
    """Dtype and shape of every tensor in the published files, in the order of layers."""
    found: dict[str, Kind] = {}
    for leaf in specs.values():
        dtype = np.dtype("float32") if leaf.group == "bias" else quant.BF16
        for name in (*(name for _, name in stack_slots(leaf)), *leaf.copies):
            found |= _held(name, leaf.published_shape, dtype, release.form)
    layers = {leaf.axes[0]: leaf for leaf in specs.values() if leaf.axes[0] in LAYER_AXES}
    count = sum(leaf.shape[0] for leaf in layers.values())
    if release.junk:
        for layer in range(count):
            found[f"model.layers.{layer}.self_attn.{JUNK}"] = (quant.BF16, (JUNK_LENGTH,))
    return {release.prefix + name: found[name] for name in sorted(found, key=_order)}


def _held(name: str, shape: tuple[int, ...], dtype: np.dtype, form: str) -> dict[str, Kind]:
    pattern = RELEASED.get(form)
    how = form if pattern and pattern.fullmatch(name) else "plain"
    return parts(name, shape, how, dtype)


def _order(name: str) -> tuple[int, str]:
    words = name.split(".")
    if words[1] == "layers":
        return int(words[2]), name
    return (-1 if "embed" in name else 10**9), name


def as_json(tensors: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Name, shape and dtype of each, as a safetensors header spells them."""
    return [
        {"name": name, "shape": list(shape), "dtype": NAMES[dtype.newbyteorder("<")]}
        for name, (dtype, shape) in tensors.items()
    ]


def total_bytes(tensors: Mapping[str, Kind]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
