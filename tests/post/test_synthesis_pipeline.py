"""The stages of `k2jax synth`: resumed, replayed, judged, taken by `k2jax data`."""

import json

import pytest

from k2jax import cli
from k2jax.config import ConfigError
from k2jax.post.synthesis.pipeline import FILES, Settings, load_tasks, synthesise
from k2jax.post.synthesis.stored import read_lines
from k2jax.post.synthesis.task_maker import IDLE, Idle, judge_task, play


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_stages_are_files_and_say_what_is_scripted(made):
    folder, said = made
    assert {*FILES.values(), "worlds.jsonl", "agents.jsonl", "calibration.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert "agent: scripted oracle, users: scripted" in " ".join(said)
    assert said[-1] == "replay: 24 of 24 logs make the same worlds"


def test_an_interrupted_folder_ends_with_the_same_bytes(made, tmp_path):
    whole = contents(made[0])
    settings, folder = Settings(tasks=24, tools=10), tmp_path / "again"
    synthesise(folder, settings, until="tasks", say=lambda line: None)
    tasks = folder / FILES["tasks"]
    tasks.write_bytes(tasks.read_bytes()[:-1000])  # killed within a line
    (folder / FILES["run"]).write_bytes(whole[FILES["run"]][:5000])
    synthesise(folder, settings, say=lambda line: None)
    assert contents(folder) == whole


def test_a_folder_of_other_settings_is_refused(made):
    with pytest.raises(ConfigError, match="was made with seed 0, not 1; name another folder"):
        synthesise(made[0], Settings(tasks=24, tools=10, seed=1))


def test_tasks_are_checked_from_both_sides_and_of_all_levels(made, library):
    agents, tasks = load_tasks(made[0])
    assert {task["level"] for task in tasks} == {"simple", "compound"}
    for task in tasks[:8]:
        agent = agents[task["agent"]]
        for text in IDLE:
            trajectory = play(library, agent, task, Idle(text)).as_json()
            assert judge_task(library, agent, task, trajectory).score == 0
    assert all(one["score"] == 1 for one in read_lines(made[0] / FILES["judge"]))


def test_planted_violations_are_caught_and_clean_ones_kept(made):
    trials = [trial for one in read_lines(made[0] / "calibration.jsonl") for trial in one]
    planted = [trial for trial in trials if trial["kind"] != "clean"]
    assert len({trial["kind"] for trial in planted}) == 5
    assert sum(trial["refused"] for trial in planted) >= 0.95 * len(planted)
    assert not any(trial["refused"] for trial in trials if trial["kind"] == "clean")


def test_a_log_that_was_touched_is_not_replayed(made, tmp_path):
    folder = tmp_path / "touched"
    folder.mkdir()
    for name, content in contents(made[0]).items():
        (folder / name).write_bytes(content)
    (folder / FILES["replay"]).unlink()
    lines = read_lines(folder / FILES["run"])
    lines[0]["calls"][0]["state"] = "0" * 16
    (folder / FILES["run"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="task-00000 cannot be replayed: call 0"):
        synthesise(folder, Settings(tasks=24, tools=10), say=lambda line: None)


@pytest.mark.parametrize(
    ("name", "line", "mistake"),
    [
        ("tasks.jsonl", '{"id": 1}', "tasks.jsonl line 1 is of no such stage; delete the file"),
        ("tasks.jsonl", "[", "tasks.jsonl line 1 is not JSON; delete the file"),
        ("worlds.jsonl", "{}", "worlds.jsonl line 1 is damaged; delete the file"),
        ("settings.json", "[]", "settings.json is damaged; name another folder"),
    ],
)
def test_a_damaged_file_is_named(name, line, mistake, tmp_path, capsys):
    words = ["synth", str(tmp_path), "--tasks", "2", "--until"]
    assert cli.main([*words, "tools"]) == 0
    (tmp_path / name).write_text(line + "\n")
    capsys.readouterr()
    assert cli.main([*words, "tasks"]) == 2
    error = capsys.readouterr().err
    assert mistake in error
    assert error.count("\n") == 1


def test_data_takes_the_conversations(made, tmp_path, capsys):
    source = str(made[0] / FILES["write"])
    tokens = str(tmp_path / "tokens")
    code = cli.main(["data", source, tokens, "--train-tokenizer", "600", "--workers", "1"])
    assert code == 0
    assert "24 documents" in capsys.readouterr().out


def test_conversations_say_where_they_are_from(made):
    for line in read_lines(made[0] / FILES["write"]):
        origin = line["provenance"]
        assert origin["answered_by"] == "oracle"
        assert origin["judged_by"] == ["rubric"]
        assert len(origin["world_after"]) == 16
        assert line["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        (["--tasks", "0"], "tasks is 0; it must be at least 1"),
        (["--faults", "2"], "faults is 2; it must be from 0 to 0.5"),
        (["--tools", "1"], "tools is 1; it must be at least 4"),
        (["--until", "tsks"], "there is no stage 'tsks'; did you mean 'tasks'?"),
        (["--agent", "localhost"], "'localhost' is no address; write http://HOST:PORT/v1"),
        (["--spec", "nowhere.json"], "nowhere.json cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(options, mistake, tmp_path, capsys):
    assert cli.main(["synth", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert mistake in error
    assert error.count("\n") == 1
