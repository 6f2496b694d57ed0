"""What made a run: `run.json`, one entry for each start that trained."""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from k2jax.checkpoint.checkpoints import PACKAGES
from k2jax.config import RunConfig
from k2jax.runtime.files import write_atomic
from k2jax.runtime.versions import source_hash, versions

NAME = "run.json"
ROOT = Path(__file__).parents[1]
# Settings of jax and its compilers that come from outside of the config.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NVIDIA_TF32_OVERRIDE")


def record(run: RunConfig, out: Path, step: int) -> None:
    """Add this start to `out/run.json`; the file is the old one or the new one at any moment.

    Args:
        run: the run.
        out: its folder.
        step: where it goes on from; 0: it begins.
    """
    if jax.process_index() == 0:
        write_atomic(out / NAME, json.dumps([*read(out), entry(run, step)], indent=1) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """The starts of a run; what is no such list is put aside as `run.json.damaged`."""
    path = out / NAME
    if not path.exists():
        return []
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(path.read_text()), list):
            return found
    path.replace(path.with_name(f"{NAME}.damaged"))
    return []


def entry(run: RunConfig, step: int) -> dict[str, Any]:
    """What one needs to know to do the same again, besides `config.json`."""
    first = jax.devices()[0]
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seeds": {"train.seed": run.train.seed, "data.seed": run.data.seed},
        "mesh": run.mesh.sizes,
        "code": code(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": first.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "flags": {name: value for name, value in os.environ.items() if name.startswith(FLAGS)},
    }


def code() -> dict[str, Any]:
    """Which code: its hash, and the git commit where it is a checkout of k2jax.

    `dirty`: files that git follows are not those of the commit. The hash says which code it is
    in any case.
    """
    found: dict[str, Any] = {"sha256": source_hash()}
    if (ROOT / ".git").exists():
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
        if commit:
            found |= {"commit": commit, "dirty": bool(changes)}
    return found


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
