import errno
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.data import store
from k2jax.data.store import cached, read, write
from k2jax.runtime.files import default_cache

TEXTS = ["first\n", "\u4e8c", "third document", "\ud800 half a surrogate"]


def test_documents_are_stored_between_bos_and_eos(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    got = write(tmp_path / "train", TEXTS[:3], byte_tokenizer)
    assert got.documents == 3 and got.tokens.dtype == np.uint16
    for index, text in enumerate(TEXTS[:3]):
        wanted = [byte_tokenizer.bos, *text.encode(), byte_tokenizer.eos]
        assert got.document(index).tolist() == wanted
    assert list(got.texts(byte_tokenizer)) == TEXTS[:3]
    assert got.bytes == sum(len(text.encode()) for text in TEXTS[:3])


def test_bytes_are_those_of_the_decoded_text(byte_tokenizer, tmp_path):
    got = write(tmp_path / "train", TEXTS, byte_tokenizer)
    assert got.bytes == sum(len(text.encode()) for text in got.texts(byte_tokenizer))


def test_a_large_vocabulary_takes_four_bytes_a_token(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "vocab", (1 << 16) + 1)
    monkeypatch.setattr(byte_tokenizer, "byte_lengths", lambda: np.ones((1 << 16) + 1, int))
    assert write(tmp_path / "train", TEXTS, byte_tokenizer).tokens.dtype == np.int32


def test_a_store_of_nothing_opens(byte_tokenizer, tmp_path):
    got = write(tmp_path / "train", [], byte_tokenizer)
    assert got.documents == 0 and len(got.tokens) == 0


def test_a_truncated_store_is_not_opened(byte_tokenizer, tmp_path):
    write(tmp_path / "train", TEXTS, byte_tokenizer)
    with (tmp_path / "train.tokens").open("rb+") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match="has 10 bytes"):
        read(tmp_path / "train")


def build(folder) -> None:
    (folder / "data").write_text("whole")


def check(folder) -> None:
    if (folder / "data").read_text() != "whole":
        raise ValueError("damaged")


def test_a_cached_folder_is_built_once_and_again_when_damaged(tmp_path):
    calls = []

    def counted(folder):
        calls.append(folder)
        build(folder)

    folder = cached(tmp_path / "cache", "key", counted, check)
    assert cached(tmp_path / "cache", "key", counted, check) == folder and len(calls) == 1
    (folder / "data").write_text("wh")
    cached(tmp_path / "cache", "key", counted, check)
    assert len(calls) == 2 and (folder / "data").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "data").write_text("wh")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cached(tmp_path, "key", fail, check)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_nothing_that_is_opened(tmp_path):
    code = (
        "import os, signal, pathlib\n"
        "from k2jax.data.store import cached\n"
        "def build(folder):\n"
        "    (folder / 'data').write_text('wh')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cached(pathlib.Path({str(tmp_path)!r}), 'key', build, lambda folder: None)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".building-")
    assert (cached(tmp_path, "key", build, check) / "data").read_text() == "whole"
    old = time.time() - 2 * store.STALE_SECONDS
    os.utime(left, (old, old))
    cached(tmp_path, "other", build, check)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["key", "other"]


def test_builders_at_the_same_time_agree_on_one_folder(tmp_path):
    together = threading.Barrier(4)

    def slow(folder):
        together.wait(timeout=30)
        build(folder)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(cached(tmp_path, "key", slow, check)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [tmp_path / "key"] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_full_disk_is_one_line_that_names_the_way_out(tmp_path):
    def fill(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "train.tokens"))

    wanted = f"cannot write the data cache {tmp_path}: No space left on device; set K2JAX_CACHE"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        cached(tmp_path, "key", fill, check)


def test_a_cache_that_is_a_file_and_an_unreadable_source_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the data cache"):
        cached(tmp_path / "file", "key", build, check)

    def denied(folder):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/a.txt")

    with pytest.raises(ConfigError, match=r"cannot read /data/a\.txt: Permission denied"):
        cached(tmp_path, "key", denied, check)


def test_the_environment_says_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("K2JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "k2jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "k2jax"
    monkeypatch.setenv("K2JAX_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
