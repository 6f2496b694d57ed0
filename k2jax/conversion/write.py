"""Write the tensors of a target: chunks of our arrays, or safetensors files."""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.checkpoint import steps
from k2jax.config import RunConfig, to_json
from k2jax.conversion.hf_files import exported_config, file_names, generated_files
from k2jax.conversion.prepare import COPIES, Plan, without_mtp
from k2jax.conversion.threads import Budget, each
from k2jax.runtime.files import write_atomic
from k2jax.runtime.progress import Progress
from k2jax.weights.converted_read import EXTRA
from k2jax.weights.converted_write import WHOLE, Leaf, tree_metadata, write_tensor
from k2jax.weights.encodings import ReencodedTensors
from k2jax.weights.hf_folder import INDEX
from k2jax.weights.mapping import StackIndex, published_name, stack_slots
from k2jax.weights.safetensors import stream

STEP = Path(steps.CHECKPOINTS) / "0"
THREADS = 4
PIECE = WHOLE // 2  # bytes of a tensor that are exported or compared at a time
ROWS = 128  # pieces end where blocks of FP8 do


def write_chunks(plan: Plan, work: Path, budget: Budget, progress: Progress) -> None:
    """A checkpoint of ours, but for the mark that it is complete."""
    step = work / STEP
    params = step / "params"
    for leaf in plan.leaves:
        (params / leaf.name).mkdir(parents=True, exist_ok=True)
        (params / leaf.name / ".zarray").write_text(leaf.zarray())
    jobs = [
        (leaf, where, published_name(leaf.spec, where) + leaf.part)
        for leaf in plan.leaves
        for where, _ in stack_slots(leaf.spec)
    ]
    # File after file, and each from its beginning.
    place = {name: n for n, name in enumerate(plan.source.tensors)}
    jobs.sort(key=lambda job: (str(plan.view.file(job[2])), place.get(job[2], 0)))

    def write(job: tuple[Leaf, StackIndex, str]) -> None:
        leaf, where, name = job
        size = math.prod(plan.view.shape(name)) * leaf.dtype.itemsize
        with budget.take(COPIES * min(size, WHOLE)):
            write_tensor(params / leaf.name, leaf, where, plan.view)
        progress.add(size)

    each(jobs, write, THREADS)
    if extras := plan.extras():
        _stream(step / EXTRA, plan.view, extras, budget, progress)
    (params / "_METADATA").write_text(tree_metadata(plan.leaves))
    (step / steps.META).mkdir(exist_ok=True)
    (step / steps.META / "metadata").write_text(json.dumps(metadata(plan)))
    if plan.source.fields:
        (work / "config.json").write_text(json.dumps(plan.source.fields, indent=2) + "\n")


def metadata(plan: Plan) -> dict[str, Any]:
    """As `Checkpoints.save` writes it, and what an export needs."""
    kept = {
        ours: plan.view.encoded[next(stack_slots(leaf))[1]] for ours, leaf in plan.specs.items()
    }
    shapes = [plan.view.dtype(name) for name in plan.view if name.endswith(".weight_shape")]
    return {
        "config": to_json(RunConfig(name=plan.target.name, model=without_mtp(plan.source.config))),
        "step": 0,
        "format": 1,
        "versions": {"k2jax": importlib.metadata.version("k2jax")},
        "arrays": {
            "params": {leaf.name: [list(leaf.spec.shape), str(leaf.stored)] for leaf in plan.leaves}
        },
        "converted": True,
        "quantised": {ours: how for ours, how in kept.items() if how != "plain"},
        "int4_shape": str(shapes[0]) if shapes else "int32",
        "published": plan.source.fields,
        "copied": list(plan.source.companions),
    }


def write_files(plan: Plan, work: Path, budget: Budget, progress: Progress) -> None:
    """A published folder."""
    placed = file_names(plan.view)
    files: dict[str, list[str]] = {}
    for name, file in placed.items():
        files.setdefault(file, []).append(name)

    def write(file: str) -> None:
        if (work / file).exists():
            progress.add((work / file).stat().st_size)
        else:
            _stream(work / file, plan.view, files[file], budget, progress)

    each(sorted(files), write, THREADS)
    index = {"metadata": {"total_size": sum(plan.sizes())}, "weight_map": placed}
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    form = plan.options.format
    if form == "keep" and not plan.source.fields:
        form = str(plan.view.dtype("lm_head.weight"))
    skipped = plan.mtp if plan.options.skip_mtp else ()
    fields = exported_config(plan.source, form, plan.options.model_type, skipped)
    (work / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    for name, make in generated_files(plan.source).items():
        write_atomic(work / name, make())


def _stream(
    path: Path, view: ReencodedTensors, names: list[str], budget: Budget, progress: Progress
) -> None:
    with contextlib.ExitStack() as held:

        def read(name: str) -> Iterator[np.ndarray]:
            for rows, size in pieces(view, name):
                # Until it is written; also freed when writing fails.
                held.enter_context(budget.take(COPIES * size))
                yield view.read(name, rows)
                held.close()
                progress.add(size)

        stream(path, {name: view.kind(name) for name in names}, read, {"format": "pt"})


def pieces(view: ReencodedTensors, name: str) -> Iterator[tuple[slice, int]]:
    """Rows of a tensor to read at a time, and their bytes."""
    dtype, shape = view.kind(name)
    size = math.prod(shape) * dtype.itemsize
    if size <= PIECE:
        yield slice(None), size
        return
    row = size // shape[0]
    step = max(ROWS, PIECE // row // ROWS * ROWS)
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        yield slice(begin, end), (end - begin) * row
