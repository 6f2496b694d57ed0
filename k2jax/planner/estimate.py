"""One plan from formulas: memory, work, traffic and time of a training step on a mesh."""

import dataclasses

from k2jax.config import MESH_AXES, MeshConfig, RunConfig
from k2jax.params.counts import count_flops
from k2jax.planner import hbm as memory
from k2jax.planner import network, newton, traffic
from k2jax.planner import step_flops as work
from k2jax.planner.network import Wire
from k2jax.planner.roofline import Roofline
from k2jax.planner.step_flops import Case
from k2jax.planner.targets import Target

# By how much of the formulas' temporaries compilers exceeded them at most, in the cases that
# docs/scaling.md lists; at the optimizer's moment on TPUs never.
EXCESS = {"tpu": 0.083, "gpu": 0.12, "cpu": 0.0}


@dataclasses.dataclass(frozen=True)
class Estimate(Roofline):
    """What a step takes on one device; bytes, operations, seconds."""

    case: Case
    target: Target
    arguments: dict[str, float]
    moments: dict[str, dict[str, float]]
    flops: float
    optimizer_flops: float
    wire: Wire
    memory_traffic: float

    @property
    def mesh(self) -> MeshConfig:
        """Of the devices."""
        return self.case.mesh

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.arguments.values()) + sum(self.moments[self.worst].values())

    @property
    def worst(self) -> str:
        """The moment that needs the most memory."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All of the worst moment, largest first."""
        parts = self.arguments | self.moments[self.worst]
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    @property
    def peak_with_headroom(self) -> float:
        """Bytes at the worst moment if the compiler takes as much more as it ever did."""
        kind = self.target.chip.kind
        return sum(self.arguments.values()) + max(
            sum(parts.values()) * (1 if (kind, name) == ("tpu", "optimizer") else 1 + EXCESS[kind])
            for name, parts in self.moments.items()
        )

    @property
    def fits(self) -> bool:
        """Whether the worst moment fits the device, with headroom."""
        return self.peak_with_headroom <= self.target.hbm

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds of each resource at its peak rate, were it alone."""
        return {
            "compute": (self.flops + self.optimizer_flops) / self.target.flops,
            "memory": self.memory_traffic / self.target.bandwidth,
            "network": network.seconds(self.wire, self.mesh, self.target),
        }

    @property
    def overlapped(self) -> float:
        """Of a step that hides everything behind its slowest resource: the optimistic end."""
        return max(self.roofline.values())

    def mfu(self, seconds: float) -> float:
        """Share of peak that a step of so many seconds would use for the model's own operations."""
        run = self.case.run
        tokens = run.data.rows * run.data.context / self.target.devices
        flops = count_flops(run.model, run.data.context)["train_flops_per_token"]
        return flops * tokens / seconds / self.target.flops


def estimate(run: RunConfig, mesh: MeshConfig, accumulate: int, target: Target) -> Estimate:
    """The plan of a training step in `accumulate` micro-batches."""
    case = Case(run, mesh, accumulate, target.chip.kind)
    arguments, moments = memory.arguments(case), memory.moments(case)
    return Estimate(
        case=case,
        target=target,
        arguments=arguments,
        moments=moments,
        flops=work.step_flops(case),
        optimizer_flops=newton.optimizer_flops(case),
        wire=traffic.merged(traffic.step_wire(case), newton.optimizer_wire(case)),
        memory_traffic=_memory_traffic(case, arguments, moments["layers"]),
    )


def _memory_traffic(case: Case, held: dict[str, float], layers: dict[str, float]) -> float:
    """Count bytes read and written: weights in each pass, activations, scores, optimizer state."""
    cfg = case.model
    micro = case.accumulate * (case.gathers + 1)
    weights = case.mixtures * layers["layer gradients"] * 2 * micro  # weights are of their size
    rows = 2 * micro * case.layers * 6 * case.width * case.tokens * cfg.embed
    pairs = case.tokens * cfg.experts_per_token if case.exchanges else case.pairs
    experts = case.mixtures * case.width * pairs * (4 * cfg.embed + 6 * cfg.expert_ffw)
    scores = 0.0
    if not case.blocks:
        heads = cfg.heads / case.mesh.model
        scores = 12.0 * micro * case.layers * heads * case.tokens * case.run.data.context
    rows_of_head = case.predictions * case.accumulate * case.tokens
    logits = 16.0 * rows_of_head * cfg.vocab / case.mesh.model
    state = 4 * (held["weights"] + held["optimizer"])
    return weights + rows + micro * experts + scores + logits + state


def as_mesh(sizes: tuple[int, ...]) -> MeshConfig:
    """Sizes in the order of MESH_AXES."""
    return MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
