"""Carry a plan out: write, resume, audit, and let the target appear when it is complete.

Everything is written into `<target>.unfinished`, files one by one by renames, so what is there is
whole. What marks the target as loadable comes last, then the folder gets its name.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from k2jax.checkpoint import steps
from k2jax.config import ConfigError
from k2jax.conversion.audit import audit
from k2jax.conversion.hf_files import file_names, generated_files
from k2jax.conversion.prepare import GB, Plan
from k2jax.conversion.threads import Budget, show_bytes
from k2jax.conversion.write import STEP, write_chunks, write_files
from k2jax.runtime.files import hold_lock
from k2jax.weights import manifest
from k2jax.weights.hf_folder import Folder

NOTE = "conversion.json"
LOCK = ".lock"
RATE = 0.5  # GB/s of output that a dry run reckons with
PYTHON = 0.7  # GB of memory that jax, orbax and the lists of names take


def run(plan: Plan, say: Any, began: float) -> dict[str, Any]:
    """What `k2jax.convert` does once there is a plan; its report."""
    report = describe(plan)
    for note in plan.notes:
        say(f"note: {note}")
    if plan.options.dry_run:
        seconds = sum(plan.sizes()) / GB / RATE
        return report | {
            "reckoned_seconds": round(seconds),
            "reckoned_memory_gb": plan.options.memory + PYTHON,
        }
    fresh = not (plan.target.exists() and any(plan.target.iterdir()))
    if not fresh:
        _check_finished(plan)
        say(f"{plan.target} is there already and complete")
    report["attested"] = _attest(plan, say)
    folder = _make(plan, say) if fresh else plan.target
    if plan.options.verify:
        report["verified"] = audit(plan, folder, say)
    if fresh:
        _finish(plan, folder)
    report["seconds"] = round(time.perf_counter() - began, 3)
    return report


def describe(plan: Plan) -> dict[str, Any]:
    """What is known before anything is written."""
    adapter = plan.view.adapter
    return {
        "source": plan.source.name,
        "target": str(plan.target),
        "to": plan.to,
        "format": plan.options.format,
        "tensors": len(plan.view),
        "bytes_in": plan.bytes_in(),
        "bytes_out": sum(plan.sizes()),
        "files_out": _count_files(plan),
        "skipped": plan.skipped(),
        "beside": len(plan.extras()) if plan.to == "orbax" else 0,
        "copied": list(plan.source.companions),
        "made": list(generated_files(plan.source)) if plan.to == "hf" else [],
        "notes": plan.notes,
    } | ({"adapter": adapter.name, "adapted": len(adapter)} if adapter is not None else {})


def _count_files(plan: Plan) -> int:
    if plan.to == "hf":
        return len(set(file_names(plan.view).values()))
    return sum(math.prod(map(len, leaf.grid())) for leaf in plan.leaves)


def _attest(plan: Plan, say: Any) -> str:
    """Hold the source's files against the given manifest."""
    if not plan.options.manifest:
        say("values of the source are unattested: no --manifest was given")
        return "no: values of the source are taken as they are"
    tensors, folder = plan.source.tensors, plan.source.folder
    if isinstance(tensors, Folder):
        needed = ["config.json", *tensors.files]
    else:
        step = plan.source.path
        needed = [str(p.relative_to(folder)) for p in step.rglob("*") if p.is_file()]
    listed = set(manifest.read(Path(plan.options.manifest)))
    # A publisher's list is often of the large files alone.
    needed = [name for name in needed if name != "config.json" or name in listed]
    bucket = tensors.remote if isinstance(tensors, Folder) else None
    count = manifest.check(folder, Path(plan.options.manifest), needed, bucket)
    return f"yes: {count} files have the SHA-256 sums of {plan.options.manifest}"


def _make(plan: Plan, say: Any) -> Path:
    """Write everything but what marks the target as complete; the folder it is in."""
    work = plan.work
    _check_room(plan)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(work / LOCK):
            _write_work(plan, say)
    except BlockingIOError:
        raise ConfigError(f"another process is writing {work}") from None
    return work


def _write_work(plan: Plan, say: Any) -> None:
    work = plan.work
    _check_unfinished(plan)
    (work / manifest.NAME).unlink(missing_ok=True)  # of a run that was killed at its end
    (work / NOTE).write_text(json.dumps(_note(plan), indent=1))
    budget = Budget(int(plan.options.memory * GB))
    with show_bytes(sum(plan.sizes()), "converted", say) as progress:
        (write_chunks if plan.to == "orbax" else write_files)(plan, work, budget, progress)
    for name in plan.source.companions:
        shutil.copyfile(plan.source.folder / name, work / name)


def _note(plan: Plan) -> dict[str, Any]:
    return {"fingerprint": plan.fingerprint, **describe(plan), "target": plan.target.name}


def _check_unfinished(plan: Plan) -> None:
    """Go on only with the same conversion; sweep the temporary files of a killed one."""
    if _fingerprint(plan.work) not in (plan.fingerprint, ""):
        raise ConfigError(
            f"{plan.work} is an unfinished conversion of another source or with other options;"
            " delete it to start anew"
        )
    for path in plan.work.rglob(".*"):
        if path.is_file() and path.name not in (".zarray", LOCK):
            path.unlink()


def _check_finished(plan: Plan) -> None:
    if _fingerprint(plan.target) != plan.fingerprint:
        raise ConfigError(
            f"{plan.target} is there already, and not what this command makes; give another target"
        )


def _fingerprint(folder: Path) -> str:
    try:
        return str(json.loads((folder / NOTE).read_text())["fingerprint"])
    except FileNotFoundError:
        return ""
    except (ValueError, OSError, KeyError, TypeError):
        raise ConfigError(f"{folder / NOTE} is damaged") from None


def _check_room(plan: Plan) -> None:
    parent = plan.work.parent
    while not parent.is_dir():
        parent = parent.parent
    there = sum(p.stat().st_size for p in plan.work.rglob("*") if p.is_file())
    need, free = sum(plan.sizes()) - there, shutil.disk_usage(parent).free
    if need > free:
        raise ConfigError(
            f"{plan.target} takes {need:,} more bytes; {free:,} are free on that disk"
        )


def _finish(plan: Plan, work: Path) -> None:
    """Commit: what is in `work` becomes the target."""
    if plan.to == "orbax":
        (work / STEP / steps.COMMITTED).write_text("converted\n")
    (work / LOCK).unlink(missing_ok=True)  # it is no part of the target, nor of its manifest
    if plan.options.verify:
        manifest.make(work)
    os.sync()
    if plan.target.exists():
        plan.target.rmdir()
    work.rename(plan.target)
