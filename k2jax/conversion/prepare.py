"""What a conversion will do, known from headers alone."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from k2jax.config import MESH_AXES, ConfigError, MeshConfig, ModelConfig, nearest
from k2jax.conversion.hf_files import MODEL_TYPES, exported_config
from k2jax.model import Kimi
from k2jax.params.declare import specs
from k2jax.params.spec import ParamSpec
from k2jax.weights import mapping as published
from k2jax.weights.converted_write import WHOLE, Leaf, layout
from k2jax.weights.encodings import FORMATS, PLAIN, ReencodedTensors, encoding, weight_of
from k2jax.weights.hf_folder import Folder
from k2jax.weights.mapping import VISION, stack_slots
from k2jax.weights.object_store import REMOTE, Bucket
from k2jax.weights.other_quantisations import refuse_other
from k2jax.weights.source import Source, open_adapter, open_source

TO = ("orbax", "hf")
OURS = ("keep", "bfloat16", "float32")
GB = 10**9
# A tensor on its way is there as it was read, as it is written, and once between.
COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """As in `k2jax.convert`."""

    to: str = ""
    format: str = ""
    mesh: str = ""
    memory: float = 2.0
    manifest: str = ""
    skip_mtp: bool = False
    model_type: str = ""
    adapter: str = ""
    verify: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what is misspelt."""
        choices = (
            ("to", self.to, TO),
            ("format", self.format, FORMATS),
            ("model-type", self.model_type, MODEL_TYPES),
        )
        for name, value, known in choices:
            if value and value not in known:
                raise ConfigError(f"--{name} is {value!r}; {nearest(value, known)}")
        if not (math.isfinite(self.memory) and self.memory > 0):
            raise ConfigError(f"--memory is {self.memory}; it must be more than 0")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        source: where the weights are read.
        target: the folder to make.
        to: "orbax" or "hf".
        options: as given, `format` filled in.
        view: the source's tensors as they will be written.
        specs: the model's parameters.
        leaves: arrays to write, where `to` is "orbax".
        mtp: starts of the names of layers past the model's last.
        notes: what is odd, but does no harm.
    """

    source: Source
    target: Path
    to: str
    options: Options
    view: ReencodedTensors
    specs: Mapping[str, ParamSpec]
    leaves: list[Leaf]
    mtp: tuple[str, ...]
    notes: list[str]

    @property
    def work(self) -> Path:
        """Where the target is made."""
        return self.target.with_name(self.target.name + ".unfinished")

    @property
    def fingerprint(self) -> str:
        """Changes with the source's headers and with what is to be made of it."""
        asked = [self.to, self.options.format, self.options.mesh, self.options.skip_mtp]
        if self.options.model_type != MODEL_TYPES[0]:
            asked.append(self.options.model_type)
        if self.view.adapter is not None:
            asked.append(self.view.adapter.identity)
        text = json.dumps([self.source.identity, asked])
        return hashlib.sha256(text.encode()).hexdigest()

    def extras(self) -> list[str]:
        """Tensors that are kept beside the parameters: prediction layers, and junk."""
        taken = {weight for leaf in self.specs.values() for _, weight in stack_slots(leaf)}
        return [name for name in self.view if weight_of(name) not in taken]

    def sizes(self) -> Iterator[int]:
        """Bytes of each tensor to write."""
        for name in self.view:
            dtype, shape = self.view.kind(name)
            yield math.prod(shape) * dtype.itemsize

    def bytes_in(self) -> int:
        """Bytes of the source's tensors."""
        tensors = self.source.tensors
        return sum(math.prod(tensors.shape(n)) * tensors.dtype(n).itemsize for n in tensors)

    def largest(self) -> int:
        """Bytes that the largest tensor takes on its way."""
        return COPIES * min(WHOLE, max(self.sizes()))

    def skipped(self) -> dict[str, int]:
        """How many tensors of each kind are left out, and kept though no parameter has them."""
        names = list(self.source.tensors)
        counts = {
            "vision": sum(name.startswith(VISION) for name in names),
            "mtp": sum(name.startswith(self.mtp) for name in names) if self.mtp else 0,
        }
        if not self.options.skip_mtp:
            counts["mtp"] = 0
        return {kind: n for kind, n in counts.items() if n}


def make_plan(
    path: Path, target: str | Path, options: Options, bucket: Bucket | None = None
) -> Plan:
    """Read every header of the source, and say what will be done.

    Args:
        path: of the source, a folder of this machine.
        target: the folder to make.
        options: as given.
        bucket: where the source's weights are, if not in its folder.

    Raises:
        ConfigError: anything that can be known to be wrong before data is read.
    """
    target = _check_target(target)
    source = open_source(path, bucket)
    if source.base is not None:
        raise ConfigError(
            f"{path} holds an adapter; k2jax convert {source.base.path} TARGET --adapter {path}"
            " merges it"
        )
    to = options.to or ("hf" if source.is_checkpoint else "orbax")
    if to == "orbax" and source.is_checkpoint:
        raise ConfigError(f"{path} is one of our checkpoints already; --to hf writes safetensors")
    if target == source.folder or source.folder in target.parents:
        raise ConfigError(f"the target {target} is the source or inside of it")
    if isinstance(source.tensors, Folder):
        refuse_other(source.tensors, source.fields, source.name)
        source.tensors.inspect()
    leaves = specs(Kimi(without_mtp(source.config)))
    published.check(source.tensors, leaves, str(source.folder))
    mtp = published.extra_mtp_prefixes(source.tensors, leaves)
    options = dataclasses.replace(options, format=_format(options, to, source))
    skip = VISION + (mtp if options.skip_mtp else ())
    adapter = open_adapter(options.adapter) if options.adapter else None
    if adapter is not None:
        adapter.check(leaves)
    view = ReencodedTensors(source.tensors, options.format, skip, adapter)
    _check_options(options, to, mtp)
    arrays = layout(leaves, view, _mesh(options.mesh)) if to == "orbax" else []
    notes = source.tensors.notes() if isinstance(source.tensors, Folder) else []
    notes += _describe_rounding(view)
    plan = Plan(source, target, to, options, view, leaves, arrays, mtp, notes)
    if plan.largest() > options.memory * GB:
        raise ConfigError(
            f"--memory is {options.memory:g} GB; the largest tensor takes"
            f" {plan.largest() / GB:.2f} GB on its way"
        )
    if to == "hf":
        options = dataclasses.replace(options, model_type=options.model_type or MODEL_TYPES[0])
        plan = dataclasses.replace(plan, options=options)
        exported_config(source, options.format, options.model_type, ())
    return plan


def _check_target(target: str | Path) -> Path:
    if str(target).startswith(REMOTE):
        raise ConfigError(
            f"the target {target} is not on this machine; convert into a folder here and copy that"
        )
    target = Path(target).absolute()
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"the target {target} cannot be made: {path} is a file")
    return target


def _check_options(options: Options, to: str, mtp: tuple[str, ...]) -> None:
    if to == "orbax" and options.format not in OURS:
        raise ConfigError(
            f"--format {options.format} is for --to hf; our checkpoints have {', '.join(OURS)}"
        )
    if to == "orbax" and options.model_type:
        raise ConfigError("--model-type has no effect with --to orbax")
    if to == "hf" and options.mesh:
        raise ConfigError("--mesh has no effect with --to hf")
    if options.skip_mtp and not mtp:
        raise ConfigError("--skip-mtp has no effect: the source has no such layers")


def _format(options: Options, to: str, source: Source) -> str:
    if options.format:
        return options.format
    tensors = source.tensors
    plain = {tensors.dtype(n) for n in tensors if encoding(tensors, n) == "plain"}
    quantised = any(encoding(tensors, weight_of(n)) != "plain" for n in tensors)
    if to == "hf":
        kept = source.is_checkpoint or options.adapter
        return "keep" if quantised and kept else "bfloat16"
    wide = not quantised and all(kind in PLAIN[1:] for kind in plain)
    return "float32" if wide else "bfloat16"


def _describe_rounding(view: ReencodedTensors) -> list[str]:
    """What a conversion loses of plain weights, if anything."""
    wide = {
        view.source.dtype(weight)
        for weight, how in view.encoded.items()
        if encoding(view.source, weight) == "plain"
        and (how != "plain" or view.dtype(weight) != view.source.dtype(weight))
        and not (how == "plain" and view.dtype(weight) == np.float32)
    }
    names = " and ".join(sorted(map(str, wide)))
    keep = "; --format float32 keeps them" if wide and view.form == "bfloat16" else ""
    return [f"{names} weights are rounded to {view.form}{keep}"] if wide else []


def without_mtp(model: ModelConfig) -> ModelConfig:
    """The model without its MTP layers: a conversion carries them by name, as `extras`."""
    return dataclasses.replace(model, mtp_layers=0)


def _mesh(text: str) -> jax.sharding.AbstractMesh | None:
    """`data=16,expert=32` as a mesh without devices."""
    if not text:
        return None
    sizes = {}
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in MESH_AXES:
            raise ConfigError(f"--mesh has no axis {axis!r}; {nearest(axis, MESH_AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {word!r}: an axis takes a number of devices, as in data=16")
        sizes[axis] = int(size)
    return jax.sharding.AbstractMesh(MeshConfig(**sizes).shape, MESH_AXES)
