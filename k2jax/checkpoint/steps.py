"""The folders of a run's checkpoints: which steps are complete, what to delete.

`<folder>/checkpoints/<step>/` appears by one rename, after all its bytes are written: a folder
with a plain number and a commit mark is complete. A save that was killed leaves a name with
TEMPORARY in it, a deletion that was killed one with DELETED. What was damaged later is never
deleted here: its name becomes one with DAMAGED.
"""

import json
from typing import Any

from etils import epath

from k2jax.config import ConfigError

CHECKPOINTS = "checkpoints"
META = "meta"
# What orbax writes last into a step's folder, before the rename.
COMMITTED = "commit_success.txt"
TEMPORARY = ".orbax-checkpoint-tmp"
DELETED = ".deleted"
DAMAGED = ".damaged"


def list_complete(root: epath.Path) -> list[int]:
    """Return the steps that can be restored, oldest first.

    Args:
        root: the `checkpoints` folder; it may be missing.
    """
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and is_step(p))


def is_step(path: epath.Path) -> bool:
    """Return whether `path` holds one complete checkpoint."""
    return (path / COMMITTED).exists() and (path / META / "metadata").exists()


def describe_missing(path: epath.Path) -> str:
    """Return what a step's folder lacks; empty: nothing."""
    if not any(path.iterdir()):
        return "the folder is empty"
    needed = (COMMITTED, f"{META}/metadata")
    return next((f"{name} is missing" for name in needed if not (path / name).exists()), "")


def list_numbered(root: epath.Path) -> list[int]:
    """Return the steps that were complete once, oldest first.

    A save that was killed leaves no such folder, except in gs://: without an atomic rename a folder
    has its final name from the start.
    """
    if _lacks_rename(root):
        return list_complete(root)
    return (
        sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal()) if root.is_dir() else []
    )


def _lacks_rename(root: epath.Path) -> bool:
    return str(root).startswith("gs://")


def sweep(root: epath.Path) -> None:
    """Delete what killed saves and deletions left; call it only in the process that saves."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if TEMPORARY in path.name or path.name.endswith(DELETED):
            path.rmtree(missing_ok=True)
        elif path.name.isdecimal() and not is_step(path):
            _delete(path) if _lacks_rename(root) else set_aside(path)


def set_aside(path: epath.Path) -> str:
    """Rename a damaged step, so that its number is free again, and return the new name."""
    name = path.name + DAMAGED
    while (path.parent / name).exists():
        name += "+"
    path.rename(path.parent / name)
    return name


def prune(root: epath.Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the `keep` newest complete steps and the multiples of `keep_every`."""
    for step in list_complete(root)[:-keep]:
        if not keep_every or step % keep_every:
            _delete(root / str(step))


def drop_after(root: epath.Path, step: int) -> None:
    """Delete the complete steps after `step`, newest first."""
    for later in reversed([done for done in list_complete(root) if done > step]):
        _delete(root / str(later))


def _delete(path: epath.Path) -> None:
    # Renamed first: a deletion that is killed halfway must not look like a checkpoint.
    doomed = path.rename(path.parent / (path.name + DELETED))
    doomed.rmtree(missing_ok=True)


def read_meta(path: epath.Path) -> dict[str, Any]:
    """Return what was saved with the arrays of the step at `path`.

    Raises:
        ConfigError: it is not a complete checkpoint, or its description is not JSON.
    """
    if not is_step(path):
        raise ConfigError(f"{path} is not a complete checkpoint")
    try:
        return json.loads((path / META / "metadata").read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"checkpoint {path} has an unreadable description: {error}") from None
