"""Files that survive a kill, a full disk and a second process."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from k2jax.runtime.files import Lines, hold_lock, open_atomic, rename_durably, write_atomic


def test_lines_that_cannot_be_written_come_with_the_next(tmp_path):
    reports: list[str] = []
    lines = Lines(tmp_path / "metrics.jsonl", reports.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        lines.write("a" * 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, before[1]))
        lines.write("b" * 10)  # four bytes still fit
        lines.write("c" * 10)
        assert (tmp_path / "metrics.jsonl").stat().st_size == 15
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.write("d")
    lines.close()
    wanted = "".join(f"{letter * n}\n" for letter, n in (("a", 10), ("b", 10), ("c", 10), ("d", 1)))
    assert (tmp_path / "metrics.jsonl").read_text() == wanted
    assert len(reports) == 2 and "cannot be written (File too large)" in reports[0]
    assert reports[1].endswith("can be written again; no line is lost")


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "config.json"
    write_atomic(path, "old")
    with (
        pytest.raises(OSError, match="No space"),
        open_atomic(path) as file,
    ):
        file.write(b"ne")
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new", durable=True)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "ours", "text")
    (tmp_path / "plain").write_text("text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_gets_its_name_with_its_content_or_not_at_all(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename_durably(tmp_path / "first", tmp_path / "final")
    with pytest.raises(OSError, match="not empty"):
        rename_durably(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final/file").read_text() == "first"


def test_a_lock_keeps_other_processes_out_until_its_holder_ends(tmp_path):
    code = (
        "import pathlib, sys; from k2jax.runtime.files import hold_lock\n"
        "with hold_lock(pathlib.Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BlockingIOError), hold_lock(tmp_path / "lock"):
            pass
        os.kill(other.pid, 9)
    with hold_lock(tmp_path / "lock"):
        pass
