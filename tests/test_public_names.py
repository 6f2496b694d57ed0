"""`import k2jax` is all that a notebook needs: its names resolve, and do what the commands do."""

import json
import subprocess
import sys

import jax
import pytest
from small_model import SIZES

import k2jax
from k2jax import cli


def test_every_public_name_resolves_whatever_was_imported_before():
    code = (
        "import k2jax, k2jax.planner.search, k2jax.commands.plan, k2jax.training.loop\n"
        "names = {name: getattr(k2jax, name) for name in k2jax.__all__}\n"
        "print([n for n, value in names.items() if not callable(value) and n not in k2jax._ROOMS])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = k2jax.trian


def test_plan_and_describe_return_what_their_commands_print(capsys):
    plan = ["plan", "kimi_k2", "--target", "v5p:8x8x16", "--mesh", "expert=64", "--json"]
    assert cli.main([*plan, "--data.rows", "1024", "--tokens", "1e9"]) == 0
    printed = json.loads(capsys.readouterr().out)
    settings = {"data": {"rows": 1024}}
    found = k2jax.plan("kimi_k2", "v5p:8x8x16", mesh={"expert": 64}, tokens=1e9, **settings)
    assert json.loads(json.dumps(found)) == printed

    assert cli.main(["describe", "tiny", "--model.experts", "64", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(json.dumps(k2jax.describe("tiny", model={"experts": 64}))) == printed


def test_a_config_is_a_name_or_a_config_with_settings_by_section_or_by_dotted_name():
    run = k2jax.configure("tiny", train={"steps": 3}, model={"yarn": {"factor": 2}})
    assert (run.train.steps, run.model.yarn.factor) == (3, 2.0)
    assert k2jax.configure(run, **{"train.steps": 4}).train.steps == 4
    assert k2jax.configure(run) == run
    for settings, message in (
        ({"optim": {"lr": 1}}, "optim has no 'lr'; did you mean --optim.learning_rate?"),
        ({"lr": 1}, "the run has no 'lr'; did you mean --optim.learning_rate?"),
        ({"train": {"steps": 1.5}}, "train.steps is int, '1.5' is not"),
        ({"train": {"buffer": 1.5}, "mesh": {"expert": 1}}, "train.buffer has no effect"),
    ):
        with pytest.raises(k2jax.ConfigError) as caught:
            k2jax.configure("tiny", **settings)
        assert str(caught.value).startswith(message)


def test_train_load_and_evaluate_work_from_python(tmp_path, monkeypatch):
    monkeypatch.setenv("K2JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(30):
        lines = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (tmp_path / f"text/{number}.py").write_text("".join(lines))
    reports: list[str] = []
    model = k2jax.train(
        "tiny",
        tmp_path / "run",
        say=reports.append,
        model=SIZES,
        data={"path": tmp_path / "text", "context": 32},
        train={"steps": 2, "eval_every": 0},
        optim={"name": "adamw", "warmup": 1},
        mesh={"data": 1, "expert": 1, "model": 1},
    )
    assert len(list(k2jax.read_metrics(tmp_path / "run"))) == 2 and reports
    texts = ["def f(x): return x\n" * 9]
    scores = k2jax.evaluate(model, texts, rows=2)
    assert len(k2jax.generate(model, ["def "], max_new_tokens=2)) == 1  # on the mesh of the run
    assert k2jax.forward(model, [[1, 2, 3]]).shape == (1, 3, 576)
    again = k2jax.evaluate(k2jax.load(tmp_path / "run"), texts, rows=2)
    assert scores["nats_per_token"] == pytest.approx(again["nats_per_token"], rel=1e-5)
    assert jax.sharding.get_abstract_mesh().empty
    assert set(scores) > {"bits_per_byte", "gzip_bits_per_byte", "tokens"}
