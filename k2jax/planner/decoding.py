"""Decoding on a mesh: memory, time of a token, and what bounds it."""

import dataclasses
import math

from k2jax.config import MeshConfig, ModelConfig
from k2jax.params.counts import count_flops
from k2jax.params.kimi import declare_kimi
from k2jax.planner import network
from k2jax.planner.network import Wire
from k2jax.planner.partition import device_size
from k2jax.planner.roofline import Roofline
from k2jax.planner.targets import Target

BF16 = 2  # bytes of a weight and of a cached number


@dataclasses.dataclass(frozen=True)
class Decode(Roofline):
    """One token in every row of a batch, on one device; bytes, operations, seconds."""

    mesh: MeshConfig
    target: Target
    batch: int
    memory: dict[str, float]
    flops: float
    memory_traffic: float
    wire: Wire

    @property
    def peak(self) -> float:
        """Bytes held."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether they fit the device."""
        return self.peak <= self.target.hbm

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds of each resource for one token in every row."""
        return {
            "compute": self.flops / self.target.flops,
            "memory": self.memory_traffic / self.target.bandwidth,
            "network": network.seconds(self.wire, self.mesh, self.target),
        }


def decode(cfg: ModelConfig, mesh: MeshConfig, target: Target, batch: int, context: int) -> Decode:
    """The plan of decoding `batch` rows with `context` tokens each in the cache.

    Weights stay where they are used: bf16, experts over `expert` and `model`, the rest copied along
    the batch axes. Attention is absorbed: a token leaves kv_rank + rope numbers a layer.
    """
    cfg = dataclasses.replace(cfg, mtp_layers=0)  # no part of decoding token by token
    rows = batch / (mesh.replica * mesh.data * mesh.expert)
    specs = declare_kimi(cfg)
    held = {name: BF16 * device_size(leaf, mesh, gathered=True) for name, leaf in specs.items()}
    latent = cfg.kv_rank + cfg.rope
    cache = BF16 * rows * context * cfg.layers * latent
    routed = sum(n for name, n in held.items() if specs[name].routed)
    # Experts that any of the batch's choices falls on, were they even.
    chosen = 1 - (1 - cfg.experts_per_token / cfg.experts) ** (batch / mesh.data / mesh.replica)
    read = sum(held.values()) - held["embed"] - routed * (1 - chosen)
    counted = count_flops(cfg, context)
    absorbed = counted["absorbed_attention_flops_per_token_per_key"]
    logits = 4 * rows * cfg.vocab / mesh.model
    scores = 4 * rows * context * cfg.heads / mesh.model
    return Decode(
        mesh=mesh,
        target=target,
        batch=batch,
        memory={"weights": sum(held.values()), "cache": cache, "logits": logits, "scores": scores},
        flops=rows * (counted["matmul_flops_per_token"] + absorbed * context) / mesh.model,
        memory_traffic=read + cache + 2 * (logits + scores * cfg.layers),
        wire=_wire(cfg, mesh, rows),
    )


def _wire(cfg: ModelConfig, mesh: MeshConfig, rows: float) -> Wire:
    wire: Wire = {}
    row = BF16 * rows * cfg.embed
    network.add(wire, "all-gather", ["expert"], mesh, cfg.moe_layers * row * mesh.expert)
    network.add(wire, "reduce-scatter", ["expert"], mesh, cfg.moe_layers * row * mesh.expert)
    sums = 2 * cfg.layers + cfg.moe_layers
    network.add(wire, "all-reduce", ["model"], mesh, 2 * sums * row)
    return wire


def best(cfg: ModelConfig, target: Target, batch: int, context: int, meshes) -> list[Decode]:
    """Meshes over `data`, `expert` and `model` that divide model and batch, best first."""
    plans = [
        decode(cfg, mesh, target, batch, context)
        for mesh in meshes
        if mesh.context == 1 and batch % math.prod((mesh.replica, mesh.data, mesh.expert)) == 0
    ]
    return sorted(plans, key=lambda d: (not d.fits, d.seconds if d.fits else d.peak))
