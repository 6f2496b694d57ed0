"""Before anything is compiled: do all processes mean the same run, and do they reach each other?"""

import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k2jax.cluster.group import Group
from k2jax.cluster.rendezvous import EXIT_RETRY
from k2jax.config import ConfigError, MeshConfig
from k2jax.runtime.versions import source_hash, versions

PACKAGES = ("k2jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
SIGHT = (
    10.0  # seconds a file may take to be seen on other hosts; NFS keeps old listings for a while
)
PATIENCE = 300.0  # seconds for jax to find the devices of all hosts, and for the first all-reduce
NETWORK_BYTES = 4 << 20  # of the timed all-reduce, on each device


def compare(group: Group, facts: Mapping[str, Any]) -> None:
    """See that all processes have the same versions, the same code, and these facts in common.

    Args:
        group: the processes.
        facts: settings and options by name; nested ones are compared one by one.

    Raises:
        ConfigError: on every process: who differs, and in what.
    """
    own: dict[str, Any] = dict.fromkeys(PACKAGES, "not installed") | versions(PACKAGES)
    own["k2jax's source files"] = source_hash()[:12]
    group.require_equal("settings", own | _flat(facts))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
        flat |= inner
    return flat


def see_folder(group: Group, out: Path) -> None:
    """Every process must see what process 0 writes, since all write the checkpoints.

    Raises:
        ConfigError: on every process: who does not.
    """
    probe = out / group.tell("probe", f".seen-by-all-{secrets.token_hex(4)}")
    if group.number == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise ConfigError(f"cannot write to --out {out}: {error.strerror}") from None
    group.require_equal("probe written", {})
    until = time.monotonic() + SIGHT
    while not (seen := probe.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    said = group.gather("probe seen", seen)
    blind = [name for name, sees in zip(group.names(), said, strict=False) if not sees]
    probe.unlink(missing_ok=True) if group.number == 0 else None
    if line := group.tell("probe: verdict", _blind(blind, group.names()[0], out) if blind else ""):
        raise ConfigError(line)


def _blind(names: list[str], first: str, out: Path) -> str:
    who = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{who} cannot see what {first} writes to --out {out}; it must be a shared folder"


def devices(group: Group, mesh: MeshConfig) -> None:
    """See that the hosts are alike and have as many devices as the mesh takes.

    Raises:
        ConfigError: on every process: what was found where.
    """
    import jax

    with deadline(group, PATIENCE, "jax does not find the devices of all processes"):
        found = Counter((d.process_index, d.device_kind) for d in jax.devices())
    line = uneven(found)
    if not line and found.total() != mesh.devices:
        line = (
            f"mesh {mesh} takes {mesh.devices} devices, the {group.count} processes have"
            f" {found.total()}; set --mesh.AXIS sizes whose product is {found.total()}"
        )
    if line:
        raise ConfigError(line)


def uneven(found: Counter[tuple[int, str]]) -> str:
    """One line if a process has other devices than process 0; else empty."""
    each: dict[int, dict[str, int]] = {}
    for (process, kind), count in found.items():
        each.setdefault(process, {})[kind] = count

    def text(kinds):
        return " and ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))

    for process, kinds in sorted(each.items()):
        if kinds != each[0]:
            return f"process {process} has {text(kinds)}, process 0 has {text(each[0])}"
    return ""


def network(group: Group) -> str:
    """One all-reduce over all devices, checked and timed; a line on how it went.

    Raises:
        ConfigError: its sum is wrong.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    found = jax.devices()
    mesh = jax.sharding.Mesh(np.array(found), ("all",))
    rows = jax.NamedSharding(mesh, jax.P("all"))
    count = NETWORK_BYTES // 4
    ones = jax.make_array_from_callback(
        (len(found), count), rows, lambda index: np.ones((1, count), np.float32)
    )
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=jax.NamedSharding(mesh, jax.P()))
    add = total.lower(ones).compile()
    group.require_equal("compiled all-reduce", {})  # gloo waits for nobody longer than 30 s
    with deadline(group, PATIENCE, f"an all-reduce over {len(found)} devices does not end"):
        sums = np.asarray(add(ones))
        began = time.perf_counter()
        add(ones).block_until_ready()
        seconds = time.perf_counter() - began
    if not (sums == len(found)).all():
        raise ConfigError(
            f"an all-reduce of ones over {len(found)} devices gives {sums.min():g} to"
            f" {sums.max():g}; the network or a device is broken"
        )
    # What a ring sends: all but one part, twice.
    sent = 2 * NETWORK_BYTES * (len(found) - 1) / len(found)
    hosts = len({name.partition("(")[2] for name in group.names()})
    return (
        f"{group.count} processes on {hosts} {'host' if hosts == 1 else 'hosts'},"
        f" {len(found)} x {found[0].device_kind}: same settings and code; an all-reduce of"
        f" {NETWORK_BYTES >> 20} MiB a device took {seconds * 1e3:.1f} ms"
        f" ({sent / seconds / 1e9:.2f} GB/s a device)"
    )


@contextlib.contextmanager
def deadline(group: Group, seconds: float, line: str) -> Iterator[None]:
    """End the run with a line if the block takes longer than that."""
    timer = threading.Timer(
        seconds,
        group.stop,
        (f"{line} within {seconds:.0f} s; see the network between hosts", EXIT_RETRY),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
