"""Lists of SHA-256 sums, in the format of `sha256sum`: a hex digest, two blanks, a path."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from k2jax.config import ConfigError
from k2jax.runtime.files import write_atomic
from k2jax.runtime.hardware import count_cores
from k2jax.weights.hf_folder import Remote

NAME = "manifest.sha256"
BUFFER = 2**24


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        found = hashlib.sha256()
        buffer = bytearray(BUFFER)
        while n := file.readinto(buffer):
            found.update(memoryview(buffer)[:n])
    return found.hexdigest()


def files(folder: Path) -> list[str]:
    """Paths of all files below `folder`, but for its manifest."""
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sorted(str(p.relative_to(folder)) for p in found if p != folder / NAME)


def make(folder: Path) -> Path:
    """Write the manifest of everything in `folder`; its path."""
    names = files(folder)
    sums = _digests(folder, names)
    text = "".join(f"{s}  {name}\n" for s, name in zip(sums, names, strict=True))
    path = folder / NAME
    write_atomic(path, text)
    return path


def read(path: Path) -> dict[str, str]:
    """Digest of each path.

    Raises:
        ConfigError: it is not such a list.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the manifest {path}: {error}") from None
    found = {}
    for n, text in enumerate(lines, 1):
        sum_, _, name = text.partition(" ")
        if len(sum_) != 64 or not set(sum_) <= set("0123456789abcdef") or not name:
            raise ConfigError(f"{path}, line {n}: not a SHA-256 digest and a path: {text[:80]!r}")
        found[name.lstrip(" *").removeprefix("./")] = sum_
    return found


def check(folder: Path, path: Path, needed: Iterable[str], remote: Remote | None = None) -> int:
    """Hold files against a manifest; how many.

    Args:
        folder: of the files.
        path: of the manifest.
        needed: files that it must list.
        remote: where the files are, if not in the folder.

    Raises:
        ConfigError: names the first file that is missing, not listed, or has another digest.
    """
    told = read(path)
    for name in needed:
        if name not in told:
            raise ConfigError(f"{folder / name} is not in {path}")
    away = set(remote.names if remote else ())
    for name in told:
        if name not in away and not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing; {path} lists it")
    for name, found in zip(told, _digests(folder, told, remote), strict=True):
        if found != told[name]:
            raise ConfigError(f"{folder / name} is corrupt: its SHA-256 is not that of {path}")
    return len(told)


def _digests(folder: Path, names: Iterable[str], remote: Remote | None = None) -> list[str]:
    def one(name):
        return remote.sha256(name) if remote else digest(folder / name)

    with ThreadPoolExecutor(count_cores()) as pool:
        return list(pool.map(one, names))
