"""Saves that fail: a run goes on, says so each time, and never pretends that its end was saved."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from k2jax import cluster
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError
from k2jax.training.saver import Saver


def state(step: int) -> dict:
    return {"params": {"w": jnp.full(20_000, step, jnp.float32)}}


def value(folder: Path, step: int) -> float:
    return float(Checkpoints(folder).restore(step, state(0))["params"]["w"][0])


@pytest.fixture
def saves(tmp_path):
    """`saves.say` is a list's append: the list is `saves.lines`."""
    lines: list[str] = []
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        found = Saver(checkpoints, lines.append)
        found.lines = lines
        yield found


def broken(monkeypatch, error: OSError):
    """Every write of arrays fails until the context ends."""
    import orbax.checkpoint as ocp

    def fail(self, *args, **kwargs):
        raise error

    patch = monkeypatch.context()
    patch.__enter__().setattr(ocp.AsyncCheckpointer, "save", fail)
    return patch


def test_a_write_that_fails_on_one_of_several_processes_ends_the_run(saves, monkeypatch):
    def fail():
        raise ConfigError("checkpoint of step 1 could not be written")

    monkeypatch.setattr(saves.checkpoints, "wait", fail)
    saves.settle()
    assert saves.lines == [
        "warning: checkpoint of step 1 could not be written; the next save tries again"
    ]
    monkeypatch.setattr(cluster.current(), "count", 2)
    with pytest.raises(ConfigError, match="step 1 could not be written"):
        saves.settle()
    assert len(saves.lines) == 1
    monkeypatch.undo()


FAILURES = [
    (errno.ENOSPC, "the disk is full (No space left on device)"),
    (errno.EROFS, "Read-only file system"),
]


@pytest.mark.parametrize(("number", "says"), FAILURES)
def test_a_failed_save_is_a_warning_and_the_next_one_is_tried(number, says, saves, monkeypatch):
    folder = saves.checkpoints.folder
    saves.save(1, state(1), {})
    patch = broken(monkeypatch, OSError(number, os.strerror(number)))
    saves.save(2, state(2), {})
    assert len(saves.lines) == 1 and saves.lines[0].startswith("warning: checkpoint of step 2")
    assert says in saves.lines[0] and "step 1 is complete there" in saves.lines[0]
    assert saves.lines[0].endswith("; the next save tries again")
    patch.__exit__(None, None, None)
    saves.save(3, state(3), {})
    saves.finish(state(3))
    assert len(saves.lines) == 1 and saves.checkpoints.steps() == [1, 3]
    assert value(folder, 3) == 3


def test_a_folder_that_refuses_every_change_is_a_warning_each_time(saves, monkeypatch):
    for step in (1, 2):
        saves.save(step, state(step), {})
    saves.checkpoints.wait()

    def refuse(*args):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr("k2jax.checkpoint.checkpoints.PATIENCE", 0.1)
        patch.setattr("k2jax.checkpoint.steps.sweep", refuse)
        patch.setattr("k2jax.checkpoint.steps.prune", refuse)
        patch.setattr(saves.checkpoints, "_writer", None)
        for step in (3, 4):
            saves.save(step, state(step), {})
        patch.undo()
        patch.setattr("k2jax.checkpoint.steps.prune", refuse)
        saves.save(5, state(5), {})
        saves.finish(state(5))
    assert [line.split(" could")[0] for line in saves.lines[:2]] == [
        f"warning: checkpoint of step {step}" for step in (3, 4)
    ]
    assert "old checkpoints in" in saves.lines[2] and "Operation not permitted" in saves.lines[2]
    assert len(saves.lines) == 3 and saves.checkpoints.steps() == [1, 2, 5]


def test_the_last_save_is_tried_twice_and_its_failure_is_the_run_s(saves, monkeypatch):
    saves.save(1, state(1), {})
    patch = broken(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    saves.save(2, state(2), {})
    with pytest.raises(ConfigError, match=r"step 2 could not be written .* step 1 is complete"):
        saves.finish(state(2))
    patch.__exit__(None, None, None)
    saves.finish(state(2))
    assert saves.checkpoints.steps() == [1, 2] and len(saves.lines) == 1


def test_nothing_to_finish_where_nothing_was_saved(saves):
    saves.finish(state(1))
    assert saves.checkpoints.steps() == [] and not saves.checkpoints.root.exists()


def test_a_folder_that_vanishes_is_made_again(saves):
    saves.save(1, state(1), {})
    saves.checkpoints.wait()
    shutil.rmtree(saves.checkpoints.folder)
    saves.save(2, state(2), {})
    saves.save(3, state(3), {})
    saves.finish(state(3))
    assert saves.checkpoints.latest() == 3
    assert value(saves.checkpoints.folder, 3) == 3


def test_a_save_that_waits_for_the_one_before_says_so(saves, monkeypatch):
    def slow():
        return time.sleep(0.02)

    monkeypatch.setattr("k2jax.training.saver.NOTABLE", 0.01)
    monkeypatch.setattr(saves.checkpoints, "wait", slow)
    saves.save(1, state(1), {})
    assert "step 1 waited 0.0 s until the checkpoint before it was written" in saves.lines[0]
    assert saves.pop_metrics()["save_seconds"] >= 0.02
    assert saves.pop_metrics() == {}, "once"


def test_a_disk_that_fills_while_numbers_are_written(tmp_path):
    """A limit of the process for the size of a file stands for the disk's."""
    body = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from test_saver import Checkpoints, Saver, state
        with Checkpoints(sys.argv[1], 2) as checkpoints:
            saves = Saver(checkpoints, print)
            saves.save(1, state(1), {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            saves.save(2, state(2), {})
            saves._try(checkpoints.wait)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            saves.save(3, state(3), {})
            saves.finish(state(3))
        """
    words = [sys.executable, "-c", textwrap.dedent(body), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    (line,) = done.stdout.splitlines()
    assert "step 2 could not be written" in line and "the disk is full (File too large)" in line
    assert "Traceback" not in done.stderr
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    assert value(tmp_path, 1) == 1 and value(tmp_path, 3) == 3
