"""Checkpoints of a run: written in the background, complete or absent, restored on any mesh.

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

from k2jax.checkpoint import integrity, orbax_io, steps
from k2jax.checkpoint.restorable import check_folder
from k2jax.checkpoint.tree import Flat, compare, flatten, inventory, place_concretely, unflatten
from k2jax.config import ConfigError, one_line
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
            keep: newest steps to keep, and one more while the next is being written.
            keep_every: multiples of this step are kept for ever; 0: none.
        """
        self.folder = epath.Path(folder).absolute()
        self.root = self.folder / steps.CHECKPOINTS
        self.keep, self.keep_every = keep, keep_every
        self._writer: Any = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first."""
        return steps.list_complete(self.root)

    def latest(self) -> int | None:
        """Return the newest complete step; None: there is none."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the `meta` of `save`, with "step", "format", "versions" and "arrays" added.

        Raises:
            ConfigError: the step is missing, incomplete or unreadable.
        """
        return steps.read_meta(self._existing_step(step))

    def check(self, step: int, *parts: str) -> None:
        """Read the files of a step and compare them with what was written, on all processes.

        Args:
            step: one that `latest` or `steps` returned.
            parts: those to check; none: all. A step without a record of its files passes.

        Raises:
            ConfigError: the step is damaged; names the first file.
        """
        if why := self._describe_damage(step, parts):
            raise self._damage_error(step, why)

    def recover(self, say: Callable[[str], None]) -> int | None:
        """Return the newest step that is as it was written; None: nothing was saved yet.

        Damaged ones above it are set aside as `<step>.damaged`, so that these steps can be saved
        again, and reported to `say`. Only for a run that resumes in this folder.

        Raises:
            ConfigError: every step is damaged; nothing is renamed.
        """
        check_folder(self.root)
        damaged: dict[int, str] = {}
        for step in reversed(integrity.broadcast_steps(steps.list_numbered(self.root))):
            if not (why := self._describe_damage(step)):
                break
            damaged[step] = why
        else:
            if damaged:
                each = "; ".join(f"{step} ({why})" for step, why in damaged.items())
                raise ConfigError(
                    f"no checkpoint in {self.root} is intact: {each}; move that folder away to"
                    " start over"
                )
            return None
        for number, why in damaged.items():
            if jax.process_index() == 0:
                steps.set_aside(self.root / str(number))
            say(
                f"checkpoint of step {number} in {self.root} is damaged ({why}); it is kept as"
                f" {number}{steps.DAMAGED}, and the run resumes from step {step}"
            )
        return step

    def _describe_damage(self, step: int, parts: tuple[str, ...] = ()) -> str:
        path = self.root / str(step)
        try:
            why = steps.describe_missing(path)
        except OSError as error:  # a stale listing: all processes must still exchange their result
            why = f"cannot be read ({error.strerror})"
        if not why:
            try:
                steps.read_meta(path)
            except ConfigError:
                why = f"{steps.META}/metadata is not JSON"
        if not why:
            share = jax.process_index(), jax.process_count()
            why = integrity.describe_damage(path, (*parts, steps.META) if parts else (), share)
        return integrity.first_error_across_processes(why)

    def _damage_error(self, step: int, why: str) -> ConfigError:
        others = [s for s in self.steps() if s < step]
        older = f"; older complete steps: {_join(others)}" if others else ""
        return ConfigError(f"checkpoint of step {step} in {self.root} is damaged ({why}){older}")

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Write a step in the background; returns once the arrays are copied to the host.

        Waits for the save before it. On a CPU nothing is copied: a later donation of an array
        that is still being written makes XLA copy it.

        Args:
            step: one that was not saved yet.
            state: pytrees of arrays by name of the part: "params", "opt".
            meta: JSON-able; whatever is needed to resume.

        Raises:
            ConfigError: this or the previous save failed; one line says why.
            ValueError: the step was saved already.
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
            if why := integrity.first_error_across_processes(self._why_save_cannot_start(flat)):
                raise OSError(errno.ENOSPC, why)
            self._writer.save(self.root / str(step), args=orbax_io.make_save_args(flat, entry))
        except Exception as error:
            raise self._save_error(error) from error

    def _why_save_cannot_start(self, flat: Mapping[str, Flat]) -> str:
        """Return why this process cannot start to save; empty: it can."""
        try:
            self._open(tuple(flat))
            return _describe_lack_of_room(self.root, flat)
        except OSError as error:
            return orbax_io.explain_failure(error)

    def has(self, step: int) -> bool:
        """Return whether a step is complete for process 0; all processes must call this."""
        return step in integrity.broadcast_steps(self.steps())

    def _open(self, parts: tuple[str, ...]) -> None:
        if self._writer is None:
            check_folder(self.root)
            self.root.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                steps.sweep(self.root)
            self._writer = orbax_io.make_writer(parts)

    def wait(self) -> None:
        """Finish the save in progress, then delete old steps and what a failed save left late.

        Raises:
            ConfigError: it failed, and older checkpoints are untouched; or it succeeded, and old
                ones cannot be deleted.
        """
        if self._saving is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        self._saving = None
        memory.trim_malloc()
        if jax.process_index() == 0:
            try:
                steps.prune(self.root, self.keep, self.keep_every)
            except OSError as error:
                why = orbax_io.explain_failure(error)
                raise ConfigError(
                    f"old checkpoints in {self.root} cannot be deleted: {why}"
                ) from error
            with contextlib.suppress(OSError):  # still being written to; the next save tries again
                steps.sweep(self.root)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run takes another path from `step` on."""
        self.wait()
        if jax.process_index() == 0:
            steps.drop_after(self.root, step)

    def close(self) -> None:
        """Wait for the save in progress, and free what saving holds."""
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
        """Return the state of a step, bit for bit, with the shardings of the abstract arrays.

        Args:
            step: a complete one.
            abstract_state: pytrees of `jax.ShapeDtypeStruct` by part; parts left out are not
                read.

        Raises:
            ConfigError: no such step, another model or optimizer, or unreadable files.
        """
        return {part: self._restore(step, part, tree) for part, tree in abstract_state.items()}

    def restore_params(self, step: int, abstract_params: Flat) -> Flat:
        """Return the weights alone, cast to the abstract arrays' dtypes.

        Raises:
            ConfigError: as `restore`.
        """
        return self._restore(step, "params", abstract_params, exact=False)

    def _restore(self, step: int, part: str, tree: Any, exact: bool = True) -> Any:
        path = self._existing_step(step)
        wanted = {name: place_concretely(leaf) for name, leaf in flatten(tree).items()}
        saved = steps.read_meta(path)["arrays"].get(part, {})
        compare(f"checkpoint {path}", part, saved, wanted, exact)
        try:
            flat = orbax_io.restore(path / part, wanted)
        except Exception as error:
            raise self._damage_error(step, one_line(error, typed=True)) from error
        return unflatten(tree, flat)

    def _existing_step(self, step: int) -> epath.Path:
        path = self.root / str(step)
        if not steps.is_step(path):
            complete = self.steps()
            known = f"complete steps: {_join(complete)}" if complete else "there is none"
            raise ConfigError(f"no checkpoint of step {step} in {self.root}; {known}")
        return path

    def _save_error(self, error: Exception) -> ConfigError:
        """Return the error of a failed save; frees the disk space it took."""
        step, self._saving, self._writer = self._saving, None, None
        _sweep_after_failure(self.root)
        latest = self.latest()
        safe = f"step {latest} is complete there" if latest is not None else "none is there yet"
        why = orbax_io.explain_failure(error)
        return ConfigError(
            f"checkpoint of step {step} could not be written to {self.root}: {why}; {safe}"
        )


def _describe_lack_of_room(root: epath.Path, flat: Mapping[str, Flat]) -> str:
    """Return why a save does not fit, before anything is written; empty: it fits."""
    if str(root).startswith("gs://"):
        return ""
    size = sum(leaf.nbytes for leaves in flat.values() for leaf in leaves.values())
    free = shutil.disk_usage(root).free
    full = size // jax.process_count() > free
    return f"it takes {size:,} bytes, {free:,} are free" if full else ""


def _sweep_after_failure(root: epath.Path) -> None:
    """Free what a failed save took, while its other threads may still be writing."""
    end = time.monotonic() + PATIENCE
    while jax.process_index() == 0 and time.monotonic() < end:
        try:
            steps.sweep(root)
            return
        except OSError:
            time.sleep(0.1)


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
