import pytest

from k2jax.data import parts
from k2jax.data.sources import find


@pytest.fixture
def cut(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", (100, 400))

    def make(sizes: dict[str, int], only: str = "") -> list[list[tuple[str, int, int]]]:
        for name, size in sizes.items():
            (tmp_path / name).write_bytes(b"x" * size)
        source = find(str(tmp_path / only))
        return [[(p.file.name, *p.share) for p in part.pieces] for part in parts.cut(source)]

    return make


def test_small_files_share_a_part_and_large_ones_are_shared(cut):
    sizes = {"a.txt": 60, "b.txt": 30, "c.txt": 30, "d.jsonl": 250, "e.txt": 5, "f.txt": 5_000}
    assert cut(sizes) == [
        [("a.txt", 0, 1), ("b.txt", 0, 1), ("c.txt", 0, 1)],
        *([("d.jsonl", i, 3)] for i in range(3)),
        [("e.txt", 0, 1), ("f.txt", 0, 1)],  # a file of a folder is one document
    ]


@pytest.mark.parametrize(
    ("name", "size", "of"),
    [
        ("d.jsonl", 5_000, 50),
        ("d.jsonl.gz", 5_000, 8),
        ("d.jsonl.gz", 100, 4),
        ("d.txt", 5_000, 8),
        ("d.parquet", 500, 15),
        ("d.txt", 0, 1),
    ],
)
def test_what_must_be_read_from_its_beginning_is_shared_by_few(cut, name, size, of):
    got = cut({name: size, "other.txt": 1}, name if size else "")
    assert [part for part in got if part[0][0] == name][:of] == (
        [[(name, i, of)] for i in range(of)] if of > 1 else got
    )


def test_parts_grow_with_the_source_up_to_a_limit(cut, monkeypatch):
    monkeypatch.setattr(parts, "PARTS", 10)
    assert len(cut({"d.jsonl": 2_000}, "d.jsonl")) == 10
    assert len(cut({"d.jsonl": 8_000}, "d.jsonl")) == 20
