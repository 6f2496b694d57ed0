"""Hardware: one table of chips, and what `v5p:8x8x16` or `2*h200:32x8` means."""

import dataclasses
import math
import os
import re

from k2jax.config import ConfigError, nearest

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
}  # fmt: skip
EXAMPLES = "v5p:8x8x16, v6e:16x16, tpu7x:4x8x8, h100:128x8 (nodes x GPUs), cpu:8, 2*v5p:8x8x8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Machines to plan for: `slices` times a torus of chips, or nodes x GPUs."""

    name: str
    generation: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them: two a chip on tpu7x."""
        return self.chips * self.chip.devices

    @property
    def hbm(self) -> float:
        """Bytes of memory of a device."""
        return self.chip.hbm / self.chip.devices

    @property
    def flops(self) -> float:
        """Peak bf16 operations a second of a device."""
        return self.chip.flops / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Bytes a second between a device and its memory."""
        return self.chip.bandwidth / self.chip.devices


def peak_of(device_kind: str) -> float:
    """Peak bf16 operations a second of the device that JAX calls so; 0: not in the table."""
    known = next((chip for kind, chip in KINDS.items() if device_kind.startswith(kind)), "")
    return CHIPS[known].flops / CHIPS[known].devices if known else 0.0


def parse(name: str, dollars: float | None = None, watts: float | None = None) -> Target:
    """The target that `name` describes; price and power of a chip may be replaced.

    Raises:
        ConfigError: no such chip, or a shape it cannot have.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if not found:
        raise ConfigError(f"target {name!r} is not understood; for example {EXAMPLES}")
    slices, generation = int(found[1] or 1), found[2]
    shape = tuple(map(int, found[3].split("x")))
    if generation not in CHIPS:
        raise ConfigError(f"no target {generation!r}; {nearest(generation, CHIPS)}")
    chip = CHIPS[generation]
    wanted = {"tpu": chip.dims, "gpu": 2, "cpu": 1}[chip.kind]
    if len(shape) != wanted or 0 in shape or not slices:
        says = {"tpu": f"a torus of {chip.dims} sizes", "gpu": "nodes x GPUs", "cpu": "devices"}
        raise ConfigError(
            f"target {name!r}: {generation} takes {says[chip.kind]}; for example {EXAMPLES}"
        )
    if chip.kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / math.prod(shape)
        chip = dataclasses.replace(
            chip, hbm=memory, host=memory, watts=chip.watts / math.prod(shape)
        )
    chip = dataclasses.replace(
        chip,
        dollars=chip.dollars if dollars is None else dollars,
        watts=chip.watts if watts is None else watts,
    )
    return Target(name, generation, chip, shape, slices)
