"""A save counts once it is shown that it can be restored; paths work everywhere or are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.checkpoint import Checkpoints, integrity
from k2jax.checkpoint.restorable import PATTERN, describe_unreadable
from k2jax.config import ConfigError

STATE = {"params": {"w": jnp.arange(8.0)}, "opt": {"m": jnp.zeros((2, 3))}}
WANTED = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), STATE)
NAMES = ("a b", "a%20b", "a%b", "a#b", "a{b}", "日本é", "a:b", "a|b", "a'b\"c", "-a", "~a", "a&b=c")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_a_folder_of_any_name_is_saved_and_restored(name, tmp_path):
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        assert checkpoints.recover(print) is None
        for step in (1, 2):
            checkpoints.save(step, STATE, {})
    with Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.recover(print) == 2
        restored = checkpoints.restore(2, WANTED)
    np.testing.assert_array_equal(restored["params"]["w"], STATE["params"]["w"])


@pytest.mark.parametrize("char", PATTERN)
def test_a_path_that_is_a_pattern_is_refused_before_the_first_step(char, tmp_path):
    folder = tmp_path / f"a{char}b" / "run"
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ConfigError, match="its path has"):
            checkpoints.recover(print)
        with pytest.raises(ConfigError, match="its path has"):
            checkpoints.save(1, STATE, {})
    assert not folder.exists()


@pytest.mark.parametrize("char", PATTERN)
def test_a_run_that_was_moved_below_such_a_path_is_still_read(char, tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, STATE, {})
    moved = (tmp_path / "run").rename(tmp_path / f"a{char}b")
    checkpoints = Checkpoints(moved)
    if char == "\\":  # TensorStore itself does not open it
        with pytest.raises(ConfigError):
            checkpoints.restore(1, WANTED)
        return
    np.testing.assert_array_equal(checkpoints.restore(1, WANTED)["params"]["w"], jnp.arange(8.0))


def test_a_save_that_cannot_be_restored_deletes_no_older_one(tmp_path, monkeypatch):
    """As where foreign code looks for files by a pattern, and joins none of them."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, STATE, {})
    checkpoints.wait()

    def lose(directory):
        return [p.rmtree() for p in directory.iterdir() if p.name == "params"]

    record = integrity._record
    monkeypatch.setattr(integrity, "_record", lambda d: [lose(d), record(d)])
    checkpoints.save(2, STATE, {})
    with pytest.raises(ConfigError, match=r"step 2 could not be written.*step 1 is complete"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == [1] and checkpoints.recover(print) == 1
    checkpoints.save(2, STATE, {})
    checkpoints.close()
    assert checkpoints.steps() == [2]


def test_an_array_that_a_database_lacks_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, STATE, {})
    step = checkpoints.root / "1"
    assert describe_unreadable(step) == ""
    meta = step / "meta/metadata"
    meta.write_text(meta.read_text().replace('"w": [[8]', '"w": [[9]').replace('"m":', '"n":'))
    assert "w has shape [8] on disk, not [9]" in describe_unreadable(step)
