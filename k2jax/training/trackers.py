"""Metrics for TensorBoard and Weights & Biases, besides `metrics.jsonl`."""

import contextlib
import importlib.util
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from k2jax.config import ConfigError, RunConfig, to_json

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
UNPLOTTED = ("step", "expert_load")  # thousands of numbers; `metrics.jsonl` and the report have it
Line = dict[str, Any]


def require_packages(run: RunConfig) -> None:
    """Refuse what `train.log_to` names and is not installed.

    Raises:
        ConfigError: names the extra.
    """
    for name in run.train.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"train.log_to {name} needs the package {PACKAGES[name]}:"
                f" pip install 'k2jax[{name}]'"
            )


@contextlib.contextmanager
def open_trackers(run: RunConfig, out: Path, start: int) -> Iterator[Callable[[Line], None]]:
    """Open the trackers: a function that takes each line of `metrics.jsonl`.

    Args:
        run: `train.log_to` names the trackers; none means that lines are dropped.
        out: folder of the run; its subfolders `tensorboard` and `wandb` are theirs.
        start: step resumed from; the curves continue, and what was logged after it is superseded.
    """
    with contextlib.ExitStack() as stack:
        names = run.train.trackers if jax.process_index() == 0 else ()
        takers = [OPENERS[name](run, out, start, stack) for name in names]

        def track(line: Line) -> None:
            values = flatten_scalars(line) if takers else {}
            for take in takers:
                take(line["step"], values)

        yield track


def flatten_scalars(line: Line) -> dict[str, float]:
    """Return the numbers of a line by name; those of a list are `name/layer_0`, ..."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if name in UNPLOTTED or value is None:
            continue
        if isinstance(value, list):
            short = name.removesuffix("_layers")
            parts = {f"{short}/layer_{i}": part for i, part in enumerate(value)}
            numbers |= {part: number for part, number in parts.items() if number is not None}
        else:
            numbers[name] = value
    return numbers


def _open_tensorboard(run: RunConfig, out: Path, start: int, stack: contextlib.ExitStack):
    from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
    stack.callback(writer.close)

    def take(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return take


def _open_wandb(run: RunConfig, out: Path, start: int, stack: contextlib.ExitStack):
    import wandb  # type: ignore[import-not-found]

    known = out / "wandb" / "k2jax-id"  # so that a resumed run is the same run for wandb
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(uuid.uuid4().hex)
    job = wandb.init(
        project="k2jax",
        name=run.name,
        id=known.read_text(),
        resume="allow",
        dir=str(out),
        config=to_json(run),
    )
    stack.callback(job.finish)
    # Wandb's own count of steps cannot go back, as a rewound run does.
    job.define_metric("*", step_metric="step")
    return lambda step, values: job.log({"step": step, **values})


OPENERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
