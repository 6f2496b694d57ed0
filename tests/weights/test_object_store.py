"""Folders in object storage, on tensorstore's stores that need no network."""

import hashlib
import json

import numpy as np
import pytest
import tensorstore as ts

from k2jax.config import ConfigError
from k2jax.weights.hf_folder import INDEX, Folder
from k2jax.weights.object_store import Bucket, fetched
from k2jax.weights.safetensors import Reader, write

TENSORS = {"a.weight": np.arange(20, dtype=np.float32).reshape(5, 4), "b": np.float32(3)}


def stored(files, url="memory://bucket/model"):
    """A store of its own with these files."""
    store = ts.KvStore.open(f"{url}/", context=ts.Context()).result()
    for name, content in files.items():
        store.write(name, content).result()
    return store


@pytest.fixture
def content(tmp_path):
    write(tmp_path / "w.safetensors", TENSORS, {"format": "pt"})
    return (tmp_path / "w.safetensors").read_bytes()


def reader(content, folder):
    bucket = Bucket(stored({"w.safetensors": content}), "gs://b/model/")
    return Reader(folder / "w.safetensors", bucket.ranges("w.safetensors"))


def test_tensors_and_rows_are_those_of_the_file(content, tmp_path):
    far, near = reader(content, tmp_path), Reader(tmp_path / "w.safetensors")
    assert list(far) == list(near) and far.bytes == near.bytes == len(content)
    for rows in (slice(None), slice(1, 3), slice(3, 99), slice(4, 2)):
        for name in TENSORS:
            np.testing.assert_array_equal(far.read(name, rows), near.read(name, rows))
    np.testing.assert_array_equal(far.read("a.weight", slice(1, 3)), TENSORS["a.weight"][1:3])


def test_only_the_bytes_that_are_asked_for_travel(content, tmp_path):
    bucket = Bucket(stored({"w.safetensors": content}), "gs://b/model")
    asked, read = [], bucket.read
    bucket.read = lambda name, begin, end: asked.append(end - begin) or read(name, begin, end)
    far = Reader(tmp_path / "w.safetensors", bucket.ranges("w.safetensors"))
    length = int.from_bytes(content[:8], "little")
    assert asked == [8, length, 1, 1]  # header, and whether it ends where it should
    far.read("a.weight", slice(2, 4))
    assert asked[4:] == [2 * 4 * 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "w.safetensors is cut short: tensor 'b' ends at byte"),
        (lambda c: c + b"x", "w.safetensors has 1 bytes after its last tensor"),
        (lambda c: c[:20], "cut short or not a safetensors file"),
        (lambda c: b"", "cut short or not a safetensors file"),
        (lambda c: b"\x80\x04" + c, "cut short or not a safetensors file"),
    ],
)
def test_damage_is_told_as_of_files_here(content, tmp_path, damage, message):
    with pytest.raises(ConfigError, match=message):
        reader(damage(content), tmp_path)


def test_what_is_small_is_fetched_and_a_single_file_gets_an_index(content, tmp_path):
    files = {"config.json": b"{}", "README.md": b"x" * 9, "large.txt": b"x" * 10, "w.bin": b"x"}
    files |= {"model.safetensors": content, "sub/other.txt": b"x"}
    bucket = Bucket(stored(files), "gs://b/model")
    bucket.fetch(tmp_path, lambda name: not name.endswith((".bin", ".safetensors")), 9)
    (tmp_path / "w.safetensors").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", INDEX]
    assert (tmp_path / "README.md").read_bytes() == b"x" * 9
    folder = Folder(tmp_path, bucket)
    folder.inspect()
    assert set(json.loads((tmp_path / INDEX).read_text())["weight_map"]) == set(TENSORS)
    np.testing.assert_array_equal(folder.read("a.weight"), TENSORS["a.weight"])


def test_files_missing_or_not_in_the_index_are_named(content, tmp_path):
    def index(file):
        return json.dumps({"weight_map": dict.fromkeys(TENSORS, file)}).encode()

    for files, message in (
        ({INDEX: index("none.safetensors")}, "none.safetensors: no such file"),
        ({INDEX: index("w.safetensors"), "stray.safetensors": content}, "stray.* is not in"),
    ):
        bucket = Bucket(stored(files | {"w.safetensors": content}), "gs://b/model")
        bucket.fetch(tmp_path, lambda name: name == INDEX, 10**6)
        with pytest.raises(ConfigError, match=message):
            Folder(tmp_path, bucket).inspect()


def test_sums_are_those_of_the_bytes(content, monkeypatch):
    monkeypatch.setattr("k2jax.weights.object_store.WINDOW", 7)
    bucket = Bucket(stored({"w.safetensors": content}), "gs://b/model")
    assert bucket.sha256("w.safetensors") == hashlib.sha256(content).hexdigest()


def test_trouble_gets_one_line(content):
    with pytest.raises(ConfigError, match=r"no files in gs://b/model$"):
        Bucket(stored({}), "gs://b/model/")
    with pytest.raises(ConfigError, match=r"no files in gs://b; model/x is further below"):
        Bucket(stored({"model/x": b""}), "gs://b")
    with pytest.raises(ConfigError, match=r"cannot read gs://: .*Invalid GCS bucket name"):
        Bucket.open("gs://")
    bucket = Bucket(stored({"x": b""}), "gs://b/model")
    with pytest.raises(ConfigError, match=r"gs://b/model/y is missing"):
        bucket.read("y")


class Down:
    """A store that answers like one that is out of reach."""

    def list(self):
        return self

    def result(self):
        raise ValueError("PERMISSION_DENIED: Caller does not have storage.objects.list\n[a='b']")


def test_a_store_that_refuses_is_quoted_in_one_line():
    with pytest.raises(ConfigError, match=r"cannot read gs://b: PERMISSION_DENIED: .* \[a='b'\]$"):
        Bucket(Down(), "gs://b")


def test_errors_name_the_source_and_not_the_copy(tmp_path):
    (tmp_path / "config.json").write_text("{")
    url = f"file://{tmp_path}"
    with (
        pytest.raises(ConfigError, match=f"^{url}/config.json is bad$"),
        fetched(url + "/", lambda name: True, 100) as (folder, bucket),
    ):
        assert bucket is not None and (folder / "config.json").read_text() == "{"
        raise ConfigError(f"{folder}/config.json is bad")
    assert not folder.exists()
    with fetched(str(tmp_path), lambda name: True, 100) as found:
        assert found == (tmp_path, None)
