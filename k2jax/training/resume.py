"""Decides where a run begins: at its newest intact checkpoint, given weights, or drawn ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from k2jax import cluster
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, RunConfig, from_json
from k2jax.params.arrays import initial
from k2jax.training.step import Program, State
from k2jax.weights.source import initial_params


def find_start(
    checkpoints: Checkpoints, run: RunConfig, out: Path, say: Callable[[str], None]
) -> int | None:
    """Return the step to resume from, alike on all processes; None: the run is new.

    Damaged checkpoints above it are set aside.

    Raises:
        ConfigError: every checkpoint is damaged, processes see different ones, or the folder holds
            a run with another model or other data.
    """
    latest = checkpoints.recover(say)
    cluster.current().require_equal("where to begin", {"newest step in --out": latest})
    if latest is not None:
        require_same_run(run, checkpoints.meta(latest)["config"], out)
    return latest


def require_same_run(run: RunConfig, saved: dict[str, Any], out: Path) -> None:
    """Refuse to resume with another model or other data than the checkpoint's.

    Args:
        run: to resume.
        saved: the checkpoint's config as JSON.
        out: folder of both.

    Raises:
        ConfigError: names the first field that differs.
    """
    before = from_json(saved)
    fields = [
        (section, field.name)
        for section in ("model", "data")
        for field in dataclasses.fields(getattr(run, section))
    ]
    for section, name in [*fields, ("optim", "name")]:
        was, now = (getattr(getattr(one, section), name) for one in (before, run))
        if was != now:
            raise ConfigError(
                f"{out} holds a run with {section}.{name} {was}, not {now}; give another --out"
            )


def restore_state(program: Program, checkpoints: Checkpoints, step: int) -> State:
    """Read a checkpoint onto the mesh in use."""
    return State(**checkpoints.restore(step, program.abstract_state()._asdict()))


def initial_state(program: Program, init: str | Path = "") -> State:
    """Make the state before the first step, on the mesh in use.

    Args:
        program: of the run.
        init: weights to start from; none: drawn ones.
    """
    run, specs = program.run, program.specs
    if init:
        params = initial_params(init, specs)
    else:
        params = initial(specs, run.train.seed, run.model.init_std)
    # Stated: a counter depends on no input, and would otherwise be stored on one device only.
    mesh = jax.sharding.get_mesh()
    layout = jax.tree.map(
        lambda a: jax.NamedSharding(mesh, a.sharding.spec if a.sharding else jax.P()),
        program.abstract_state(),
    )
    return jax.jit(program.init, donate_argnums=0, out_shardings=layout)(params)
