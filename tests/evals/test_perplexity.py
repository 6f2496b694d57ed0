"""Scores of held-out text."""

import argparse
import dataclasses
import json
import math
import types

import jax
import jax.extend
import numpy as np
import pytest
from small_model import SIZES

from k2jax import sharding
from k2jax.commands import evaluate as command
from k2jax.config import ConfigError, DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from k2jax.data.tokenise import tokenise
from k2jax.evals import perplexity as evaluate
from k2jax.model import Kimi, Model, forward
from k2jax.ops.moe.dispatch import choose_dispatch
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.training.step import build

CFG = ModelConfig(**SIZES | {"vocab": 512, "dense_layers": 0, "context": 16}, init_std=0.3)
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
TEXTS = ["abc", "hello world, this is more than one row", "x"]


def drawn() -> Model:
    return Model(CFG, initial(specs(Kimi(CFG)), seed=3, std=CFG.init_std), BYTES)


@pytest.fixture(scope="module")
def model() -> Model:
    return drawn()


@pytest.fixture(scope="module")
def scored(model) -> dict[str, float]:
    return evaluate.score(model, TEXTS, rows=2, stride=8)


def nll_by_hand(model: Model, text: str, context: int, stride: int) -> float:
    """Every token of [BOS] text [EOS] predicted from a window of at most `context` before it."""
    ids = [BYTES.bos, *BYTES.encode(text), BYTES.eos]
    total, scored = 0.0, 1
    while scored < len(ids):
        begin = 0 if scored == 1 else max(0, scored - 1 + stride - context)
        window = ids[begin : begin + context + 1]
        padded = np.pad(window[:-1], (0, context + 1 - len(window)))[None]  # one shape, one compile
        y_TX = np.asarray(forward(model, padded))[0].astype(np.float64)
        log_TX = y_TX - np.log(np.exp(y_TX).sum(axis=-1, keepdims=True))
        for place in range(scored - begin, len(window)):
            total -= log_TX[place - 1, window[place]]
        scored = begin + len(window)
    return total


def test_every_byte_and_eos_is_scored_once(model, scored):
    nll = sum(nll_by_hand(model, text, CFG.context, 8) for text in TEXTS)
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert scored["tokens"] == tokens and scored["bytes"] == sum(map(len, TEXTS))
    assert scored["nats_per_token"] == pytest.approx(nll / tokens, abs=1e-5)
    assert scored["bits_per_byte"] == pytest.approx(nll / math.log(2) / scored["bytes"], abs=1e-5)
    assert scored["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "expert": 2, "model": 2},
        {"expert": 4, "model": 2},
        {"data": 2, "expert": 2, "context": 2},
    ],
)
def test_a_mesh_scores_the_same(scored, axes):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
        found = evaluate.score(drawn(), TEXTS, rows=3, stride=8)  # 3 rows become 4
    assert found["nats_per_token"] == pytest.approx(scored["nats_per_token"], abs=1e-6)
    assert found["bytes"] == scored["bytes"] and found["tokens"] == scored["tokens"]


def test_the_exchange_is_the_one_that_takes_less_memory():
    kinds = {}
    for devices in (1, 2, 4):
        with sharding.use_abstract_mesh(MeshConfig(data=2, expert=devices)):
            kinds[devices] = choose_dispatch().kind
    assert kinds == {1: "allgather", 2: "allgather", 4: "alltoall"}
    assert choose_dispatch().kind == "allgather"


def test_a_mesh_that_does_not_divide_the_model_gets_one_line(model, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(model))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["folder", "--data", str(tmp_path / "a.txt")]
    for mesh, message in (
        (["--mesh.expert", "3"], "mesh expert=3 splits 'embed' .* would divide it"),
        (["--mesh.data", "0"], "mesh.data is 0; it must be at least 1"),
        (["--mesh.replica", "16"], "takes 16 devices, there are 8"),
        (["--rows", "0"], "rows is 0"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            command.main(parser.parse_args([*words, *mesh]))
        assert "\n" not in str(error.value)


def gathers(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of the floats that are gathered over `expert`, also in inner programs."""
    found = []
    for eqn in jaxpr.eqns:
        operand = eqn.invars[0].aval if eqn.invars else None
        if eqn.primitive.name == "all_gather" and "expert" in eqn.params["axis_name"]:
            found += [operand.shape] if jax.numpy.issubdtype(operand.dtype, "float32") else []
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += gathers(inner)
    return found


@pytest.mark.parametrize("kind", ["alltoall", "alltoall_capacity", "allgather"])
def test_a_run_is_scored_with_its_own_exchange(kind):
    """Gathered over the 128 devices of K2's experts, tokens would take 118 GB."""
    run = RunConfig(
        model=CFG,
        data=DataConfig(rows=4, context=16),
        train=TrainConfig(dispatch=kind, dtype="float32"),
        mesh=MeshConfig(data=2, expert=2),
    )
    with sharding.use_abstract_mesh(run.mesh):
        program = build(run)
        arrays = program.abstract_state().params, program.abstract_rows()
        shapes = gathers(jax.make_jaxpr(program.evaluate)(*arrays).jaxpr)
    tokens = 16  # of a device
    assert any(shape[0] == tokens for shape in shapes) == (kind == "allgather")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"context": 17}, "context is 17; the model takes 1..16"),
        ({"stride": 17}, "stride is 17; it must be in 1..16"),
        ({"source": []}, "no text to score"),
    ],
)
def test_mistakes_get_one_line(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.score(model, **{"source": TEXTS, **settings})


def test_texts_need_a_tokenizer(model):
    with pytest.raises(ConfigError, match="no tokenizer"):
        evaluate.score(dataclasses.replace(model, tokenizer=None), TEXTS)


def test_all_of_a_file_is_scored_and_an_unknown_one_names_the_nearest(tmp_path):
    (tmp_path / "notes.txt").write_text("one\ntwo\n" * 4_000)
    assert "".join(command.texts(str(tmp_path / "notes.txt"))) == "one\ntwo\n" * 4_000
    with pytest.raises(ConfigError, match=r"no data at .*did you mean 'notes.txt'"):
        command.texts(str(tmp_path / "note.txt"))


def opened(model: Model) -> types.SimpleNamespace:
    """A source of this model."""
    return types.SimpleNamespace(
        config=model.config, tokenizer=model.tokenizer, load=lambda dtype, weights: model
    )


def test_the_command_prints_text_or_json(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(model))
    (tmp_path / "a.txt").write_text("to be or not to be")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["folder", "--data", str(tmp_path / "a.txt"), "--rows", "2"]
    assert command.main(parser.parse_args([*given, "--json"])) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == [
        "nats_per_token",
        "bits_per_byte",
        "perplexity",
        "tokens",
        "bytes",
        "seconds",
        "gzip_bits_per_byte",
        "xz_bits_per_byte",
    ]
    assert command.main(parser.parse_args(given)) == 0
    assert f"{result['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_a_folder_of_tokens_is_scored_on_what_it_holds_out(model, monkeypatch, capsys, tmp_path):
    pytest.importorskip("array_record")
    BYTES.save(tmp_path / "tiktoken.model")
    (tmp_path / "a.jsonl").write_text('{"text": "held out"}\n{"text": "learned"}\n')
    words = (str(tmp_path / "a.jsonl"), tmp_path / "tokens")
    tokenise(*words, tokenizer=str(tmp_path / "tiktoken.model"), workers=1)
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(model))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(["run", "--data", str(tmp_path / "tokens"), "--rows", "2", "--json"])
    assert command.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bytes"], found["tokens"]) == (len("held out"), len("held out") + 1)
    other = Tokenizer({bytes([255 - i]): i for i in range(256)})
    without = opened(dataclasses.replace(model, tokenizer=other))
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: without)
    with pytest.raises(ConfigError, match="made with another tokenizer than the model's"):
        command.main(given)
