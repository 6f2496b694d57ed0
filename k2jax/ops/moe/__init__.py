"""Mixture of experts, below the network: send tokens to their experts, and run the experts.

`dispatch_allgather` and `dispatch_alltoall` bring tokens to the devices of their experts
(`dispatch.py`); `expert_mlp` runs those of one device, and `reference_expert_mlp` is its reference
(`experts.py`; `experts_cpu.py` for CPUs); `grouped_matmul` multiplies rows by the matrix of their
group (`grouped.py`; `grouped_hopper.py`, `grouped_gpu.py` and `grouped_tpu.py` are the kernels of a
platform). For inference `dispatch_to_resident` and `resident_mlp` (`resident.py`) leave weights in
the stack of all layers. Names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2jax.ops.moe.dispatch import (
        Dispatch,
        buffer_rows,
        choose_dispatch,
        dispatch_allgather,
        dispatch_alltoall,
        dispatch_to_resident,
    )
    from k2jax.ops.moe.experts import expert_mlp, reference_expert_mlp, sorted_expert_mlp
    from k2jax.ops.moe.grouped import grouped_matmul
    from k2jax.ops.moe.low_bit import gather_low_bit
    from k2jax.ops.moe.resident import resident_mlp
    from k2jax.ops.moe.weights import Weights, fuse_gate_up, split_gate_up

_HOMES = {
    "Dispatch": "dispatch",
    "Weights": "weights",
    "buffer_rows": "dispatch",
    "choose_dispatch": "dispatch",
    "dispatch_allgather": "dispatch",
    "dispatch_alltoall": "dispatch",
    "dispatch_to_resident": "dispatch",
    "expert_mlp": "experts",
    "fuse_gate_up": "weights",
    "gather_low_bit": "low_bit",
    "grouped_matmul": "grouped",
    "reference_expert_mlp": "experts",
    "resident_mlp": "resident",
    "sorted_expert_mlp": "experts",
    "split_gate_up": "weights",
}

__all__ = [
    "Dispatch",
    "Weights",
    "buffer_rows",
    "choose_dispatch",
    "dispatch_allgather",
    "dispatch_alltoall",
    "dispatch_to_resident",
    "expert_mlp",
    "fuse_gate_up",
    "gather_low_bit",
    "grouped_matmul",
    "reference_expert_mlp",
    "resident_mlp",
    "sorted_expert_mlp",
    "split_gate_up",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'k2jax.ops.moe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"k2jax.ops.moe.{_HOMES[name]}"), name)
