"""Every mesh of a target's devices: the fastest that fits, and why the others lose."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from k2jax.config import MESH_AXES, ConfigError, MeshConfig, RunConfig, override
from k2jax.planner.estimate import Estimate, as_mesh, estimate
from k2jax.planner.partition import indivisible_axis
from k2jax.planner.targets import Target
from k2jax.sharding.torus import part_of_slice

# What a step can be changed to, one thing at a time, and in words.
REMEDIES = {
    "tokens exchanged instead of gathered": {"train.dispatch": "alltoall"},
    "full rematerialisation": {"train.remat": "full"},
    "layers' inputs kept by the host": {"train.remat": "offload"},
    "bf16 compute": {"train.dtype": "bfloat16"},
    "bf16 momentum": {"optim.momentum_dtype": "bfloat16"},
}


LESS = 0.98  # of the memory of a plan that did not fit


@dataclasses.dataclass(frozen=True)
class Search:
    """What was looked at."""

    plans: list[Estimate]  # best first; those that do not fit last, nearest first
    refused: Counter[str]  # meshes by the logical axis that they do not divide

    @property
    def best(self) -> Estimate:
        """The fastest that fits, else the one nearest to fitting."""
        return self.plans[0]


def search(run: RunConfig, target: Target, fixed: dict[str, int], keep: bool) -> Search:
    """Try all meshes; a mesh that does not fit is given more and smaller micro-batches.

    Args:
        run: gives model, batch and what the program does.
        target: gives the devices.
        fixed: sizes of mesh axes that are not to be searched.
        keep: leave `train.accumulate` as it is.

    Raises:
        ConfigError: no mesh divides the model and the batch.
    """
    refused: Counter[str] = Counter()
    plans: list[Estimate] = []
    for mesh in meshes(target.devices, fixed, target.slices):
        axis = indivisible_axis(run.model, mesh, run.data.context) or _uneven_rows(
            run, mesh, run.train.accumulate if keep else 1
        )
        if axis:
            refused[axis] += 1
        else:
            plans.append(_fitting(run, mesh, target, keep))
    if not plans:
        worst = ", ".join(f"{axis} ({n} meshes)" for axis, n in refused.most_common(3))
        raise ConfigError(
            f"no mesh of {target.devices} devices divides the run; what does not divide: {worst}"
        )
    plans.sort(key=lambda e: (not e.fits, e.seconds if e.fits else e.peak))
    return Search(plans, refused)


def meshes(devices: int, fixed: dict[str, int], slices: int = 1) -> Iterator[MeshConfig]:
    """List every way to write `devices` as a product of axis sizes; each slice has all weights.

    Raises:
        ConfigError: the fixed sizes do not divide the devices, or `replica` is no multiple of the
            slices.
    """
    fixed = {"replica": slices} | fixed
    part_of_slice(MeshConfig(replica=fixed["replica"]), slices)
    free = [axis for axis in MESH_AXES if axis not in fixed]
    left = devices
    for axis, size in fixed.items():
        if left % size:
            raise ConfigError(f"mesh {axis}={size} does not divide {left} of {devices} devices")
        left //= size
    if not free and left > 1:
        raise ConfigError(f"the mesh takes {devices // left} devices, the target has {devices}")
    for sizes in _products(left, len(free)):
        chosen = fixed | dict(zip(free, sizes, strict=True))
        yield as_mesh(tuple(chosen[axis] for axis in MESH_AXES))


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 0:
        yield ()
    elif factors == 1:
        yield (number,)
    else:
        for size in (n for n in range(1, number + 1) if number % n == 0):
            for rest in _products(number // size, factors - 1):
                yield (size, *rest)


def _uneven_rows(run: RunConfig, mesh: MeshConfig, accumulate: int) -> str:
    """Name the rows where the mesh and the micro-batches do not divide them; else empty."""
    spread = mesh.replica * mesh.data * mesh.expert * accumulate
    return "rows" if run.data.rows % spread else ""


def _fitting(run: RunConfig, mesh: MeshConfig, target: Target, keep: bool) -> Estimate:
    """With the fewest micro-batches that fit; with the most there can be if none does."""
    spread = mesh.replica * mesh.data * mesh.expert
    if keep:
        return estimate(run, mesh, run.train.accumulate, target)
    counts = [n for n in (2**i for i in range(20)) if run.data.rows % (n * spread) == 0]
    most = estimate(run, mesh, counts[-1], target)
    if not most.fits:
        return most
    for count in counts:
        tried = estimate(run, mesh, count, target)
        if tried.fits:
            return tried
    return most


def candidates(searched: Search, keep: bool) -> Iterator[Estimate]:
    """Yield the plans to compile until one fits: the fastest first.

    Asking for the next one says that the last did not fit: then those follow that need less, the
    same mesh in more micro-batches among them.

    Args:
        searched: of a run.
        keep: leave `train.accumulate` as it is.
    """
    waiting = [plan for plan in searched.plans if plan.fits] or searched.plans[:1]
    while waiting:
        refused = waiting.pop(0)
        yield refused
        case = refused.case
        if not keep and not _uneven_rows(case.run, case.mesh, 2 * case.accumulate):
            waiting.append(estimate(case.run, case.mesh, 2 * case.accumulate, refused.target))
        waiting = [plan for plan in waiting if plan.peak < LESS * refused.peak]
        waiting.sort(key=lambda plan: plan.seconds)


def remedies(run: RunConfig, searched: Search) -> list[tuple[str, Estimate]]:
    """What each change would reach on the mesh nearest to fitting, most helpful first."""
    case = searched.best.case
    changed = {words: override(run, settings) for words, settings in REMEDIES.items()}
    tried = [
        (words, estimate(other, case.mesh, case.accumulate, searched.best.target))
        for words, other in changed.items()
        if other != run
    ]
    return sorted(tried, key=lambda pair: pair[1].peak)


def reason(loser: Estimate, best: Estimate) -> str:
    """In a few words, why `loser` is not the one."""
    if not loser.fits:
        name, size = next(iter(loser.parts.items()))
        return (
            f"does not fit: {loser.peak_with_headroom / 1e9:.1f} GB with headroom, {name}"
            f" {size / 1e9:.1f}"
        )
    own, other = loser.roofline, best.roofline
    worse = max(own, key=lambda name: own[name] - other[name])
    return f"{loser.seconds / best.seconds:.2f} times as long: {worse} {own[worse]:.1f} s"
