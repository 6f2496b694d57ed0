"""Hold a target against its source, tensor by tensor."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.checkpoint import steps
from k2jax.config import ConfigError, one_line
from k2jax.conversion.prepare import COPIES, GB, Plan
from k2jax.conversion.threads import Budget, each, show_bytes
from k2jax.conversion.write import STEP, THREADS, metadata, pieces
from k2jax.weights import manifest
from k2jax.weights.converted_read import ConvertedCheckpoint
from k2jax.weights.converted_write import check_files, tree_metadata
from k2jax.weights.encodings import Tensors
from k2jax.weights.hf_folder import Folder


def audit(plan: Plan, folder: Path, say: Any) -> dict[str, Any]:
    """Hold every tensor of `folder` against the source.

    Raises:
        ConfigError: names the first file or tensor that differs.
    """
    listed = folder / manifest.NAME
    if listed.exists():
        manifest.check(folder, listed, manifest.files(folder))
    found = _open_target(plan, folder)
    if extra := [name for name in found if name not in plan.view]:
        raise ConfigError(f"{found.file(extra[0])}: the source has no tensor {extra[0]!r}")
    progress = show_bytes(sum(plan.sizes()), "verified", say)
    budget = Budget(int(plan.options.memory * GB))

    def compare(name: str) -> None:
        _compare(plan, found, name, budget)
        progress.add(math.prod(found.shape(name)) * found.dtype(name).itemsize)

    place = {name: n for n, name in enumerate(plan.source.tensors)}
    with progress:
        each(sorted(plan.view, key=lambda name: place.get(name, 0)), compare, THREADS)
    _check_beside(plan, folder)
    if folder == plan.target and not listed.exists():
        manifest.make(folder)
    return {
        "tensors": len(plan.view),
        "bytes": sum(plan.sizes()),
        "manifest": str(plan.target / manifest.NAME),
    }


def _open_target(plan: Plan, folder: Path) -> Tensors:
    if plan.to == "hf":
        found = Folder(folder)
        found.inspect()
        return found
    step = folder / STEP
    meta = _check_meta(plan, step / steps.META / "metadata")
    wanted = {f"{leaf.name}/.zarray": leaf.zarray() for leaf in plan.leaves}
    for name, text in (wanted | {"_METADATA": tree_metadata(plan.leaves)}).items():
        if (step / "params" / name).read_bytes() != text.encode():
            raise ConfigError(f"{step / 'params' / name} is damaged")
    check_files(step / "params", [leaf.name for leaf in plan.leaves])
    return ConvertedCheckpoint(step, meta, plan.specs)


def _check_meta(plan: Plan, path: Path) -> dict[str, Any]:
    """What is beside the arrays, if it is what the source gives."""
    try:
        meta = json.loads(path.read_text())
        ours = json.loads(json.dumps(metadata(plan)))
        same = {**meta, "versions": {}} == {**ours, "versions": {}}
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error, typed=True)}") from None
    if not same:
        raise ConfigError(f"{path} is not what the source gives")
    return meta


def _compare(plan: Plan, found: Tensors, name: str, budget: Budget) -> None:
    if name not in found:
        raise ConfigError(f"{plan.target} lacks the tensor {name!r}")
    want = plan.view.kind(name)
    if (found.dtype(name), found.shape(name)) != want:
        raise ConfigError(
            f"{found.file(name)}: {name!r} is {found.dtype(name)} {list(found.shape(name))}; the"
            f" source gives {want[0]} {list(want[1])}"
        )
    for rows, size in pieces(plan.view, name):
        with budget.take(COPIES * size):
            a, b = (
                np.ascontiguousarray(t.read(name, rows)).reshape(-1).view(np.uint8)
                for t in (plan.view, found)
            )
            if not np.array_equal(a, b):
                at = int(np.flatnonzero(a != b)[0]) // want[0].itemsize
                raise ConfigError(
                    f"{found.file(name)}: {name!r} differs from the source, first at value {at}"
                    f" from row {rows.start or 0}"
                )


def _check_beside(plan: Plan, folder: Path) -> None:
    for name in plan.source.companions:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing")
        if (folder / name).read_bytes() != (plan.source.folder / name).read_bytes():
            raise ConfigError(f"{folder / name} differs from the source's")
