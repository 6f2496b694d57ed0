"""A damaged checkpoint is found, named and set aside; an intact one is never taken for damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
from etils import epath
from test_checkpoints import META, assert_same, like, one_line, state

from k2jax.checkpoint import Checkpoints, integrity
from k2jax.config import ConfigError

ROWS = 20_000  # enough that numbers are not stored within the index


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Steps 4 and 8."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder, 2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, state(step, rows=ROWS), META)
    return folder


@pytest.fixture
def folder(two, tmp_path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "run"))


def chunk(step: Path) -> Path:
    """The largest file: numbers, and nothing else."""
    return max((step / "params").rglob("*"), key=lambda p: p.stat().st_size)


def truncate(step: Path) -> None:
    file = chunk(step)
    file.write_bytes(file.read_bytes()[:-1000])


def flip(step: Path, file: Path | None = None) -> None:
    file = file or chunk(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "a chunk is cut short": (truncate, r"params/\S+ has [\d,]+ bytes, not [\d,]+"),
    "a bit is flipped": (flip, r"params/\S+ has other bytes than were written"),
    "a chunk is gone": (lambda step: chunk(step).unlink(), r"params/\S+ is missing"),
    "an index is gone": (
        lambda step: (step / "opt/manifest.ocdbt").unlink(),
        "opt/manifest.ocdbt is missing",
    ),
    "the description is gone": (
        lambda step: (step / "meta/metadata").unlink(),
        "meta/metadata is missing",
    ),
    "the description is no JSON": (
        lambda step: (step / "meta/metadata").write_text("{"),
        "meta/metadata is not JSON",
    ),
    "the description is of another": (
        lambda step: flip(step, step / "meta/metadata"),
        "meta/metadata (has|is not) .*",
    ),
    "the mark is gone": (
        lambda step: (step / "commit_success.txt").unlink(),
        "commit_success.txt is missing",
    ),
    "the folder is empty": (empty, "the folder is empty"),
    "the record is no JSON": (
        lambda step: (step / "files.json").write_text("[]"),
        "files.json is not readable",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_step_is_set_aside_in_one_line(name, folder):
    harm, why = DAMAGES[name]
    harm(folder / "checkpoints/8")
    lines: list[str] = []
    checkpoints = Checkpoints(folder, 2)
    assert checkpoints.recover(lines.append) == 4
    says = (
        rf"checkpoint of step 8 in {folder}/checkpoints is damaged \({why}\); it is kept as"
        r" 8\.damaged, and the run resumes from step 4"
    )
    assert len(lines) == 1
    assert re.fullmatch(says, lines[0]), lines[0]
    assert checkpoints.steps() == [4] and (folder / "checkpoints/8.damaged").is_dir()
    assert_same(checkpoints.restore(4, like(state(rows=ROWS))), state(4, rows=ROWS))
    with checkpoints:
        checkpoints.save(8, state(8, rows=ROWS), META)
    assert checkpoints.recover(lines.append) == 8 and len(lines) == 1
    assert (folder / "checkpoints/8.damaged").is_dir(), "never deleted"


def test_an_intact_folder_is_left_as_it_is(folder):
    before = sorted(folder.rglob("*"))
    assert Checkpoints(folder).recover(pytest.fail) == 8
    assert sorted(folder.rglob("*")) == before
    assert Checkpoints(folder / "none").recover(pytest.fail) is None


def test_no_step_intact_is_one_line_and_nothing_is_renamed(folder):
    truncate(folder / "checkpoints/4")
    empty(folder / "checkpoints/8")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        Checkpoints(folder).recover(pytest.fail)
    assert one_line(caught)
    assert "is intact: 8 (the folder is empty); 4 (params/" in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_a_second_damaged_copy_of_a_step_keeps_the_first(folder):
    (folder / "checkpoints/8.damaged").mkdir()
    flip(folder / "checkpoints/8")
    Checkpoints(folder).recover(lambda line: None)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"4", "8.damaged", "8.damaged+"}


def test_parts_are_looked_at_by_themselves(folder):
    flip(folder / "checkpoints/8")
    checkpoints = Checkpoints(folder)
    checkpoints.check(8, "opt")
    with pytest.raises(ConfigError, match=r"step 8 .* is damaged \(params/.*complete steps: 4$"):
        checkpoints.check(8, "params")


def test_the_record_names_every_file_of_every_part(folder):
    step = folder / "checkpoints/8"
    parts = ("params", "opt", "meta")
    files = {str(p.relative_to(step)) for part in parts for p in (step / part).rglob("*")}
    record = json.loads((step / "files.json").read_text())
    assert set(record) == {name for name in files if (step / name).is_file()}
    assert all(size == (step / name).stat().st_size for name, (size, _) in record.items())


def test_processes_share_the_files_and_miss_none(folder):
    step = epath.Path(folder / "checkpoints/8")
    flip(folder / "checkpoints/8")
    found = [integrity.describe_damage(step, share=(i, 3)) for i in range(3)]
    assert sorted(map(bool, found)) == [False, False, True]


def test_a_step_without_a_record_is_taken_at_its_word(folder):
    (folder / "checkpoints/8/files.json").unlink()
    assert Checkpoints(folder).recover(pytest.fail) == 8
