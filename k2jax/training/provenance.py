"""What made a run: `config.json`, and `run.json` with one entry for each start that trained."""

import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from k2jax.checkpoint.checkpoints import PACKAGES
from k2jax.config import RunConfig, to_json
from k2jax.runtime.files import write_atomic
from k2jax.runtime.versions import source_hash, versions
from k2jax.training.step import Program

NAME = "run.json"
ROOT = Path(__file__).parents[2]
# Settings of jax and its compilers that come from outside of the config.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NVIDIA_TF32_OVERRIDE")


def write_config(run: RunConfig, out: Path) -> None:
    """Write every setting of a run to `out/config.json`."""
    write_atomic(out / "config.json", json.dumps(to_json(run), indent=1) + "\n")


def introduce(program: Program) -> str:
    """Name the run, its size and its mesh."""
    count = sum(math.prod(leaf.shape) for leaf in program.specs.values())
    return f"{program.run.name}: {count / 1e6:.1f}M parameters on {program.run.mesh}"


def record_start(run: RunConfig, out: Path, step: int) -> None:
    """Add this start to `out/run.json`; the file is the old one or the new one at any moment.

    Args:
        run: the run.
        out: its folder.
        step: the one it resumes from; 0: a new run.
    """
    if jax.process_index() == 0:
        starts = [*read_starts(out), describe_start(run, step)]
        write_atomic(out / NAME, json.dumps(starts, indent=1) + "\n")


def read_starts(out: Path) -> list[dict[str, Any]]:
    """Return the starts of a run; what is no such list is set aside as `run.json.damaged`."""
    path = out / NAME
    if not path.exists():
        return []
    with contextlib.suppress(ValueError):
        if isinstance(starts := json.loads(path.read_text()), list):
            return starts
    path.replace(path.with_name(f"{NAME}.damaged"))
    return []


def describe_start(run: RunConfig, step: int) -> dict[str, Any]:
    """Return what is needed to do the same again, besides `config.json`."""
    first = jax.devices()[0]
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seeds": {"train.seed": run.train.seed, "data.seed": run.data.seed},
        "mesh": run.mesh.sizes,
        "code": describe_code(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": first.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "flags": {name: value for name, value in os.environ.items() if name.startswith(FLAGS)},
    }


def describe_code() -> dict[str, Any]:
    """Return the hash of the code, and its git commit where it is a checkout of k2jax.

    `dirty`: files that git follows are not those of the commit. The hash says which code it is
    in any case.
    """
    facts: dict[str, Any] = {"sha256": source_hash()}
    if (ROOT / ".git").exists():
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
        if commit:
            facts |= {"commit": commit, "dirty": bool(changes)}
    return facts


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
