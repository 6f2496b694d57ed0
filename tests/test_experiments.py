"""The experiments of docs/experiments.md: their table, their search, and all of them in short."""

import dataclasses
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "bench" / "experiments"
NAMES = ("muon_adamw", "qk_clip", "sparsity", "heads", "per_head")


@pytest.fixture(scope="module")
def load():
    """An experiment, or what they share, by name."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def test_a_finished_trial_is_read_back_as_it_was_written(load, tmp_path):
    results = load("results")
    row = results.Row("cell", 0.016, 4, 1, results.NEVER, 2, 64, 0.5, 6.9, 1.25, 0.0, 0.01, None)
    end = dataclasses.replace(row, step=4, heldout=6.5)
    table = results.Table(tmp_path / "data" / "x.csv")
    assert table.rows() == [] and table.heldout("cell") == {}
    table.append([row, end])
    table.append([dataclasses.replace(end, seed=2)])
    assert table.rows()[:2] == [row, end]
    assert table.heldout("cell") == {results.Trial(0.016, 4, seed): 6.5 for seed in (1, 2)}
    assert table.heldout("other") == {}


@pytest.mark.parametrize("best", [0.005, 0.02, 0.16])
def test_a_sweep_widens_until_the_best_rate_lies_inside(load, best):
    lab = load("lab")
    found = {}
    while left := [t for t in lab.tuned(found, (0.01, 0.02, 0.04), 9) if t not in found]:
        found[left[0]] = abs(math.log(left[0].rate / best))
    assert {t.seed for t in found if t.rate == best} == set(lab.SEEDS)
    assert min(t.rate for t in found) < best < max(t.rate for t in found)


def test_the_share_of_tokens_is_interpolated_and_never_extrapolated(load):
    results, experiment = load("results"), load("muon_adamw")

    def block(steps, loss):
        tokens = steps * 1024
        row = results.Row(
            "0.3M muonclip", 0.02, steps, 0, 100.0, steps, tokens, 1.0, 5.0, 1.0, 0.0, 0.01, loss
        )
        return {0: [row]}

    budgets = {100: block(100, 4.0), 400: block(400, 3.0)}
    assert experiment.share(budgets, 3.5, "tokens") == pytest.approx(200 * 1024)
    assert experiment.share(budgets, 4.5, "tokens") is None
    assert experiment.share(budgets, 2.5, "tokens") is None


@pytest.mark.parametrize("name", NAMES)
def test_kept_data_gives_the_table_and_the_picture(load, tmp_path, name):
    rows = load("results").Table(FOLDER / "data" / f"{name}.csv").rows()
    table = load(name).show(rows, tmp_path / "x.png")
    assert len(table.splitlines()) > 3
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_in_short_and_runs_nothing_twice(tmp_path, name):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nats a token held out" in first
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data = (tmp_path / f"{name}.csv").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nats a token held out" not in again
    assert (tmp_path / f"{name}.csv").read_bytes() == data
