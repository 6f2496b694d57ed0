"""Checkpoints of a run: written in the background, complete or not there, restored on any mesh.

A step has one part per entry of the state ("params", "opt"), each an OCDBT database of chunked
arrays, so that weights are read without the optimizer's state, and `meta`, a JSON file. Orbax
writes into a temporary folder and renames it when every process has finished.
"""

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
from etils import epath

from k2jax.checkpoint import integrity, steps
from k2jax.checkpoint import orbax_io as engine
from k2jax.checkpoint.tree import Flat, compare, concrete, flatten, inventory, unflatten
from k2jax.config import ConfigError
from k2jax.runtime import memory
from k2jax.runtime.versions import versions

FORMAT = 1
PACKAGES = ("k2jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore")
PATIENCE = 10.0  # seconds that threads of a failed save may take to stop writing


class Checkpoints:
    """The checkpoints of one run folder. Use it as a context manager, or call `close`.

    All processes of a job call every method alike.
    """

    def __init__(self, folder: str | epath.Path, keep: int = 1, keep_every: int = 0):
        """Open `folder`, which need not exist; nothing is touched before the first save.

        Args:
            folder: of the run; steps live in `<folder>/checkpoints/<step>/`.
            keep: newest steps to keep. One more is there while the next is being written.
            keep_every: steps that it divides are kept for ever; 0: none.
        """
        self.folder = epath.Path(folder).absolute()
        self.root = self.folder / steps.CHECKPOINTS
        self.keep, self.keep_every = keep, keep_every
        self._writer: Any = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return steps.complete(self.root)

    def latest(self) -> int | None:
        """The newest complete step."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """What was given to `save`, with "step", "format", "versions" and "arrays" added.

        Raises:
            ConfigError: the step is missing, incomplete or unreadable.
        """
        return steps.read_meta(self._existing(step))

    def check(self, step: int, *parts: str) -> None:
        """Read the files of a step and compare them with what was written, on all processes.

        Args:
            step: one that `latest` or `steps` named.
            parts: those to look at; none: all. What has no record of its files is not looked at.

        Raises:
            ConfigError: the step is damaged; names the first file.
        """
        if why := self._damage(step, parts):
            raise self._damaged(step, why)

    def recover(self, say: Callable[[str], None]) -> int | None:
        """The newest step that is as it was written; None: nothing was saved yet.

        Damaged ones above it are set aside as `<step>.damaged`, so that these steps can be saved
        again, and `say` is told. Only for who goes on saving here.

        Raises:
            ConfigError: every step is damaged; nothing is renamed.
        """
        damaged: dict[int, str] = {}
        for step in reversed(integrity.steps_of_all(steps.numbered(self.root))):
            if not (why := self._damage(step)):
                break
            damaged[step] = why
        else:
            if damaged:
                found = "; ".join(f"{step} ({why})" for step, why in damaged.items())
                raise ConfigError(
                    f"no checkpoint in {self.root} is intact: {found}; move that folder away to"
                    " begin anew"
                )
            return None
        for number, why in damaged.items():
            if jax.process_index() == 0:
                steps.set_aside(self.root / str(number))
            say(
                f"checkpoint of step {number} in {self.root} is damaged ({why}); it is kept as"
                f" {number}{steps.DAMAGED}, and the run goes on from step {step}"
            )
        return step

    def _damage(self, step: int, parts: tuple[str, ...] = ()) -> str:
        path = self.root / str(step)
        try:
            why = steps.incomplete(path)
        except OSError as error:  # a stale listing: all processes must still come to agree
            why = f"cannot be read ({error.strerror})"
        if not why:
            try:
                steps.read_meta(path)
            except ConfigError:
                why = f"{steps.META}/metadata is not JSON"
        if not why:
            share = jax.process_index(), jax.process_count()
            why = integrity.damage(path, (*parts, steps.META) if parts else (), share)
        return integrity.agree(why)

    def _damaged(self, step: int, why: str) -> ConfigError:
        others = [s for s in self.steps() if s < step]
        older = f"; older complete steps: {_list(others)}" if others else ""
        return ConfigError(f"checkpoint of step {step} in {self.root} is damaged ({why}){older}")

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Write a step in the background; returns once the arrays are copied to the host.

        Waits for the save before it. On a CPU nothing is copied: a later donation of an array
        that is still being written makes XLA copy it.

        Args:
            step: one that is not there yet.
            state: pytrees of arrays by name of the part: "params", "opt".
            meta: JSON-able; whatever is needed to go on.

        Raises:
            ConfigError: this or the previous save failed; one line says why.
            ValueError: the step is there already.
        """
        self.wait()
        if step in self.steps():
            raise ValueError(f"step {step} is already in {self.root}")
        flat = {part: flatten(tree) for part, tree in state.items()}
        entry = {
            **meta,
            "step": step,
            "format": FORMAT,
            "versions": versions(PACKAGES),
            "arrays": {part: inventory(leaves) for part, leaves in flat.items()},
        }
        self._saving = step
        try:
            if why := integrity.agree(self._hindered(flat)):
                raise OSError(errno.ENOSPC, why)
            self._writer.save(self.root / str(step), args=engine.save_args(flat, entry))
        except Exception as error:
            raise self._failed(error) from error

    def _hindered(self, flat: Mapping[str, Flat]) -> str:
        """Why this process cannot begin to save; empty: it can."""
        try:
            self._open(tuple(flat))
            return _no_room(self.root, flat)
        except OSError as error:
            return engine.cause(error)

    def has(self, step: int) -> bool:
        """Whether a step is complete, as process 0 sees it; all processes must ask."""
        return step in integrity.steps_of_all(self.steps())

    def _open(self, parts: tuple[str, ...]) -> None:
        if self._writer is None:
            self.root.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                steps.sweep(self.root)
            self._writer = engine.writer(parts)

    def wait(self) -> None:
        """Finish the save in progress, then delete old steps and what a failed save left late.

        Raises:
            ConfigError: it failed, and older checkpoints are as they were; or it did not, and these
                cannot be deleted.
        """
        if self._saving is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None
        memory.trim_malloc()
        if jax.process_index() == 0:
            try:
                steps.prune(self.root, self.keep, self.keep_every)
            except OSError as error:
                raise ConfigError(
                    f"old checkpoints in {self.root} cannot be deleted: {engine.cause(error)}"
                ) from error
            with contextlib.suppress(OSError):  # still being written to; the next save tries again
                steps.sweep(self.root)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run goes another way from `step` on."""
        self.wait()
        if jax.process_index() == 0:
            steps.drop_after(self.root, step)

    def close(self) -> None:
        """`wait`, and free what saving held."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._writer = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def restore(self, step: int, abstract_state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a step, bit for bit, laid out as the abstract arrays say.

        Args:
            step: a complete one.
            abstract_state: pytrees of `jax.ShapeDtypeStruct` by part; parts left out are not
                read.

        Raises:
            ConfigError: no such step, another model or optimizer, or unreadable files.
        """
        return {part: self._restore(step, part, tree) for part, tree in abstract_state.items()}

    def restore_params(self, step: int, abstract_params: Flat) -> Flat:
        """The weights alone, cast to the abstract arrays' dtypes.

        Raises:
            ConfigError: as `restore`.
        """
        return self._restore(step, "params", abstract_params, exact=False)

    def _restore(self, step: int, part: str, tree: Any, exact: bool = True) -> Any:
        path = self._existing(step)
        wanted = {name: concrete(leaf) for name, leaf in flatten(tree).items()}
        saved = steps.read_meta(path)["arrays"].get(part, {})
        compare(f"checkpoint {path}", part, saved, wanted, exact)
        try:
            flat = engine.restore(path / part, wanted)
        except Exception as error:
            raise self._damaged(step, engine.line(error)) from error
        return unflatten(tree, flat)

    def _existing(self, step: int) -> epath.Path:
        path = self.root / str(step)
        if not steps.is_step(path):
            there = self.steps()
            found = f"complete steps: {_list(there)}" if there else "there is none"
            raise ConfigError(f"no checkpoint of step {step} in {self.root}; {found}")
        return path

    def _failed(self, error: Exception) -> ConfigError:
        """The one line for a failed save; frees the disk it took."""
        step, self._saving, self._writer = self._saving, None, None
        _sweep_after_failure(self.root)
        latest = self.latest()
        safe = f"step {latest} is complete there" if latest is not None else "none is there yet"
        return ConfigError(
            f"checkpoint of step {step} could not be written to {self.root}: {engine.cause(error)};"
            f" {safe}"
        )


def _no_room(root: epath.Path, flat: Mapping[str, Flat]) -> str:
    """Why a save cannot fit, before anything is written; empty: it can."""
    if str(root).startswith("gs://"):
        return ""
    size = sum(leaf.nbytes for leaves in flat.values() for leaf in leaves.values())
    free = shutil.disk_usage(root).free
    full = size // jax.process_count() > free
    return f"it takes {size:,} bytes, {free:,} are free" if full else ""


def _sweep_after_failure(root: epath.Path) -> None:
    """Free what a failed save took, while its other threads may still be writing there."""
    end = time.monotonic() + PATIENCE
    while jax.process_index() == 0 and time.monotonic() < end:
        try:
            steps.sweep(root)
            return
        except OSError:
            time.sleep(0.1)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
