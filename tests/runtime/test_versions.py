"""The hash of the code, which tells whether two runs had the same; which JAX was tested."""

import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest

from k2jax.runtime import backend, versions
from k2jax.runtime.versions import source_hash

ROOT = Path(__file__).parents[2]


def test_it_changes_with_any_file(monkeypatch):
    before = source_hash()
    assert source_hash() == before
    read = Path.read_bytes
    for name in ("loop.py", "kimi.py", "table.py"):  # of k2jax, configs and sharding

        def other(path, name=name):
            return read(path) + b"#" * (path.name == name)

        monkeypatch.setattr(Path, "read_bytes", other)
        assert source_hash() != before


def test_the_hash_is_of_the_names_and_bytes_of_all_code(tmp_path, monkeypatch):
    import k2jax.sharding

    monkeypatch.setattr(k2jax.sharding, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "a.py").write_text("1")
    first = source_hash()
    assert first == source_hash() and len(first) == 64
    (tmp_path / "a.py").write_text("2")
    second = source_hash()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, source_hash()}) == 3


@pytest.fixture
def warned(monkeypatch, capsys):
    """What starting twice on a version of JAX writes to stderr."""

    def warned(version):
        real = importlib.metadata.version

        def fake(name):
            return version if name == "jax" else real(name)

        monkeypatch.setattr(importlib.metadata, "version", fake)
        for module in (backend.jax.config, backend.memory):  # this process has started long ago
            for name in ("update", "limit_malloc_arenas"):
                monkeypatch.setattr(module, name, lambda *_: None, raising=False)
        versions.warn_if_untested.cache_clear()
        backend.prepare()
        backend.prepare()
        versions.warn_if_untested.cache_clear()
        return capsys.readouterr().err

    return warned


@pytest.mark.parametrize("version", ["0.10.1", "0.9.0", "0.13.0", "0.13.0.dev20270101", "1.0"])
def test_a_jax_that_nobody_tested_gets_one_line(warned, version):
    tested = "0.10.2, 0.11.2, 0.12.0.1"
    assert warned(version) == f"k2jax: jax {version} is untested; tested are {tested}\n"


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.12.0.1", "0.12.7", "0.12.1rc1"])
def test_a_tested_jax_and_those_between_get_none(warned, version):
    assert warned(version) == ""


def test_the_bounds_of_the_package_are_those_that_were_tested():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    bounds = f"jax >= {versions.OLDEST}, < {versions.BEYOND}"
    assert bounds in setup["options"]["install_requires"].splitlines()
    pythons, releases = zip(*versions.TESTED, strict=True)
    assert setup["options"]["python_requires"] == f">={pythons[0]}"
    assert releases[0] == versions.OLDEST
    readme = (ROOT / "README.md").read_text()
    assert all(f"| {python} | {jax} |" in readme for python, jax in versions.TESTED)


def test_private_names_of_jax_are_imported_in_one_file():
    private = re.compile(r"jax\._src|pallas import triton|pallas\.triton")
    files = [
        p
        for folder in ("k2jax", "sharding", "configs", "tests", "bench")
        for p in (ROOT / folder).rglob("*.py")
    ]
    names = {p.name for p in files if private.search(p.read_text())}
    assert names == {"versions.py", "test_versions.py"}
