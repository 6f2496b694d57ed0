"""`run.json`: what each start of a run was."""

import json
import subprocess
from pathlib import Path

import jax
import pytest

import k2jax
from k2jax.config import RunConfig
from k2jax.training import provenance

RUN = RunConfig()


def test_each_start_adds_what_is_needed_to_do_it_again(tmp_path):
    provenance.record_start(RUN, tmp_path, 0)
    provenance.record_start(RUN, tmp_path, 150)
    first, second = provenance.read_starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 150)
    assert first["seeds"] == {"train.seed": RUN.train.seed, "data.seed": RUN.data.seed}
    assert first["versions"]["jax"] == jax.__version__ and first["versions"]["python"]
    assert (first["backend"], first["device"], first["devices"]) == ("cpu", "cpu", 8)
    assert first["flags"]["XLA_FLAGS"].startswith("--xla_force_host_platform")
    assert first["command"] and first["mesh"] == RUN.mesh.sizes and first["processes"] == 1
    assert first["code"] == second["code"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["[{", '{"step": 0}'])
def test_what_cannot_be_read_is_put_aside(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    provenance.record_start(RUN, tmp_path, 3)
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())] == [3]
    assert (tmp_path / "run.json.damaged").read_text() == text


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_code_is_a_commit_with_what_was_changed_since_or_a_hash_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.describe_code() == {"sha256": provenance.source_hash()}
    git(tmp_path, "init", "-q")
    assert list(provenance.describe_code()) == ["sha256"], "no commit yet"
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    code = provenance.describe_code()
    assert (code["commit"], code["dirty"]) == (commit, False)
    (tmp_path / "notes").write_text("files that git does not follow are no code")
    assert not provenance.describe_code()["dirty"]
    (tmp_path / "file").write_text("b")
    assert provenance.describe_code()["dirty"]


def test_the_checkout_that_is_asked_is_the_one_that_holds_the_package():
    assert (provenance.ROOT / "k2jax" / "__init__.py").samefile(k2jax.__file__)
