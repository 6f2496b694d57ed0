import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.data import Batches, shards
from k2jax.data.rows import NAMES, make_rows, row_count
from k2jax.data.shards import Shards, ShardWriter
from k2jax.data.store import Store
from k2jax.data.stream import document

pytest.importorskip("array_record")

SIZES = (5, 1, 2, 30, 17, 64, 3, 200)


@pytest.fixture
def written(tmp_path, make_store, monkeypatch):
    """The same documents in memory and in two files of records of 16 tokens."""
    monkeypatch.setattr(shards, "RECORD", 16)
    store = make_store(*SIZES)
    mask = np.random.default_rng(0).random(store.size) < 0.3
    store = Store(store.tokens, store.offsets, store.bytes, mask)
    files = []
    for name, documents in (("a", range(3)), ("b", range(3, len(SIZES)))):
        writer = ShardWriter(tmp_path / f"{name}.arrayrecord")
        for d in documents:
            writer.add(
                document(store.document(d).tolist(), mask[store.offsets[d] :][: SIZES[d] + 2])
            )
        files.append(writer.close())
    return store, Shards(tmp_path, files)


@pytest.mark.parametrize("context", [1, 7, 16, 40, 500])
def test_rows_of_files_are_those_of_the_documents_in_memory(written, context):
    store, files = written
    assert files.size == store.size
    rows = np.arange(-1, row_count(store, context) + 2)[::-1]
    wanted, got = make_rows(store, rows, context), make_rows(files, rows, context)
    for name in NAMES:
        np.testing.assert_array_equal(got[name], wanted[name], name)
    assert 0 < wanted["weights"].sum() < wanted["segments"].astype(bool).sum()


def test_only_the_records_of_the_rows_are_read(written, monkeypatch):
    _, files = written
    seen = []
    read = files._read
    monkeypatch.setattr(
        files, "_read", lambda shard, records: seen.extend(records) or read(shard, records)
    )
    files.cut(np.array([3 * 16 + 5, 3 * 16 + 9]), 8)
    assert len(seen) == 2 and len(files._readers) == 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_the_records_of_its_own_rows_only(written, monkeypatch, hosts):
    _, files = written
    seen, read = [], files._read
    monkeypatch.setattr(files, "_read", lambda n, which: seen.append(len(which)) or read(n, which))
    Batches(files, 8, 16, 0).batch(0, [hosts - 1], hosts)
    # A row of 17 words lies in at most two records of 16, or three where a file ends.
    assert 8 // hosts <= sum(seen) <= 3 * 8 // hosts


def test_few_files_are_held_open(written, monkeypatch):
    store, files = written
    monkeypatch.setattr(shards, "OPEN", 1)
    for start in (0, store.size - 4, 0):
        assert (files.cut(np.array([start]), 4) & shards.ID == store.tokens[start:][:4]).all()
        assert len(files._readers) == 1


def test_all_documents_come_back_as_a_store(written, byte_tokenizer):
    store, files = written
    got = files.store(byte_tokenizer.byte_lengths())
    np.testing.assert_array_equal(got.tokens, store.tokens)
    np.testing.assert_array_equal(got.offsets, store.offsets)
    np.testing.assert_array_equal(got.unscored, store.unscored)
    assert got.bytes == (store.tokens[~store.unscored] < 256).sum()


def test_a_file_cut_short_or_missing_is_named(written, tmp_path):
    _, files = written
    found = [
        shards.Shard(p.name, n, p.stat().st_size) for p, n in zip(files.paths, [12, 9], strict=True)
    ]
    with (tmp_path / "b.arrayrecord").open("rb+") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match=r"b\.arrayrecord has 100 bytes; \d+ were written"):
        Shards(tmp_path, found)
    (tmp_path / "b.arrayrecord").unlink()
    with pytest.raises(ConfigError, match=r"b\.arrayrecord is missing; "):
        Shards(tmp_path, found)


def test_a_damaged_file_is_named(written):
    _, files = written
    content = bytearray(files.paths[1].read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    files.paths[1].write_bytes(content)
    with pytest.raises(ConfigError, match=r"b\.arrayrecord is damaged"):
        files.cut(np.arange(0, files.size, 8), 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.unlink(),
        lambda f: f.write_bytes(b"x"),
        lambda f: np.save(f, np.ones(2, np.uint32)),
    ],
)
def test_damaged_lengths_are_named(written, tmp_path, damage):
    _, files = written
    damage(tmp_path / "b.lengths.npy")
    with pytest.raises(ConfigError, match=r"b\.lengths\.npy (is missing or damaged|does not add)"):
        _ = files.offsets


def test_no_file_is_left_where_there_is_no_document(tmp_path):
    assert ShardWriter(tmp_path / "a.arrayrecord").close() is None
    assert not list(tmp_path.iterdir())
