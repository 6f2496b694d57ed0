"""Decides where a run begins: at its newest intact checkpoint, given weights, or drawn ones."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax import cluster
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, RunConfig, from_json, to_json
from k2jax.model.lora import merge_adapters
from k2jax.params.adapters import is_adapter
from k2jax.params.arrays import Params, initial
from k2jax.params.kimi import declare_kimi
from k2jax.runtime.files import OUTSIDE
from k2jax.training.compile import PROGRAMS
from k2jax.training.step import Program, State
from k2jax.weights.adapter_files import write_peft
from k2jax.weights.source import Source, initial_params, open_source


@contextlib.contextmanager
def name_outside_errors(folder: Path) -> Iterator[None]:
    """Turn what the system refuses, such as a full disk, into one line.

    Args:
        folder: that is named where the error names no file.

    Raises:
        ConfigError: with the file and the system's reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from error


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
        for section in ("model", "data", "lora")
        for field in dataclasses.fields(getattr(run, section))
    ]
    for section, name in [*fields, ("optim", "name")]:
        was, now = (getattr(getattr(one, section), name) for one in (before, run))
        if was != now:
            raise ConfigError(
                f"{out} holds a run with {section}.{name} {was}, not {now}; give another --out"
            )


def open_base(run: RunConfig, init: str, out: Path, latest: int | None) -> Source | None:
    """Open the weights that a run's adapters are for; None: all weights of the run learn.

    Args:
        run: of which they are the base.
        init: where they are; on a resume they are where they were.
        out: folder of the run.
        latest: step to resume from, if any.

    Raises:
        ConfigError: there are none, or they have changed.
    """
    if not run.lora.rank:
        return None
    if latest is not None:
        return open_source(out).base
    if not init:
        raise ConfigError(
            f"lora.rank is {run.lora.rank}: name the weights to adapt, --init WEIGHTS"
        )
    return open_source(init)


def freeze_base(program: Program, base: Source | None) -> Program:
    """Return the program for the base's dtypes and low-bit formats."""
    if base is None:
        return program
    frozen = base.describe_base(declare_kimi(program.run.model))
    return dataclasses.replace(program, frozen=frozen)


def checkpoint_meta(run: RunConfig, base: Source | None) -> dict[str, Any]:
    """Describe a run in its checkpoints: what loads them must know no other file."""
    meta: dict[str, Any] = {"config": to_json(run)}
    if base is not None:
        meta["base"] = {"path": str(base.path), "identity": base.identity}
    return meta


def restore_state(
    program: Program, checkpoints: Checkpoints, step: int, base: Source | None = None
) -> State:
    """Read a checkpoint, and the base of its adapters, onto the mesh in use."""
    saved = checkpoints.restore(step, program.to_save(program.abstract_state()))
    return State(_load_frozen(program, base) | saved["params"], saved["opt"])


def initial_state(program: Program, init: str | Path = "", base: Source | None = None) -> State:
    """Make the state before the first step, on the mesh in use.

    Args:
        program: of the run.
        init: weights to start from; none: drawn ones.
        base: weights that adapters are drawn for; `init` is then not read.
    """
    run, specs = program.run, program.specs
    if base is not None:
        params = _load_frozen(program, base) | _draw_adapters(program)
    elif init:
        params = initial_params(init, specs)
    else:
        params = initial(specs, run.train.seed, run.model.init_std)
    return PROGRAMS["begin"].jit(program)(params)


def _load_frozen(program: Program, base: Source | None) -> Params:
    return base.load_base(declare_kimi(program.run.model)) if base is not None else {}


def _draw_adapters(program: Program) -> Params:
    """Draw A with the deviation that keeps the size of its input, and B as zeros."""
    params: Params = {}
    for name, leaf in program.specs.items():
        if is_adapter(name):
            std = leaf.matrix[0] ** -0.5
            params |= initial({name: leaf}, program.run.train.seed, std)
    return params


def plain_params(program: Program, state: State) -> Params:
    """Return the weights of a state as a model has them: adapters are added to theirs."""
    run = program.run
    return merge_adapters(state.params, declare_kimi(run.model), run.lora.scale)


def write_adapter(program: Program, params: Params, base: Source, folder: Path) -> None:
    """Write a run's adapters as PEFT's files; all processes must call it, the first one writes."""
    pairs = {name: leaf for name, leaf in program.specs.items() if is_adapter(name)}
    whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    held = jax.jit(dict, out_shardings=whole)({name: params[name] for name in pairs})
    if jax.process_index() == 0:
        lora, arrays = program.run.lora, {name: np.asarray(a) for name, a in held.items()}
        write_peft(folder, arrays, pairs, lora.rank, lora.alpha, str(base.path))
