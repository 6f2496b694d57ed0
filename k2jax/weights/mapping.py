"""Published tensors and our stacked arrays: which is which, checked, read and written.

Names: the releases' own index files [JLE].
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ConfigError
from k2jax.ops.lowbit import GROUP
from k2jax.params import low_bit_parts
from k2jax.params.arrays import Params, abstract_parameter
from k2jax.params.spec import LAYER_AXES, ParamSpec
from k2jax.sharding import meshless, storage_spec
from k2jax.weights.encodings import (
    JUNK,
    SCALE,
    Tensors,
    check_int4_shape,
    check_parts,
    decode,
    encoding,
    weight_of,
)
from k2jax.weights.hf_config import published_fields
from k2jax.weights.hf_folder import Folder
from k2jax.weights.other_quantisations import refuse_other
from k2jax.weights.safetensors import near

VISION = ("vision_tower.", "mm_projector.")
# Only a multi-token-prediction layer has this tensor [DSV3 README_WEIGHTS].
MTP = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")

WEIGHTS = ("stored", "decoded")  # whether low-bit weights stay so
# The tensor of each part of a low-bit parameter.
TENSORS = {"code": "", "word": "_packed"}
SCALES = {"fp8": SCALE, "int4": "_scale"}

StackIndex = tuple[int, ...]


def stack_slots(spec: ParamSpec) -> Iterator[tuple[StackIndex, str]]:
    """Every position in a parameter's stack, and the published tensor that fills it."""
    for where in itertools.product(*map(range, spec.stack)):
        yield where, published_name(spec, where)


def published_name(spec: ParamSpec, where: StackIndex) -> str:
    """The published tensor that fills one position in a parameter's stack."""
    numbers = {"l": 0, "e": 0}
    for axis, at in zip(spec.axes, where, strict=False):
        if axis in LAYER_AXES:
            numbers["l"] = spec.first_layer + at
        else:
            numbers["e"] = at
    return spec.published.format(**numbers)


def load_published(
    folder: str | Path,
    specs: Mapping[str, ParamSpec],
    dtype: str | None = "float32",
    weights: str = "decoded",
) -> Params:
    """Weights of a published folder, on the mesh in use if there is one.

    Every file is mapped, and each device gets its part straight from the mapped tensors.

    Args:
        folder: holds `model.safetensors`, or an index and the files it names.
        specs: the model's parameters.
        dtype: of the weights; None: float32 where a file has that or float16, else bfloat16. The
            router bias is always float32 (trap 6).
        weights: "stored": FP8 and INT4 ones stay as they are; "decoded": on the way.

    Raises:
        ConfigError: a missing, unknown or damaged tensor, or one of another shape or dtype; one
            line names it and its file.
    """
    source = Folder(folder)
    config = Path(folder, "config.json")
    refuse_other(source, published_fields(config) if config.is_file() else {}, str(folder))
    check(source, specs, str(source.source))
    return place(source, specs, dtype, weights)


def plain_dtype(source: Tensors, specs: Mapping[str, ParamSpec]) -> str:
    """The dtype that holds all weights which are not low-bit: bfloat16, or float32."""
    plain = (
        name
        for leaf in specs.values()
        if leaf.group != "bias"
        for _, name in stack_slots(leaf)
        if encoding(source, name) == "plain"
    )
    half = all(source.dtype(name) == jnp.bfloat16 for name in plain)
    return "bfloat16" if half else "float32"


def place(
    source: Tensors, specs: Mapping[str, ParamSpec], dtype: str | None, weights: str = "decoded"
) -> Params:
    """The arrays of `load_published`, from any tensors that were checked."""
    dtype = dtype or plain_dtype(source, specs)
    return {
        name: _place(source, leaf, "float32" if leaf.group == "bias" else dtype, weights)
        for name, leaf in specs.items()
    }


def describe_stored(source: Tensors, specs: Mapping[str, ParamSpec]) -> Params:
    """Shapes, dtypes and layouts of `place(source, specs, None, "stored")`; nothing is read."""
    dtype = plain_dtype(source, specs)
    return {
        name: abstract_parameter(
            leaf, form_of(source, leaf), "float32" if leaf.group == "bias" else dtype
        )
        for name, leaf in specs.items()
    }


def form_of(source: Tensors, leaf: ParamSpec) -> str:
    """How a parameter can be resident as its tensors hold it: "fp8", "int4", else "plain"."""
    forms = {encoding(source, name) for _, name in stack_slots(leaf)}
    form = forms.pop()
    stays = not forms and form in SCALES and low_bit_parts.can_stay(leaf, form)
    return form if stays else "plain"


def check(source: Tensors, specs: Mapping[str, ParamSpec], where: str) -> None:
    """Refuse tensors that are not exactly the model's.

    Args:
        source: the tensors.
        specs: the model's parameters.
        where: names the source.

    Raises:
        ConfigError: the first tensor that is missing, unknown, or of another shape or dtype.
    """
    wanted = {name: (ours, leaf) for ours, leaf in specs.items() for _, name in stack_slots(leaf)}
    for name, (ours, leaf) in wanted.items():
        if not encoding(source, name):
            raise ConfigError(f"{where} has no tensor {name!r}, a part of {ours!r}")
        check_parts(source, name, leaf.published_shape)
    known = wanted.keys() | {name for leaf in specs.values() for name in leaf.copies}
    mtp = extra_mtp_prefixes(source, specs)
    for name in source:
        if weight_of(name) not in known and not (
            name.startswith((*mtp, *VISION)) or name.endswith(JUNK)
        ):
            raise ConfigError(
                f"{source.file(name)}: the model has no tensor {name!r}{near(name, wanted)}"
            )


def extra_mtp_prefixes(source: Tensors, specs: Mapping[str, ParamSpec]) -> tuple[str, ...]:
    """Starts of the names of layers that predict further tokens and are no part of the model."""
    layers = max(
        leaf.first_layer + leaf.shape[0] for leaf in specs.values() if leaf.axes[0] in LAYER_AXES
    )
    found = [int(match[1]) for name in source if (match := MTP.fullmatch(weight_of(name)))]
    return tuple(f"model.layers.{layer}." for layer in found if layer >= layers)


def _place(source: Tensors, leaf: ParamSpec, dtype: str, weights: str) -> Any:
    form = form_of(source, leaf) if weights == "stored" else "plain"

    def make(attribute: str, part: ParamSpec) -> jax.Array:
        if not attribute:
            return _fill(part, dtype, functools.partial(_part, source, part))
        suffix = TENSORS.get(attribute, SCALES.get(form, ""))

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            if attribute == "word":
                check_int4_shape(source, name)
            return to_our_dims(part, source.read(name + suffix))[index]

        _check_split(part, leaf)
        return _fill(part, part.dtype, read)

    return low_bit_parts.build(leaf, form, make)


def _check_split(part: ParamSpec, leaf: ParamSpec) -> None:
    """Refuse a mesh that does not divide a part of a low-bit parameter."""
    if meshless():
        return
    layout = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(part.axes))
    try:
        layout.shard_shape(part.shape)
    except ValueError:
        raise ConfigError(
            f"the mesh splits {leaf.axes[-2]!r} inside of groups of {GROUP} inputs, which INT4"
            " weights share scales in; another mesh, or weights='decoded' (--weights decoded)"
        ) from None


def _fill(
    leaf: ParamSpec, dtype: str, read: Callable[[str, tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array on the mesh in use, made from the published tensors that fill its stack.

    Args:
        leaf: shape and layout.
        dtype: of the array.
        read: part of a tensor, with our dims.
    """

    def part(index: Any) -> np.ndarray:
        ranges = [range(n)[cut] for n, cut in zip(leaf.stack, index, strict=False)]
        shape = tuple(len(range(n)[cut]) for n, cut in zip(leaf.shape, index, strict=True))
        out = np.empty(shape, jnp.dtype(dtype))
        for at in np.ndindex(*map(len, ranges)):
            where = tuple(r[i] for r, i in zip(ranges, at, strict=True))
            out[at] = read(published_name(leaf, where), index[leaf.stacked :])
        return out

    if meshless():
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(leaf.axes))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _part(source: Tensors, leaf: ParamSpec, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """One device's part of a tensor; only the rows it needs are read and decoded."""
    if leaf.contracted == 1 and len(index) == 2:
        return decode(source, name, index[1]).T[index[0]]
    return to_our_dims(leaf, decode(source, name))[index]


def to_our_dims(leaf: ParamSpec, tensor: np.ndarray) -> np.ndarray:
    """A published [out, in] matrix as our [in..., out...], without a copy."""
    if not leaf.contracted:
        return tensor
    inner = leaf.shape[leaf.stacked :]
    outs = len(inner) - leaf.contracted
    view = tensor.reshape(inner[leaf.contracted :] + inner[: leaf.contracted])
    return view.transpose(*range(outs, len(inner)), *range(outs))


def to_published(
    params: Mapping[str, Any], specs: Mapping[str, ParamSpec], dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Published name and array of every tensor, the inverse of `load_published`.

    Args:
        params: all on this host.
        specs: the same names.
        dtype: of the weights; None: as they are. The router bias stays float32.
    """
    for name, leaf in specs.items():
        whole = np.asarray(params[name])
        kind = whole.dtype if dtype is None or leaf.group == "bias" else jnp.dtype(dtype)
        for where, published in stack_slots(leaf):
            tensor = whole[where]
            if leaf.contracted:
                tensor = tensor.reshape(leaf.matrix).T
            yield published, np.ascontiguousarray(tensor, kind)
            yield from ((copy, np.ascontiguousarray(tensor, kind)) for copy in leaf.copies)
