"""A run from the first line to the last: what it leaves, how it stops, and how it goes on."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from k2jax.checkpoint import Checkpoints
from k2jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    to_json,
)
from k2jax.data import Batches
from k2jax.data.tokenise import tokenise
from k2jax.evals import perplexity
from k2jax.params.arrays import initial
from k2jax.training import loop
from k2jax.training.loop import read_metrics, train
from k2jax.training.replay import replay
from k2jax.training.step import build

SIZES = {
    "vocab": 576, "embed": 16, "dense_layers": 1, "moe_layers": 1, "heads": 2, "q_rank": 8,
    "kv_rank": 8, "nope": 4, "rope": 4, "value": 4, "ffw": 16, "experts": 4, "expert_ffw": 8,
    "experts_per_token": 2, "context": 32,
}  # fmt: skip
FILES = (
    "checkpoints", "config.json", "loss.png", "metrics.jsonl", "run.json", "tiktoken.model",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """Six steps on a folder of short texts; AdamW, because it compiles faster."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (folder / f"{number}.py").write_text("".join(words))
    return RunConfig(
        name="test",
        model=ModelConfig(**SIZES),
        data=DataConfig(path=str(folder), rows=8, context=32),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, warmup=2),
        train=TrainConfig(
            steps=6, dtype="float32", remat="none", eval_every=3, eval_rows=8, save_every=3, keep=9,
            log_every=1,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Nothing outside of the tests' folders; a program that was compiled once is kept."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    root = tmp_path_factory.mktemp("cache")
    options = {
        "jax_compilation_cache_dir": str(root / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2JAX_CACHE", str(root))
        for name, value in options.items():
            jax.config.update(name, value)
        reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an uninterrupted run, and what it said."""
    out, lines = tmp_path_factory.mktemp("runs") / "whole", []
    train(run, out, say=lines.append)
    return out, lines


def terminating(step: int, lines: list[str], after: str = ""):
    """A `say` that keeps the lines and sends this process SIGTERM in the given step.

    `after`: how a line begins that must have come before.
    """

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith(f"step {step}/") and any(old.startswith(after) for old in lines):
            os.kill(os.getpid(), signal.SIGTERM)

    return say


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    """The folder of the same run, which got SIGTERM in its third step, and what it said."""
    out, lines = tmp_path_factory.mktemp("runs") / "stopped", []
    train(run, out, say=terminating(3, lines))
    return out, lines


@pytest.fixture
def again(stopped, tmp_path) -> Path:
    """A copy of the stopped run to go on with."""
    return Path(shutil.copytree(stopped[0], tmp_path / "again"))


def changed(run: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(
        run, **{section: dataclasses.replace(getattr(run, section), **fields)}
    )


def state(run: RunConfig, out: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path: weights and optimizer state."""
    program = build(run)
    found = Checkpoints(out).restore(step, program.abstract_state()._asdict())
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(found)
    }


def state_of(run: RunConfig, out: Path) -> dict:
    """What the run begins with; a checkpoint folder at `out` will not have it."""
    program = build(run)
    params = initial(program.specs, run.train.seed, run.model.init_std)
    return jax.jit(program.init)(params)._asdict()


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out)]


def test_a_run_leaves_checkpoints_metrics_a_plot_its_config_and_tokenizer(run, whole):
    out, _ = whole
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert Checkpoints(out).steps() == [3, 6]
    assert json.loads((out / "config.json").read_text()) == to_json(run)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_line_a_step(run, whole):
    lines = list(read_metrics(whole[0]))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [3, 6]
    assert all(np.isfinite(line["loss"]) and line["seconds"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert len(line["logit_max_layers"]) == run.model.layers
        assert max(line["logit_max_layers"]) == line["logit_max"]
    # top-2 choices of every token of 8 rows of 32, less padding
    assert 0 < sum(lines[0]["expert_load"][0]) <= 2 * 8 * 32


def test_a_run_tells_its_size_speed_score_and_a_sample(whole):
    said = "\n".join(whole[1])
    for part in ("parameters on one device", "first step after", "step 6/6: loss", "tokens/s",
                 "held out:", "gzip -9", "xz -9", "sample:\ndef ", "loss.png"):  # fmt: skip
        assert part in said, part


def test_a_signal_saves_and_says_how_to_go_on(stopped):
    out, lines = stopped
    assert Checkpoints(out).steps() == [3]
    assert lines[-1] == "stopped and saved at step 3; the same command goes on from there"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, whole, again):
    # A killed process leaves lines of steps that were not saved, and half a line.
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    lines = []
    train(run, again, say=lines.append)
    assert any(line.startswith("going on from step 3") for line in lines)
    assert [line["step"] for line in read_metrics(again)] == [1, 2, 3, 4, 5, 6]
    assert losses(again) == losses(whole[0])
    assert [start["step"] for start in json.loads((again / "run.json").read_text())] == [0, 3]
    found, right = state(run, again, 6), state(run, whole[0], 6)
    assert found.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_line_that_is_no_text_does_not_keep_a_run_from_going_on(run, again):
    with (again / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n{"step": "x"}\n[]\n')
    train(run, again, say=lambda line: None)
    assert [line["step"] for line in read_metrics(again)] == [1, 2, 3, 4, 5, 6]


def test_a_notice_after_the_last_step_ends_the_look_back(run, again, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "k2jax.training.loop.compressors", lambda texts: os.kill(os.getpid(), signal.SIGTERM) or {}
    )
    train(run, again, say=lines.append)
    assert lines[-1] == "stopped; step 6 is saved, and the same command plots and samples it"
    monkeypatch.undo()
    train(run, again, say=lines.append, init="elsewhere")
    assert f"--init elsewhere is not used: {again} has a checkpoint" in lines
    assert (again / "loss.png").exists()


def twice() -> None:
    """A notice, and its repetition."""
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)


def noticed(monkeypatch, place: object, name: str) -> None:
    """Calling this for the first time brings a notice."""
    call, calls = getattr(place, name), []

    def wrapped(*args, **kwargs):
        if not calls:
            twice()
        calls.append(1)
        return call(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


NOTICES = {  # where, and how far a run that goes on from step 3 still gets
    "compiling": (loop, "compile_step", 4),
    "restoring": (Checkpoints, "restore", 4),
    "a step": (loop, "to_devices", 4),
    "evaluation": (perplexity, "eval_batches", 6),
    "a save": (Checkpoints, "save", 7),  # of step 6; asked after the next step
}


@pytest.mark.parametrize("name", NOTICES)
def test_a_notice_ends_the_run_saved_wherever_it_comes(name, run, whole, again, monkeypatch):
    place, function, step = NOTICES[name]
    noticed(monkeypatch, place, function)
    lines: list[str] = []
    train(changed(run, "train", steps=8, eval_every=6, save_every=6), again, say=lines.append)
    assert lines[-1] == f"stopped and saved at step {step}; the same command goes on from there"
    assert Checkpoints(again).latest() == step
    assert [line["step"] for line in read_metrics(again)] == list(range(1, step + 1))


def test_a_run_killed_after_its_last_save_still_gets_its_plot(run, whole, tmp_path):
    out, lines = Path(shutil.copytree(whole[0], tmp_path / "out")), []
    (out / "loss.png").unlink()
    train(run, out, say=lines.append)
    assert (out / "loss.png").exists() and any(line.startswith("held out: ") for line in lines)
    assert losses(out) == losses(whole[0])


def test_a_run_goes_on_alike_on_another_mesh(run, whole, again):
    mesh = MeshConfig(data=2, expert=2, model=2)
    model = train(dataclasses.replace(run, mesh=mesh), again, say=lambda line: None)
    assert len(model.params["head"].sharding.device_set) == mesh.devices
    np.testing.assert_allclose(losses(again)[3], losses(whole[0])[3], rtol=1e-5)
    np.testing.assert_allclose(losses(again), losses(whole[0]), rtol=1e-4)


def test_a_run_on_another_mesh_is_the_same_run(run, whole, tmp_path):
    """Sums in another order are all that differs: 1e-6 of the first loss.

    Adam divides each gradient by its size, so rounding moves whole updates of weights whose
    gradient is near zero; after five of them the loss may differ by 1e-4 of itself.
    """
    mesh = MeshConfig(data=2, expert=2, model=2)
    train(dataclasses.replace(run, mesh=mesh), tmp_path / "out", say=lambda line: None)
    found, right = losses(tmp_path / "out"), losses(whole[0])
    np.testing.assert_allclose(found[0], right[0], rtol=1e-6)
    np.testing.assert_allclose(found, right, rtol=1e-4)


def damage(folder: Path) -> None:
    """One bit of the largest file is turned."""
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(run, whole, tmp_path):
    out, lines = Path(shutil.copytree(whole[0], tmp_path / "damaged")), []
    damage(out / "checkpoints/6/params")
    train(run, out, say=lines.append)
    assert lines[0].startswith(f"checkpoint of step 6 in {out}/checkpoints is damaged (params/")
    assert lines[0].endswith("; it is kept as 6.damaged, and the run resumes from step 3")
    assert Checkpoints(out).steps() == [3, 6] and (out / "checkpoints/6.damaged").is_dir()
    assert losses(out) == losses(whole[0])
    found, right = state(run, out, 6), state(run, whole[0], 6)
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def full_disk(monkeypatch, *numbers: int) -> None:
    """Saving these steps fails, as if while they were being written."""
    import orbax.checkpoint as ocp

    save = ocp.AsyncCheckpointer.save

    def fail(self, directory, *args, **kwargs):
        if int(directory.name) in numbers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", fail)


def test_a_run_outlives_a_save_that_fails(run, whole, tmp_path, monkeypatch):
    lines: list[str] = []
    full_disk(monkeypatch, 3)
    train(run, tmp_path / "out", say=lines.append)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "checkpoint of step 3 could not be written" in warning
    assert "the disk is full" in warning and "none is there yet" in warning
    assert Checkpoints(tmp_path / "out").steps() == [6]
    assert losses(tmp_path / "out") == losses(whole[0])


def test_a_last_save_that_fails_is_no_success(run, again, monkeypatch):
    full_disk(monkeypatch, 6)
    with pytest.raises(ConfigError, match=r"step 6 could not be .*full.*; step 3 is complete"):
        train(run, again, say=lambda line: None)
    assert Checkpoints(again).steps() == [3]


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("k2jax.training.loop.replace", fail)
    with pytest.raises(ConfigError, match=r"config.json: Read-only file system$"):
        train(run, tmp_path / "out", say=lambda line: None)


def test_a_finished_run_says_so_and_changes_nothing(run, whole):
    before, lines = content(whole[0]), []
    train(run, whole[0], say=lines.append)
    assert lines[-1] == f"{whole[0]} is finished: step 6; more --train.steps would go on"
    assert content(whole[0]) == before


OTHERS = [
    ("model", {"ffw": 32}, "model.ffw 16, not 32"),
    ("data", {"rows": 16}, "data.rows 8, not 16"),
    ("optim", {"name": "muonclip"}, "optim.name adamw, not muonclip"),
]


@pytest.mark.parametrize(("section", "fields", "says"), OTHERS)
def test_another_run_in_the_same_folder_is_refused(section, fields, says, run, whole):
    before = content(whole[0])
    with pytest.raises(ConfigError) as error:
        train(changed(run, section, **fields), whole[0], say=lambda line: None)
    assert str(error.value) == f"{whole[0]} holds a run with {says}; give another --out"
    assert content(whole[0]) == before


def test_init_takes_weights_alone(run, whole, tmp_path):
    out = tmp_path / "new"
    train(run, out, init=str(whole[0]), say=terminating(1, []))
    (first,) = read_metrics(out)
    assert first["step"] == 1
    assert first["learning_rate"] == run.optim.learning_rate / run.optim.warmup
    assert first["loss"] < losses(whole[0])[3]
    found, given = state(run, out, 1), state(run, whole[0], 6)
    for name, value in given.items():
        if "params" in name:  # Adam's first update is at most 1, and the weights decay a little
            moved = 1.2 * first["learning_rate"]
            np.testing.assert_allclose(found[name], value, rtol=0, atol=moved, err_msg=name)
    counts = {name: value for name, value in found.items() if name.endswith("count")}
    assert counts
    assert all(count == 1 for count in counts.values())


def test_init_of_another_architecture_is_refused_in_one_line(run, whole, tmp_path):
    with pytest.raises(ConfigError) as error:
        other = changed(run, "model", ffw=32)
        train(other, tmp_path / "new", init=str(whole[0]), say=lambda line: None)
    assert "dense.mlp" in str(error.value)
    assert "\n" not in str(error.value)


def test_steps_that_cannot_be_taken_end_the_run_in_one_line_and_the_batch_is_kept(run, again):
    hot = changed(run, "optim", learning_rate=1e30)
    hot = changed(changed(hot, "train", steps=20), "health", patience=4)
    with pytest.raises(ConfigError) as error:
        train(hot, again, say=lambda line: None)
    file = again / "replay/step-7.npz"
    assert re.fullmatch(
        rf"4 steps in a row were skipped, up to step 7 with loss \d\.\d+; lower"
        rf" optim.learning_rate, or look at the batch \({file}\)",
        str(error.value),
    )
    assert [line["skipped"] for line in read_metrics(again)] == [0, 0, 0, 1, 1, 1, 1]
    assert [line["event"] for line in events(again)] == ["skipped"] * 4 + ["stopped"]
    found, before = state(run, again, 6), state(run, again, 3)
    for name in (name for name in before if "params" in name):
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    kept = dict(np.load(file))
    assert (kept["step"], kept["index"], kept["seed"]) == (7, 6, run.data.seed)
    assert kept["tokens"].shape == (8, 32)
    assert replay(again, 7)["skipped"] == 1
    assert replay(again, 7)["loss"] == pytest.approx(losses(again)[6], rel=1e-6)
    with pytest.raises(ConfigError, match=r"no file .*; there are: step-7\.npz"):
        replay(again, 6)


def test_a_window_of_steps_is_profiled(run, tmp_path):
    train(changed(run, "train", profile="2:3"), tmp_path / "out", say=terminating(4, []))
    assert list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    (event,) = events(tmp_path / "out")
    assert (event["event"], event["step"], event["steps"]) == ("profiled", 3, [2, 3])


def test_a_profile_is_complete_though_the_run_stops_in_its_window(run, tmp_path):
    train(changed(run, "train", profile="1:3"), tmp_path / "out", say=terminating(2, []))
    assert list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    assert [event["event"] for event in events(tmp_path / "out")] == ["profiled"]


def test_a_weight_that_is_not_finite_is_named(run, tmp_path):
    sick = state_of(run, tmp_path / "sick")
    sick["params"]["dense.mlp.up"] = sick["params"]["dense.mlp.up"].at[0, 3, 5].set(np.nan)
    with Checkpoints(tmp_path / "sick") as saved:
        saved.save(2, sick, {"config": to_json(run), "data": {"step": 2}})
    with pytest.raises(ConfigError) as error:
        train(changed(run, "health", patience=2), tmp_path / "sick", say=lambda line: None)
    says = "2 steps in a row were skipped, up to step 4 with loss nan; weight 'dense.mlp.up' is not"
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_data_that_is_not_there_is_named(run, tmp_path):
    (tmp_path / "text.txt").write_text("")
    for name, says in (("texts.txt", "did you mean 'text.txt'?"), ("text.txt", "is empty")):
        with pytest.raises(ConfigError) as error:
            train(changed(run, "data", path=str(tmp_path / name)), tmp_path / "out", say=print)
        assert str(tmp_path / name) in str(error.value)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


REFUSED = [
    (MeshConfig(data=4, expert=4), "takes 16 devices, there are 8"),
    (MeshConfig(model=4), "'heads' (size 2) 4 ways over model; 2 would divide it"),
    (MeshConfig(expert=8), "'experts' (size 4) 8 ways over expert; 4 would divide it"),
]


@pytest.mark.parametrize(("mesh", "says"), REFUSED, ids=str)
def test_a_mesh_that_does_not_fit_is_refused(mesh, says, run, tmp_path):
    with pytest.raises(ConfigError) as error:
        train(dataclasses.replace(run, mesh=mesh), tmp_path / "out", say=print)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def command(run: RunConfig, out: Path) -> list[str]:
    """`k2jax train` of this run for more steps than anyone waits for."""
    settings = {f"model.{name}": size for name, size in SIZES.items()}
    settings |= {
        "data.path": run.data.path, "data.rows": 8, "data.context": 32, "optim.name": "adamw",
        "train.steps": 1_000_000, "train.log_every": 1, "train.eval_every": 0,
        "train.save_every": 500_000, "mesh.data": 1, "mesh.expert": 1, "mesh.model": 1,
    }  # fmt: skip
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "k2jax.cli", "train", "tiny", "--out", str(out), *words]


def terminated(words: list[str]) -> list[str]:
    """The lines of a command that gets SIGTERM after its second step."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        lines, steps = [], 0
        for line in job.stdout:
            lines.append(line.rstrip("\n"))
            steps += line.startswith("step ")
            if steps == 2 and line.startswith("step "):  # once: a second signal would kill
                job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0, job.stderr.read()
        assert "Traceback" not in job.stderr.read()
    return lines


def test_the_command_saves_on_sigterm_exits_0_and_goes_on_when_given_again(run, tmp_path):
    words = command(run, tmp_path / "out")
    first = terminated(words)
    step = Checkpoints(tmp_path / "out").latest()
    assert first[-1] == f"stopped and saved at step {step}; the same command goes on from there"
    second = terminated(words)
    assert f"going on from step {step} in {tmp_path / 'out'}" in second
    assert Checkpoints(tmp_path / "out").latest() > step
    steps = [line["step"] for line in read_metrics(tmp_path / "out")]
    assert steps == list(range(1, Checkpoints(tmp_path / "out").latest() + 1))


def test_a_mixture_of_folders_of_tokens_trains_and_goes_on_as_if_never_stopped(run, tmp_path):
    pytest.importorskip("array_record")
    for name, options in (("a", {"vocab": 576}), ("b", {"tokenizer": str(tmp_path / "a")})):
        tokenise(run.data.path, tmp_path / name, workers=1, **options)
    mixed = changed(run, "data", path=f"{tmp_path}/a:0.75,{tmp_path}/b:0.25")
    lines: list[str] = []
    train(mixed, tmp_path / "whole", say=lines.append)
    said = next(line for line in lines if line.startswith("epochs in all: "))
    assert re.fullmatch(r"epochs in all: \S+/a \d\.\d\d, \S+/b \d\.\d\d", said)
    train(mixed, tmp_path / "stopped", say=terminating(3, []))
    train(mixed, tmp_path / "stopped", say=lines.append)
    whole, stopped = (list(read_metrics(tmp_path / name)) for name in ("whole", "stopped"))
    assert [m["loss"] for m in stopped] == [m["loss"] for m in whole] and len(whole) == 6


SICK = 33  # index of the batch that is spoilt


@pytest.fixture(scope="module")
def longer(run) -> RunConfig:
    """So many steps that a spike can be told; checkpoints of steps 30 and 36 come around it."""
    run = changed(run, "train", steps=44, eval_every=0, eval_rows=8, save_every=6)
    return changed(run, "health", window=20)


def spoil(monkeypatch, sick: int = SICK) -> None:
    """The targets of batch `sick` become a token that hardly ever comes."""
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        return rows | {"targets": np.full_like(rows["targets"], 575)} if index == sick else rows

    monkeypatch.setattr(Batches, "batch", batch)


def leave_out(monkeypatch, first: int, last: int) -> None:
    """There never are batches `first` to `last`."""
    whole = Batches.batch
    moved = lambda index: index + (index >= first) * (last - first + 1)
    monkeypatch.setattr(
        Batches, "batch", lambda self, index, **hosts: whole(self, moved(index), **hosts)
    )


def same_state(run: RunConfig, one: Path, other: Path, step: int) -> None:
    found, right = state(run, one, step), state(run, other, step)
    for name, value in right.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_spike_is_logged_and_learned_from_by_default(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    lines = []
    train(longer, tmp_path / "out", say=lines.append)
    (event,) = events(tmp_path / "out")
    assert (event["event"], event["step"], event["batch"]) == ("spike", SICK + 1, SICK)
    assert event["loss"] > event["limit"]
    assert any(re.fullmatch(r"step 34: loss \d\.\d+ is a spike", line) for line in lines)
    assert not any(line["skipped"] for line in read_metrics(tmp_path / "out"))


def test_a_spike_is_skipped_and_a_run_stopped_after_it_goes_on_alike(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    skipping = changed(longer, "health", on_spike="skip")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(skipping, whole, say=lambda line: None)
    lines = list(read_metrics(whole))
    assert [line["step"] for line in lines if line["skipped"]] == [SICK + 1]
    # The schedule counts steps that were taken.
    assert lines[SICK]["learning_rate"] == lines[SICK + 1]["learning_rate"]
    assert lines[-1]["learning_rate"] < lines[-2]["learning_rate"]
    train(skipping, stopped, say=terminating(SICK + 4, []))
    train(skipping, stopped, say=lambda line: None)
    assert losses(stopped) == losses(whole)
    same_state(longer, stopped, whole, 44)
    meta = Checkpoints(stopped).meta(44)
    assert meta["health"]["skipped"] == 1
    assert meta["health"]["spikes"] == 1
    assert meta["data"] == {"step": 44, "left_out": []}


@pytest.mark.slow
def test_a_rewound_run_is_the_one_that_never_had_those_batches(longer, tmp_path, monkeypatch):
    rewinding = changed(longer, "health", on_spike="rewind")
    found, before, after, right = (
        tmp_path / name for name in ("found", "before", "after", "right")
    )
    with monkeypatch.context() as patch:
        spoil(patch)
        lines = []
        train(rewinding, found, say=lines.append)
        # Stopped before the spike, with a checkpoint that `found` has not, and after it.
        train(rewinding, before, say=terminating(SICK, []))
        train(rewinding, after, say=terminating(31, [], after="back to"))
        assert Checkpoints(after).latest() == 31
        for out in (before, after):
            train(rewinding, out, say=lambda line: None)
    assert f"back to step 30; batches 30 to {SICK} are left out" in lines
    assert [(e["event"], e["step"]) for e in events(found)] == [("spike", 34), ("rewound", 34)]
    assert events(found)[1]["left_out"] == [30, SICK]
    leave_out(monkeypatch, 30, SICK)
    train(rewinding, right, say=lambda line: None)
    for out in (found, before, after):
        assert losses(out) == losses(right)
        assert [line["step"] for line in read_metrics(out)] == list(range(1, 45))
        same_state(longer, out, right, 44)
        assert Checkpoints(out).meta(44)["data"]["left_out"] == [30, 31, 32, 33]


def test_a_rewind_to_a_damaged_checkpoint_goes_to_the_one_before(longer, tmp_path, monkeypatch):
    spoil(monkeypatch)
    out, lines = tmp_path / "out", []

    def say(line: str) -> None:
        lines.append(line)
        if line.endswith("is a spike"):
            while not (out / "checkpoints/30").exists():  # it is being written
                time.sleep(0.05)
            damage(out / "checkpoints/30/params")

    train(changed(longer, "health", on_spike="rewind"), out, say=say)
    assert f"back to step 24; batches 24 to {SICK} are left out" in lines
    assert (out / "checkpoints/30.damaged").is_dir()
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 45))


def test_a_run_that_spikes_after_every_rewind_ends_in_one_line(longer, tmp_path, monkeypatch):
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        return rows | {"targets": np.full_like(rows["targets"], 575)} if index >= SICK else rows

    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(ConfigError) as error:
        rewinding = changed(longer, "health", on_spike="rewind", patience=2)
        train(rewinding, tmp_path / "out", say=lambda line: None)
    says = "the loss spiked after each of 2 rewinds to step 30: other batches do not help;"
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_steps_without_a_finite_loss_are_left_out_of_everything(longer, tmp_path, monkeypatch):
    whole = Batches.batch

    def batch(self, index, **hosts):
        rows = whole(self, index, **hosts)
        if index in (3, 4):
            rows["weights"][1, 2] = np.nan
        return rows

    monkeypatch.setattr(Batches, "batch", batch)
    train(longer, tmp_path / "out", say=(lines := []).append)
    found = list(read_metrics(tmp_path / "out"))
    assert [line["step"] for line in found if line["skipped"]] == [4, 5]
    assert found[3]["loss"] is None  # JSON has no NaN
    assert found[-1]["loss"] < found[0]["loss"]
    assert "step 4: loss nan is not finite: step skipped" in lines
