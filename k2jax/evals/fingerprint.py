"""What tells the weights and the tokenizer of one evaluation from those of another."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.model import Model

# What token ids depend on.
TOKENIZER_FILES = (
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def fingerprint_weights(model: Model) -> str:
    """Return 16 hex digits that change with any weight, on any mesh the same.

    Sums over the bits of each array, so that no weight leaves its device. All processes call it.
    """
    leaves = {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name, a in model.params.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(a)[0]
    }
    sums = jax.device_get(_sum_bits(leaves))
    facts = {
        name: [list(leaf.shape), str(leaf.dtype), *map(int, sums[name])]
        for name, leaf in sorted(leaves.items())
    }
    text = json.dumps([repr(model.config), facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _sum_bits(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sum_one(leaf) for name, leaf in leaves.items()}


def _sum_one(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum bits and a mixture of them, modulo 2^32: in any order the same."""
    size = jnp.dtype(leaf.dtype).itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    if leaf.dtype in (jnp.int4, jnp.uint4):
        bits = leaf.astype(jnp.int8).astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    mixed = (bits ^ (bits >> 15)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return bits.sum(dtype=jnp.uint32), (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def fingerprint_tokenizer(folder: Path) -> str:
    """Return 16 hex digits that change with the files of the tokenizer and its chat template."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (file := folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
