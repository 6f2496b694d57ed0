"""A small run that the tests of training share, and what they look at."""

import contextlib
import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from k2jax.checkpoint import Checkpoints
from k2jax.config import RunConfig
from k2jax.params.arrays import initial
from k2jax.training.metrics import read_metrics
from k2jax.training.step import build


def terminating(step: int, lines: list[str], after: str = ""):
    """A `say` that keeps the lines and sends this process SIGTERM in the given step.

    `after`: how a line begins that must have come before.
    """

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith(f"step {step}/") and any(old.startswith(after) for old in lines):
            os.kill(os.getpid(), signal.SIGTERM)

    return say


def changed(run: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(
        run, **{section: dataclasses.replace(getattr(run, section), **fields)}
    )


def state(run: RunConfig, out: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path: weights and optimizer state."""
    program = build(run)
    found = Checkpoints(out).restore(step, program.abstract_state()._asdict())
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(found)
    }


def state_of(run: RunConfig, out: Path) -> dict:
    """What the run begins with; a checkpoint folder at `out` will not have it."""
    program = build(run)
    params = initial(program.specs, run.train.seed, run.model.init_std)
    return jax.jit(program.init)(params)._asdict()


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


def damage(folder: Path) -> None:
    """One bit of the largest file is turned."""
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def own_caches(root: Path):
    """Keep prepared data, and programs that were compiled once, in a folder of the tests."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    options = {
        "jax_compilation_cache_dir": str(root / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2JAX_CACHE", str(root))
        for name, value in options.items():
            jax.config.update(name, value)
        reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
