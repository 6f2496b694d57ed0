"""Which code this is."""

import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path


def source_hash() -> str:
    """Of the package's Python files, in the order of their names; the same for every process."""
    files: dict[str, Path] = {}  # installed, configs lie within k2jax; in a checkout, beside it
    for package in ("k2jax", "k2jax.configs", "k2jax.sharding"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        name = package.replace(".", "/")
        files |= {f"{name}/{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*.py")}
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
