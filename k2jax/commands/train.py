"""`k2jax train`: train a named or published model, or resume the run in a folder."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax import cluster, configs
from k2jax.config import ConfigError, MeshConfig, RunConfig, each_knob, to_json
from k2jax.runtime.hardware import count_cores

if TYPE_CHECKING:
    from k2jax.model import Model

PROMPT = "def "  # of the sample at a run's end
MOST_EMULATED = 8  # devices that a suggestion has; more were never measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `k2jax train`; every field of the config is one, listed by `--help`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-h", "--help", action=_Help, nargs=0, help="show this and every setting of CONFIG"
    )
    parser.add_argument("config", help=f"{', '.join(configs.NAMES)}, or a published config.json")
    parser.add_argument("--out", metavar="DIR", help="run folder; default: runs/CONFIG")
    parser.add_argument(
        "--init",
        default="",
        metavar="CHECKPOINT",
        help="weights to start from: a run, a"
        " checkpoint or a published folder; a checkpoint in the run folder wins over it",
    )
    cluster.add_arguments(parser)


class _Help(argparse.Action):
    """Prints the options, and every setting with its value in the config that was named."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object
    ) -> None:
        parser.epilog = _describe_settings(getattr(namespace, "config", None))
        parser.print_help()
        parser.exit()


def _describe_settings(config: str | None) -> str:
    """List the settings section by section, with the values of `config` or the defaults."""
    run = configs.load(config) if config else RunConfig()
    whose = f"values in {config}" if config else "defaults"
    lines = [f"settings (--section.field VALUE) and their {whose}:"]
    section = ""
    for name, each, value in each_knob(run):
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            lines.append(f"\n{section}:")
        lines.append(f"  {f'--{name}':29} {each.describe()} [{value}]")
    return "\n".join(lines)


def train(
    config: RunConfig | str,
    out: str | Path = "",
    *,
    init: str = "",
    say: Callable[[str], None] = print,
    **settings: Any,
) -> "Model":
    """Train a model in this process, or resume the run in `out`: `k2jax train` for Python.

        model = k2jax.train("tiny", "runs/short", train={"steps": 30}, data={"rows": 16})

    Args:
        config: a config, the name of one, or a published `config.json`.
        out: folder of the run; default: `runs/` and the name of the config.
        init: weights to start from: a run, a checkpoint or a published folder; a checkpoint in
            `out` wins over it.
        say: called with each line worth printing.
        **settings: as for `k2jax.configure`.

    Returns:
        The trained model, on the mesh of the run.

    Raises:
        ConfigError: the run cannot work here; nothing that was saved is lost.
    """
    run = configs.configure(config, **settings)
    from k2jax.runtime import backend
    from k2jax.training import loop

    backend.prepare(run.mesh.devices)
    return loop.train(run, out or Path("runs") / run.name, init=init, say=say)


def main(args: argparse.Namespace) -> int:
    """Train; the exit code: 75 where one of several processes was asked to stop before the end."""
    began = time.perf_counter()
    run = configs.configure(args.config, **args.settings)
    out = choose_folder(args.out, run.name)

    def work() -> None:
        from k2jax.training import loop

        if cluster.current().count == 1 and not any(n.startswith("mesh.") for n in args.settings):
            _suggest_mesh_here(run)
        loop.train(run, out, init=args.init, say=_say, began=began, closing=print_sample)

    return run_together(args, run, out, {}, work)


def choose_folder(out: str | None, name: str) -> Path:
    """Return the folder of a run, by default one called `name` in `runs`.

    Raises:
        ConfigError: `out` cannot be one.
    """
    if out and "://" in out:
        raise ConfigError(f"--out {out} is no folder; mount the bucket and name its path")
    folder = Path(out or Path("runs") / name)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    return folder


def run_together(
    args: argparse.Namespace,
    run: RunConfig,
    out: Path,
    facts: dict[str, Any],
    work: Callable[[], None],
) -> int:
    """Prepare jax, join the run's other processes, and do its work.

    Args:
        args: of the command.
        run: its settings, which must be the same in all processes.
        out: folder of the run.
        facts: what else must be the same.
        work: trains, and leaves the last checkpoint.

    Returns:
        The exit code: 75 where one of several processes was asked to stop before the end.
    """
    # Imported here so that help and mistakes answer before jax loads.
    from k2jax.runtime import backend

    place = cluster.find(args.coordinator, args.processes, args.process)
    backend.prepare(run.mesh.devices, place.processes if place else 1)
    facts = to_json(run) | {"--out": str(out.absolute()), "--init": args.init} | facts
    with cluster.member(place, facts, run.mesh, _say, out) as group:
        from k2jax.checkpoint import Checkpoints

        work()
        stopped = (Checkpoints(out).latest() or 0) < run.train.steps
    # Schedulers start a job again only where its processes fail.
    return cluster.EXIT_RETRY if stopped and group.count > 1 else 0


def suggest_mesh(run: RunConfig, cores: int) -> str:
    """Name the mesh that gives each of a CPU's cores a device; empty: the run has no other.

    One device leaves a fifth of two cores idle, and more devices than cores only add work.
    """
    rows = run.data.rows // run.train.accumulate
    devices = 1
    while 2 * devices <= min(cores, MOST_EMULATED) and not (
        run.model.experts % (2 * devices) or rows % (2 * devices)
    ):
        devices *= 2
    if devices in (1, run.mesh.devices):
        return ""
    better = MeshConfig(expert=devices).sizes
    words = [f"--mesh.{axis} {n}" for axis, n in better.items() if n != run.mesh.sizes[axis]]
    return (
        f"this machine has {cores} cores: {' '.join(words)} is usually faster than {run.mesh}"
        f" ({devices} emulated devices)"
    )


def _suggest_mesh_here(run: RunConfig) -> None:
    import jax

    if jax.default_backend() == "cpu":
        if line := suggest_mesh(run, count_cores()):
            _say(line)


def print_sample(model: "Model") -> None:
    """Continue PROMPT; all processes compute it, and the first one prints it."""
    import jax

    from k2jax.inference.generate import generate

    assert model.tokenizer is not None
    ids = generate(model, [PROMPT], max_new_tokens=min(64, model.config.context // 2))[0]
    if jax.process_index() == 0:
        _say(f"sample:\n{PROMPT}{model.tokenizer.decode(ids)}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
