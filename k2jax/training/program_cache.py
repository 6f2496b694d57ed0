"""Compiled programs on disk, by what they are made from: a second start traces nothing.

JAX's own cache is looked up by the traced program, and tracing a step takes longer than loading
it. Here the key is the run's settings, the sources of k2jax, the versions of what it calls, the
settings of JAX and the machine. Any of them that differs makes another key.
"""

import hashlib
import json
import os
import pickle
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from k2jax.config import RunConfig, to_json
from k2jax.runtime.files import write_atomic
from k2jax.runtime.versions import source_hash, versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
KEPT = 8  # files of a program's name, the newest
# Settings that no program depends on: where things are stored, and what is logged.
IRRELEVANT = ("cache", "log", "dump", "trace", "explain", "profil", "coordinator")


def load_or_compile(
    folder: Path | None,
    name: str,
    run: RunConfig,
    devices: Sequence[jax.Device],
    compile_it: Callable[[], jax.stages.Compiled],
) -> jax.stages.Compiled:
    """Load a program that an earlier process compiled for such a run, or compile and keep it.

    Args:
        folder: of kept programs; None: only compile.
        name: of the program.
        run: what it is made from, with sources, versions and machine.
        devices: it runs on.
        compile_it: traces and compiles it.
    """
    if folder is None:
        return compile_it()
    path = folder / f"{name}-{_key(name, run)}"
    try:
        content, inputs, outputs = pickle.loads(path.read_bytes())
        return serialize_executable.deserialize_and_load(
            content, inputs, outputs, execution_devices=devices
        )
    except Exception:  # absent, truncated or of another JAX: it is written again
        compiled = compile_it()
    try:
        content = pickle.dumps(serialize_executable.serialize(compiled))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        _remove_old(folder, name)
    except Exception:  # a cache that cannot be written, a program that cannot be stored
        pass
    return compiled


def _key(name: str, run: RunConfig) -> str:
    config = {
        setting: repr(value)
        for setting, value in sorted(jax.config.values.items())
        if not any(word in setting for word in IRRELEVANT)
    }
    flags = {k: v for k, v in sorted(os.environ.items()) if k in ("XLA_FLAGS", "PJRT_NPROC")}
    devices = [str(device.device_kind) for device in jax.devices()]
    parts: list[Any] = [
        name,
        to_json(run),
        source_hash(),
        versions(PACKAGES),
        config,
        flags,
        devices,
    ]
    parts += [platform.python_version(), platform.machine(), _processor(), os.cpu_count()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """Name this processor and what it can do, where Linux says so: programs are made for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _remove_old(folder: Path, name: str) -> None:
    newest = sorted(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest[KEPT:]:
        path.unlink(missing_ok=True)


def folder_for(processes: int) -> Path | None:
    """Return where this process keeps programs: nowhere if it is one of several, or not on a CPU.

    It is next to the programs of JAX's own cache.
    """
    shared: Any = jax.config.values["jax_compilation_cache_dir"]
    if processes > 1 or jax.default_backend() != "cpu" or not shared or "://" in str(shared):
        return None
    return Path(shared) / "steps"
