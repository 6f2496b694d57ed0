"""Which process of how many this is: from options, or from what the cluster says."""

import argparse
import os
from typing import NamedTuple

from k2jax.config import ConfigError, one_line
from k2jax.runtime import versions

ARRIVAL = 300.0  # seconds that processes may come after each other

BY_HAND = "--coordinator HOST:PORT --processes N --process I"


class Place(NamedTuple):
    """One process of several."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None  # of the host's; None: all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for starting processes by hand."""
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 runs, and a free port there;"
        " Cloud TPU, SLURM, Open MPI and Kubernetes say it themselves",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="how many processes; 1: this one alone"
    )
    parser.add_argument(
        "--process", type=int, metavar="I", help="number of this one, from 0 to N - 1"
    )


def find(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """This process's place; None: it is alone.

    Args:
        coordinator: HOST:PORT of process 0. None, like the others: ask the cluster.
        processes: how many there are.
        process: number of this one.

    Raises:
        ConfigError: the options do not fit together, or the cluster's words make no sense.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if processes == 1 and process in (None, 0):
        return None
    if all(value is None for value in given.values()):
        return _detect()
    for name, value in given.items():
        if value is None:
            raise ConfigError(f"{name} is missing; processes by hand need {BY_HAND}")
    assert coordinator is not None and processes is not None and process is not None
    if processes < 1:
        raise ConfigError(f"--processes is {processes}; it must be at least 1")
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process is {process}; {processes} processes have the numbers 0..{processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
    return Place(coordinator, processes, process)


def _detect() -> Place | None:
    """What jax's own detection finds: Cloud TPU, SLURM, Open MPI, jobs of Kubernetes."""
    try:
        found = versions.detect_cluster(int(ARRIVAL))
    except Exception as error:
        raise ConfigError(
            f"this cluster does not say which process this is ({one_line(error, typed=True)});"
            f" give {BY_HAND}, or --processes 1 for one alone"
        ) from error
    coordinator, processes, process, devices = found
    if processes is None and "JOB_COMPLETION_INDEX" in os.environ:
        raise ConfigError(
            "this is a pod of an indexed Kubernetes job; to find the others jax needs the package"
            f" kubernetes: install jax[k8s], give {BY_HAND}, or --processes 1 for one alone"
        )
    if processes is None or processes == 1:
        return None
    assert coordinator is not None and process is not None, "jax knows all of it, or nothing"
    return Place(coordinator, processes, process, list(devices) if devices else None)
