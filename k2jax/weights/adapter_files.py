"""Adapters on disk: PEFT's files, one of our own for routed experts, and what they add to weights.

A folder has `adapter_config.json` and `adapter_model.safetensors` as `peft` writes and reads them
(0.21): `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B` [out, rank] of every linear
layer. In transformers' DeepSeek-V3 routed experts are no linear layers, so theirs are in a file
that `peft` does not read, `expert_adapters.safetensors`, under the same kind of name for each
expert: `base_model.model.model.layers.1.mlp.experts.7.gate_proj.lora_A.weight`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.params.adapters import declare_pair
from k2jax.params.arrays import Params
from k2jax.params.spec import ParamSpec
from k2jax.runtime.files import write_atomic
from k2jax.weights import quant
from k2jax.weights.encodings import F32, Tensors
from k2jax.weights.mapping import stack_slots, to_published
from k2jax.weights.safetensors import Reader, near, write

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
EXPERTS = "expert_adapters.safetensors"
PREFIX = "base_model.model."
ROWS = 512  # of a product, always: the bits of a row do not depend on which rows are asked for
# Other values of these fields are another method, or one that plain products cannot express.
PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
}


class Adapter:
    """What an adapter adds to each of its weights, under published names.

    Attributes:
        name: for messages and reports.
        scale: of the product of both matrices.
        identity: SHA-256 that changes with it.
    """

    def __init__(self, tensors: Tensors, scale: float, name: str, identity: str):
        """Nothing is read; `tensors` have names as `model.layers.0.self_attn.o_proj.lora_A.weight`.

        Raises:
            ConfigError: a matrix without its other half.
        """
        self.tensors, self.scale, self.name, self.identity = tensors, scale, name, identity
        self._weights = {
            tensor.replace(".lora_A.", ".") for tensor in tensors if ".lora_A." in tensor
        }
        for tensor in tensors:
            weight = re.sub(r"\.lora_[AB]\.", ".", tensor)
            if weight not in self._weights or _half(weight, "B") not in tensors:
                raise ConfigError(f"{name}: {tensor!r} is half an adapter, or no part of one")

    def __contains__(self, weight: object) -> bool:
        return weight in self._weights

    def __len__(self) -> int:
        return len(self._weights)

    def check(self, specs: Mapping[str, ParamSpec]) -> None:
        """Refuse an adapter of another model.

        Raises:
            ConfigError: names the first weight that the model lacks, or that has another shape.
        """
        slots = {name: leaf for leaf in specs.values() for _, name in stack_slots(leaf)}
        for weight in sorted(self._weights):
            if weight not in slots:
                raise ConfigError(f"{self.name}: the model has no {weight!r}{near(weight, slots)}")
            halves = [_half(weight, letter) for letter in "AB"]
            pair = declare_pair(slots[weight], self.tensors.shape(halves[0])[0])
            for half, leaf in zip(halves, pair, strict=True):
                if self.tensors.shape(half) != leaf.published_shape:
                    raise ConfigError(
                        f"{self.name}: {half!r} has shape {list(self.tensors.shape(half))}; the"
                        f" model needs {list(leaf.published_shape)}"
                    )

    def delta(self, weight: str, rows: slice) -> np.ndarray:
        """Float32 [rows, in] to add to rows of a published matrix."""
        a, b = (_half(weight, letter) for letter in "AB")
        height = self.tensors.shape(b)[0]
        each = min(ROWS, height)
        begin, end, _ = rows.indices(height)
        first, last = begin // each * each, min(-(-end // each) * each, height)
        narrow = self.tensors.read(b, slice(first, last)).astype(F32) * F32.type(self.scale)
        wide = self.tensors.read(a).astype(F32)
        out = np.empty((end - first, wide.shape[1]), F32)
        for at in range(0, end - first, each):
            part = narrow[at : at + each]
            block = _multiply(np.pad(part, ((0, each - len(part)), (0, 0))), wide)
            out[at : at + each] = block[: end - first - at]
        return out[begin - first :]


@quant.on_host
def _multiply(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    return jnp.dot(narrow, wide, precision="highest")


def _half(weight: str, letter: str) -> str:
    return f"{weight.removesuffix('.weight')}.lora_{letter}.weight"


class _Files:
    """The tensors of an adapter's files, without PEFT's prefix."""

    def __init__(self, readers: list[Reader]):
        self._readers = {name.removeprefix(PREFIX): reader for reader in readers for name in reader}

    def __iter__(self):
        return iter(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def file(self, name: str) -> Path:
        return self._readers[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._readers[name].shape(PREFIX + name)

    def dtype(self, name: str) -> np.dtype:
        return self._readers[name].dtype(PREFIX + name)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        return self._readers[name].read(PREFIX + name, rows)


def read_peft(folder: Path) -> Adapter:
    """The adapter in a folder of PEFT's files; its matrices are read when they are used.

    Raises:
        ConfigError: a file is missing or damaged, or has what is not plain LoRA.
    """
    try:
        text = (folder / CONFIG).read_text()
        fields = json.loads(text)
        rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CONFIG}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG} is damaged: {one_line(error, typed=True)}") from None
    for name, plain in PLAIN.items():
        if fields.get(name) not in (plain, None, {}, []):
            raise ConfigError(f"{folder / CONFIG} has {name} {fields[name]!r}; {plain!r} is read")
    files = [Reader(folder / name) for name in (MODEL, EXPERTS) if (folder / name).is_file()]
    if not files:
        raise ConfigError(f"{folder} has no {MODEL}")
    digest = hashlib.sha256(text.encode())
    for file in files:
        with file.path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    scale = alpha / rank**0.5 if fields.get("use_rslora") else alpha / rank
    return Adapter(_Files(files), scale, str(folder), digest.hexdigest())


def write_peft(
    folder: Path, params: Params, specs: Mapping[str, ParamSpec], rank: int, alpha: float, base: str
) -> None:
    """Write an adapter's folder.

    Args:
        folder: is made.
        params: the matrices of all adapters, on this host.
        specs: of the same names.
        rank: of all of them.
        alpha: they are scaled by alpha / rank.
        base: where the weights are that it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, routed in ((MODEL, False), (EXPERTS, True)):
        held = {name: leaf for name, leaf in specs.items() if leaf.routed == routed}
        tensors = {PREFIX + name: tensor for name, tensor in to_published(params, held)}
        if tensors or not routed:
            write(folder / file, tensors, {"format": "pt"})
    names = sorted({_module(leaf) for leaf in specs.values() if not leaf.routed})
    fields: dict[str, Any] = {
        **PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        # PEFT takes a module named gate_proj for routed experts, which transformers fuses, wherever
        # it is. By their parameters those of shared experts and dense MLPs are themselves.
        "target_modules": [name for name in names if "." not in name],
        "target_parameters": [f"{name}.weight" for name in names if "." in name] or None,
        "inference_mode": True,
    }
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")


def _module(leaf: ParamSpec) -> str:
    """The end of a module's name that is that of no other one: `mlp.gate_proj`, `o_proj`."""
    parts = leaf.published.split(".lora_")[0].split(".")
    return parts[-1] if "self_attn" in parts else ".".join(parts[-2:])
