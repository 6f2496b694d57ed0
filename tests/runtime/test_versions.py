"""The hash of the code, which tells whether two processes or two runs had the same."""

from pathlib import Path

from k2jax.runtime.versions import source_hash


def test_it_changes_with_any_file(monkeypatch):
    before = source_hash()
    assert source_hash() == before
    read = Path.read_bytes
    for name in ("loop.py", "kimi.py", "table.py"):  # of k2jax, configs and sharding
        other = lambda path, name=name: read(path) + b"#" * (path.name == name)
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
