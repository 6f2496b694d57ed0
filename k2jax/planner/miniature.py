"""A run in miniature on this machine: `train` itself, to see which programs it compiles.

Widths, layers, rows and steps shrink. What the run does stays: micro-batches, axes of its mesh, its
optimizer, held-out scores, saves, a restore, the hand-over from the stage before, the sample at the
end.
"""

import contextlib
import dataclasses
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import jax

from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, MeshConfig, RunConfig
from k2jax.sharding import make_mesh
from k2jax.training import loop, resume
from k2jax.training.step import build

EVENT = "/jax/core/compile/backend_compile_duration"
MOST_DEVICES = 4
SIZES = {
    "vocab": 512,
    "embed": 16,
    "heads": 4,
    "kv_rank": 8,
    "nope": 8,
    "rope": 4,
    "value": 8,
    "ffw": 16,
    "expert_ffw": 16,
    "context": 64,
}
STEPS = 2
_compiled: list[str] = []  # names of all programs that were compiled while anybody recorded


def rehearse_small(
    run: RunConfig, before: RunConfig | None, closing: Callable[[Any], None]
) -> set[str]:
    """Train, save, restore and end a small copy of a run; the programs' names that it compiled.

    Args:
        run: to be shrunk.
        before: the stage whose weights it starts from; None: weights are drawn.
        closing: as for `loop.train`.

    Raises:
        ConfigError: the small run fails, and so would the large one.
    """
    small = shrink(run)
    with tempfile.TemporaryDirectory(prefix="k2jax-") as folder, _own_cache(folder):
        root = Path(folder)
        _write_text(root / "text")
        small = dataclasses.replace(
            small, data=dataclasses.replace(small.data, path=str(root / "text"))
        )
        with record_programs() as names, contextlib.redirect_stdout(io.StringIO()):
            if before is not None:
                _save_weights(shrink(before), root / "before")
            init = str(root / "before") if before else ""
            loop.train(small, root / "out", init=init, say=_ignore, closing=closing)
            _restore(small, root / "out")
        return set(names)


def _restore(run: RunConfig, out: Path) -> None:
    """Read the last checkpoint, as a run that resumes does."""
    with jax.set_mesh(make_mesh(run.mesh)), Checkpoints(out) as saved:
        resume.restore_state(build(run), saved, run.train.steps)


def _save_weights(run: RunConfig, out: Path) -> None:
    """Leave a checkpoint as the stage before would, on its mesh."""
    with jax.set_mesh(make_mesh(run.mesh)), Checkpoints(out) as saved:
        program = build(run)
        state = resume.initial_state(program)
        saved.save(1, program.to_save(state), resume.checkpoint_meta(run, None))
        saved.wait()


def shrink(run: RunConfig) -> RunConfig:
    """Make the small copy of a run."""
    cfg, mesh = run.model, shrink_mesh(run.mesh)
    sizes: dict[str, Any] = SIZES | {
        "dense_layers": min(cfg.dense_layers, 1),
        "moe_layers": 1,
        "q_rank": min(cfg.q_rank, 8),
        "experts": max(4, 2 * cfg.groups),
        "experts_per_token": 2,
        "groups_per_token": min(cfg.groups_per_token, 2),
    }
    ways = mesh.replica * mesh.data * mesh.expert
    accumulate = min(run.train.accumulate, 2)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(cfg, **sizes),
        data=dataclasses.replace(
            run.data, rows=2 * ways * accumulate, context=SIZES["context"], tokenizer=""
        ),
        train=dataclasses.replace(
            run.train,
            accumulate=accumulate,
            steps=STEPS,
            eval_every=1,
            eval_rows=1,
            save_every=1,
            log_to="",
            profile="",
        ),
        mesh=mesh,
    )


def shrink_mesh(mesh: MeshConfig) -> MeshConfig:
    """Two devices along each axis that has several, as far as `MOST_DEVICES` go."""
    small, devices = {}, 1
    for axis, size in sorted(mesh.sizes.items(), key=lambda item: -item[1]):
        small[axis] = 2 if size > 1 and devices < MOST_DEVICES else 1
        devices *= small[axis]
    return MeshConfig(**small)


def _write_text(folder: Path) -> None:
    folder.mkdir()
    for number in range(20):
        lines = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (folder / f"{number}.py").write_text("".join(lines))


def _ignore(line: str) -> None:
    pass


@contextlib.contextmanager
def _own_cache(folder: str) -> Iterator[None]:
    """Keep prepared data out of the user's cache."""
    before = os.environ.get("K2JAX_CACHE")
    os.environ["K2JAX_CACHE"] = f"{folder}/cache"
    try:
        yield
    finally:
        if before is None:
            del os.environ["K2JAX_CACHE"]
        else:
            os.environ["K2JAX_CACHE"] = before


@contextlib.contextmanager
def record_programs() -> Iterator[list[str]]:
    """Record the names of the programs that jax compiles meanwhile, in order."""
    _listen()
    names: list[str] = []
    start = len(_compiled)
    yield names
    names += _compiled[start:]


@functools.cache
def _listen() -> None:
    """Listen from now on: jax cannot forget a listener."""
    jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **facts: str | int) -> None:
    if event == EVENT:
        _compiled.append(str(facts["fun_name"]).removeprefix("jit(").removesuffix(")"))


def require_listed(names: Set[str], listed: Set[str]) -> None:
    """Refuse a rehearsal that leaves out a program of the run.

    Args:
        names: of programs that a run compiled; operations of jax that it called count as none.
        listed: of programs that the rehearsal compiles.

    Raises:
        ConfigError: names the programs that are left out.
    """
    missing = sorted(name for name in names - listed if not hasattr(jax.lax, name))
    if missing:
        raise ConfigError(
            f"the run compiles a program that its rehearsal leaves out: {', '.join(missing)};"
            " list it in training/compile.py"
        )
