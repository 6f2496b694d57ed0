"""Show that a written step can be read again, before it counts as a checkpoint.

A save whose parts were never joined, or that foreign code put elsewhere, is found here, while the
older checkpoints are still there: orbax itself looks for its files by patterns, and finds none
without an error.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from k2jax.checkpoint.steps import META
from k2jax.config import ConfigError

# What orbax takes for a pattern of names, or TensorStore for a separator.
PATTERN = "*?[]\\"
REMOTE = "://"


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse to save below a path that orbax would take for a pattern, and match with others.

    Raises:
        ConfigError: names the character.
    """
    if wrong := [char for char in str(folder) if char in PATTERN]:
        raise ConfigError(
            f"checkpoints cannot be saved in {folder}: its path has {wrong[0]!r}, which the storage"
            f" library takes for a pattern; give a folder without any of {' '.join(PATTERN)}"
        )


def describe_unreadable(directory: epath.Path) -> str:
    """Name the first array that the written databases do not give back; or "".

    Args:
        directory: of a step that is written, named as it will be or not yet.
    """
    try:
        arrays = json.loads((directory / META / "metadata").read_text())["arrays"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{META}/metadata cannot be read"
    for part, inventory in arrays.items():
        if why := _describe_part(directory / part, inventory):
            return f"{part}/{why}"
    return ""


def _describe_part(folder: epath.Path, inventory: Mapping[str, Any]) -> str:
    import tensorstore

    try:
        store = tensorstore.KvStore.open(_spec(folder)).result()
        reads = {name: store.read(f"{name}/.zarray") for name in inventory}
        found = {name: read.result() for name, read in reads.items()}
        shapes = {n: json.loads(r.value)["shape"] for n, r in found.items() if r.state == "value"}
    except (ValueError, KeyError, TypeError) as error:
        return f" has no readable database ({type(error).__name__})"
    for name, (shape, _) in inventory.items():
        if name not in shapes:
            return f"{name} was written and is not found again"
        if list(shapes[name]) != list(shape):
            return f"{name} has shape {shapes[name]} on disk, not {list(shape)}"
    return ""


def _spec(folder: epath.Path) -> dict[str, Any]:
    path = str(folder) + "/"
    if REMOTE not in path:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": path}}
    bucket, _, inside = path.partition(REMOTE)[2].partition("/")
    return {"driver": "ocdbt", "base": {"driver": "gcs", "bucket": bucket, "path": inside}}
