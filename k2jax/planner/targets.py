"""What `v5p:8x8x16` or `2*h200:32x8` means: machines to plan for."""

import dataclasses
import math
import os
import re

from k2jax.config import ConfigError, nearest
from k2jax.runtime.hardware import CHIPS, Chip

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


def parse(name: str, dollars: float | None = None, watts: float | None = None) -> Target:
    """The target that `name` describes; price and power of a chip may be replaced.

    Raises:
        ConfigError: no such chip, or a shape it cannot have.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise ConfigError(f"target {name!r} is not understood; for example {EXAMPLES}")
    slices, generation = int(match[1] or 1), match[2]
    shape = tuple(map(int, match[3].split("x")))
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
