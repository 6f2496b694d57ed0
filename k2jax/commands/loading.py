"""What verbs that load a model share: several processes, a mesh, and the weights on it.

Imported without jax, like every verb: its options answer at once.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from k2jax import cluster
from k2jax.config import DTYPES, MESH_AXES, MeshConfig, each_knob
from k2jax.config.knob import check_fields

if TYPE_CHECKING:
    from k2jax.weights.source import Source

LONGEST = 4_096  # tokens of a row on the command line, where the model's context is longer
OF_ONE_PROCESS = ("process", "coordinator", "settings")  # what processes need not have alike


def add_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the checkpoint, the mesh, the dtype, and which process of how many this is.

    Args:
        parser: of the verb.
        optional: the verb also does something without a checkpoint.
    """
    parser.add_argument(
        "checkpoint",
        nargs="?" if optional else None,
        help="a run's folder, a checkpoint, or a published folder",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights and the computation; default: as stored"
    )
    parser.add_argument(
        "--weights",
        choices=("stored", "decoded"),
        default="stored",
        help="FP8 and INT4 weights stay in memory as they are, or are decoded; default: stored",
    )
    for axis, knob, value in each_knob(MeshConfig()):
        parser.add_argument(
            f"--mesh.{axis}",
            dest=f"mesh.{axis}",
            type=int,
            default=value,
            metavar="N",
            help=f"devices along this axis: {knob.text}; default: {value}",
        )
    cluster.add_arguments(parser)


def read_mesh(args: argparse.Namespace) -> MeshConfig:
    """Return the mesh of the options.

    Raises:
        ConfigError: an axis has no device.
    """
    mesh = MeshConfig(**{axis: getattr(args, f"mesh.{axis}") for axis in MESH_AXES})
    check_fields("mesh", mesh)
    return mesh


@contextlib.contextmanager
def opened(
    args: argparse.Namespace, mesh: MeshConfig, *, inference: bool = False
) -> Iterator[tuple[cluster.Group, "Source"]]:
    """The processes that run this command and the source of its weights, on the mesh.

    Inside of the block the mesh is set, so that `source.load` places weights on it: each process
    reads what its own devices hold. Lines on the processes go to stderr, results to stdout.

    Args:
        args: parsed options.
        mesh: takes all devices of all processes; of one device, none is set.
        inference: lay weights out where they are used; `data` and `context` join other axes.

    Raises:
        ConfigError: the processes differ, nothing can be loaded, or the mesh does not divide it.
    """
    from k2jax.runtime import backend

    place = cluster.find(args.coordinator, args.processes, args.process)
    backend.prepare(mesh.devices, place.processes if place else 1)
    facts = {f"--{name}": value for name, value in vars(args).items() if name not in OF_ONE_PROCESS}
    with cluster.member(place, facts, mesh, _report) as group:
        import jax

        from k2jax import sharding
        from k2jax.params.kimi import declare_kimi
        from k2jax.weights.source import open_source

        source = open_source(args.checkpoint)
        if group.count > 1:
            weights = {"step": source.step, "weights": source.identity[:12]}
            group.require_equal("weights", weights)
        specs = declare_kimi(source.config)
        if not inference:
            sharding.check_divisible(specs, mesh.sizes, min(source.config.context, LONGEST))
        with contextlib.ExitStack() as stack:
            if mesh.devices > 1:
                devices = sharding.make_mesh(mesh)
                laid = sharding.inference_mesh(devices, specs) if inference else devices
                stack.enter_context(jax.set_mesh(laid))
            yield group, source


def _report(line: str) -> None:
    sys.stderr.write(f"k2jax: {line}\n")
