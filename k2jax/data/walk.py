"""The files of a folder: which are read, and how many are left out for which reason."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from k2jax.config import ConfigError
from k2jax.data import kinds
from k2jax.data.values import is_record

TOKENS = "tokens.json"  # in a folder that `k2jax data` wrote
WORK = ".parts"  # in one that it has not finished
# Kinds of which a folder may have other files than data: they are read if they have records.
ASKED = (".json", *kinds.CELLS)


class LeftOut(NamedTuple):
    """Files, or folders, that are not read for one reason."""

    reason: str
    number: int
    first: str


class Walk:
    """Goes through a folder, following links, in a fixed order.

    Attributes:
        files: to read.
    """

    def __init__(self, root: Path, field: str):
        """Look at all of it; `field` is where records have their text.

        Raises:
            ConfigError: a folder in it cannot be read.
        """
        self.files: list[Path] = []
        self._root, self._field = root, field
        self._left_out: dict[str, list[str]] = {}
        for file in self._walk():
            if reason := self._why_not(file):
                self._leave_out(file, reason)
            else:
                self.files.append(file)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The rest, the commonest reason first."""
        each = [LeftOut(why, len(names), names[0]) for why, names in self._left_out.items()]
        return tuple(sorted(each, key=lambda left: -left.number))

    def _walk(self) -> Iterator[Path]:
        # Of each folder, it and its parents.
        above: dict[Path, tuple[str, ...]] = {self._root: (os.path.realpath(self._root),)}
        for name, folders, files in os.walk(self._root, onerror=_refuse, followlinks=True):
            folder = Path(name)
            parents = above.pop(folder)
            kept = []
            for inner in sorted(folders):
                path = folder / inner
                real = os.path.realpath(path)
                if inner.startswith("."):
                    self._leave_out(path, "hidden")
                elif real in parents:
                    self._leave_out(path, "a link to a folder above it")
                elif (path / TOKENS).is_file() or (path / WORK).is_dir():
                    self._leave_out(path, "a folder of tokens")
                else:
                    kept.append(inner)
                    above[path] = (*parents, real)
            folders[:] = kept
            yield from (folder / inner for inner in sorted(files))

    def _why_not(self, file: Path) -> str:
        """Why a file is not read; "": it is."""
        kind = kinds.form_by_name(file).kind
        if file.name.startswith(".") or not kind:
            hidden = file.name.startswith(".")
            return "hidden" if hidden else file.suffix.lower() or "without a suffix"
        if not file.is_file():
            return "no regular file" if file.exists() else "a broken link"
        if kind == ".arrow" and file.name.startswith("cache-"):
            return "a cache of the datasets package"
        return f"{kind} without records" if not self._has_records(file, kind) else ""

    def _has_records(self, file: Path, kind: str) -> bool:
        if kind not in ASKED:
            return True
        packing = kinds.form_by_name(file).packing
        with kinds.explain(file):
            if kind == ".json":
                return is_record(kinds.first_record(file, packing), self._field)
            head = (
                kinds.read_head(file, packing).removeprefix(kinds.MARK).decode("utf-8", "replace")
            )
            return self._field in next(csv.reader(head.splitlines(), kinds.dialect(kind)), [])

    def _leave_out(self, path: Path, reason: str) -> None:
        self._left_out.setdefault(reason, []).append(path.relative_to(self._root).as_posix())


def describe(left_out: tuple[LeftOut, ...]) -> str:
    """One line on what is not read; "" where all is."""
    if not left_out:
        return ""
    count = sum(left.number for left in left_out)
    reasons = [f"{left.number:,} {left.reason} ({left.first})" for left in left_out]
    return f"{count:,} not read: {', '.join(reasons)}"


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(f"cannot read folder {error.filename}: {error.strerror}")
