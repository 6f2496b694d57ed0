"""Read the golden files, and put published tensors into our parameters without our converter."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from k2jax.config import ModelConfig
from k2jax.model import Kimi
from k2jax.params.declare import specs
from k2jax.weights.hf_config import from_published

NAMES = ("kimi", "moonlight", "deepseek")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One tiny model: what transformers computes with it."""

    cfg: ModelConfig
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def params(self, kind: str = "weight", dtype: str = "float32") -> dict:
        """The tensors called `kind`/..., as our parameters; a missing bias gradient is zero."""
        return {
            name: _stacked(leaf, self.arrays, kind).astype(
                "float32" if leaf.group == "bias" else dtype
            )
            for name, leaf in specs(Kimi(self.cfg)).items()
        }


def _stacked(leaf, arrays: dict[str, np.ndarray], kind: str) -> np.ndarray:
    out = np.zeros(leaf.shape, np.float32)
    for index in np.ndindex(leaf.stack):
        layer, expert = (*index, 0, 0)[:2]
        name = leaf.published.format(l=leaf.first_layer + layer, e=expert)
        if kind == "grad" and leaf.group == "bias":
            continue
        tensor = arrays[f"{kind}/{name}"]
        assert tensor.shape == leaf.published_shape, name
        out[index] = (tensor.T if leaf.contracted else tensor).reshape(out[index].shape)
    return out


def wrap(arrays: dict[str, np.ndarray]) -> Golden:
    """A result of `make.oracle`."""
    return Golden(from_published(json.loads(str(arrays["config"]))), arrays)


@functools.cache
def golden(name: str) -> Golden:
    """The golden file `name`.npz."""
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        return wrap(dict(file))
