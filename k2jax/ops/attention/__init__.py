"""Causal attention of one device, and each query's largest logit.

`causal_attention` chooses by length: `dense_attention`, whole scores in plain JAX, is the reference
and serves rows of up to `ATTENTION_BLOCK` tokens (`ops/limits.py`); `blockwise_attention` serves
longer ones. `blockwise.py` has both. `hopper.py`, `gpu.py` and `tpu.py` are kernels of a platform,
and `block_pairs.py` is the table of blocks for the TPU's. Names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2jax.ops.attention.blockwise import (
        blockwise_attention,
        causal_attention,
        dense_attention,
    )

__all__ = ["blockwise_attention", "causal_attention", "dense_attention"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in __all__:
        raise AttributeError(f"module 'k2jax.ops.attention' has no attribute {name!r}")
    return getattr(importlib.import_module("k2jax.ops.attention.blockwise"), name)
