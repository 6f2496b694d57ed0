"""One table of chips: memory, speeds, links, power and price; and this machine's cores."""

import dataclasses
import os
import sys
from pathlib import Path

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are bytes a second one way; vendors often add both ways."""

    kind: str  # "tpu", "gpu" or "cpu"
    dims: int  # of a TPU's torus; else 0
    hbm: float  # bytes that programs can have
    flops: float  # dense bf16 peak
    bandwidth: float  # of its memory
    link: float  # TPU: one link of the torus, one way; GPU: its whole NVLink, one way
    network: float  # its share of the node's network cards; between slices of TPUs
    host: float  # bytes of its share of the host's memory
    watts: float  # with its share of host and fans
    dollars: float  # an hour
    devices: int = 1  # that JAX sees


# TPUs: capacity, peaks, links and hosts from the "TPU7x (Ironwood)" page of the Cloud TPU
# documentation, which has all three; its ICI figure counts both directions of all links. GPUs:
# data sheets of the SXM boards; 400 Gb/s of network and DGX node power / 8 a GPU; 95% of the
# memory (XLA_PYTHON_CLIENT_MEM_FRACTION). No power is published for TPUs: ours, a guess. Dollars:
# roughly on-demand list price (TPU) and common rental (GPU) in 2026. Set your own with
# --dollars-per-hour and --watts.
# fmt: off
CHIPS = {
    #            kind dims    hbm         flops    memory   link    network   host    W    $/h  JAX
    "v5p":   Chip("tpu", 3, 95 * GIB,    459e12, 2765e9, 100e9, 6.25e9, 112 * GB,   700,  4.2),
    "v6e":   Chip("tpu", 2, 32 * GIB,    918e12, 1638e9, 100e9, 12.5e9, 180 * GB,   500,  2.7),
    "tpu7x": Chip("tpu", 3, 192 * GIB,  2307e12, 7380e9, 100e9, 12.5e9, 240 * GB, 1_300, 12.0, 2),
    "h100":  Chip("gpu", 0, 81.2e9,      989e12, 3350e9, 450e9,   50e9, 256 * GB, 1_275,  3.0),
    "h200":  Chip("gpu", 0, 143.2e9,     989e12, 4800e9, 450e9,   50e9, 256 * GB, 1_275,  3.8),
    "b200":  Chip("gpu", 0, 182.6e9,    2250e12, 8000e9, 900e9,   50e9, 256 * GB, 1_790,  5.5),
    "cpu":   Chip("cpu", 0, 0,           0.1e12,   20e9,   5e9,    1e9,        0,    50,  0.0),
}
# fmt: on
# What a device calls itself (`device_kind`), by the first part that fits.
KINDS = {
    "TPU v5 lite": "",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def peak_of(device_kind: str) -> float:
    """Peak bf16 operations a second of the device that JAX calls so; 0: not in the table."""
    known = next((chip for kind, chip in KINDS.items() if device_kind.startswith(kind)), "")
    return CHIPS[known].flops / CHIPS[known].devices if known else 0.0


# What Linux has under /dev where there is an accelerator: NVIDIA (Jetson, WSL), AMD, any GPU that
# draws; TPUs before v5, and after; Trainium.
NODES = ("nvidia*", "nvhost*", "dxg", "kfd", "dri", "accel*", "vfio", "neuron*")


def may_have_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether jax may find more than a CPU here; certainly not on a Linux without its nodes."""
    return sys.platform != "linux" or any(any(devices.glob(node)) for node in NODES)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
