"""Tasks by name, and what is asked for on the command line."""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.config import ConfigError, nearest
from k2jax.evals.presets import find_preset
from k2jax.evals.task import Task

YAML = (".yaml", ".yml")


class Kind(NamedTuple):
    """A kind of task.

    Attributes:
        module: where it is.
        name: of its class, whose first argument is the file.
        options: further arguments.
        has_data: a package carries the data, so that no file need be given.
    """

    module: str
    name: str
    options: dict[str, Any] = {}  # noqa: RUF012, never changed
    has_data: bool = False


KINDS = {
    "text": Kind("text_tasks", "TextLikelihood"),
    "choice": Kind("text_tasks", "MultipleChoice"),
    "math": Kind("math_answers", "MathAnswers"),
    "humaneval": Kind("code_problems", "HumanEval", has_data=True),
    "humaneval-chat": Kind("code_problems", "HumanEval", {"chat": True}, has_data=True),
    "multipl-e": Kind("multipl_e", "MultiplE"),
    "livecodebench": Kind("livecodebench", "LiveCodeBench"),
    "bfcl": Kind("bfcl", "Bfcl"),
    "swe-bench": Kind("swe_bench", "SweBench"),
}


class HarnessFiles(NamedTuple):
    """Tasks of lm-eval in local files.

    Attributes:
        folder: of the files; data files are named from there.
        file: one YAML; None: all of the folder.
    """

    folder: Path
    file: Path | None


def open_tasks(specs: Sequence[str], preset: str = "") -> list[Task | HarnessFiles]:
    """Open what `--tasks` names.

    Args:
        specs: each is KIND:FILE, KIND of a task whose data a package carries, a YAML file of
            lm-eval, or a folder of such files.
        preset: replaces the settings of the kind that it is for, which may then be left out.

    Raises:
        ConfigError: no such task or file, malformed data, or a package is missing.
    """
    chosen = find_preset(preset) if preset else None
    opened: list[Task | HarnessFiles] = []
    for named in specs:
        is_file = ":" not in named and named not in KINDS
        spec = f"{chosen.task}:{named}" if chosen and chosen.task and is_file else named
        task = _open_one(spec)
        if chosen and isinstance(task, Task):
            kind = spec.partition(":")[0]
            if chosen.task not in ("", kind):
                raise ConfigError(f"preset {preset} is for {chosen.task}, not for {kind}")
            task.settings = chosen.settings
        opened.append(task)
    names = [task.name for task in opened if isinstance(task, Task)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two tasks are called {twice[0]!r}; evaluate them one after the other")
    return opened


def _open_one(spec: str) -> Task | HarnessFiles:
    name, _, file = spec.partition(":")
    if name in KINDS:
        kind = KINDS[name]
        if not file and not kind.has_data:
            raise ConfigError(f"task {name} needs a file: {name}:FILE")
        make = getattr(importlib.import_module(f"k2jax.evals.{kind.module}"), kind.name)
        made = make(file, **kind.options)
        assert isinstance(made, Task)
        return made
    path = Path(spec)
    if path.is_dir() and any(entry.suffix in YAML for entry in path.iterdir()):
        return _check_harness(HarnessFiles(path.resolve(), None))
    if path.is_file() and path.suffix in YAML:
        return _check_harness(HarnessFiles(path.resolve().parent, path.resolve()))
    if path.exists():
        raise ConfigError(
            f"{spec} has no task of lm-eval (YAML); for our own say KIND:{spec},"
            f" with one of {', '.join(KINDS)}"
        )
    raise ConfigError(f"no task and no file {spec!r}; {nearest(name, KINDS)}")


def _check_harness(files: HarnessFiles) -> HarnessFiles:
    if not has_harness():
        raise ConfigError("tasks of lm-eval need that package: pip install 'k2jax[eval]'")
    return files


@functools.cache
def has_harness() -> bool:
    """Whether lm-eval is installed."""
    return importlib.util.find_spec("lm_eval") is not None
