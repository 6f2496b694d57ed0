"""An export is whole: other readers find what they need, and nothing that is none of theirs."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Foreign

import k2jax
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, ModelConfig, RunConfig, to_json
from k2jax.conversion import convert
from k2jax.model import Kimi
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.train_bpe import train_tokenizer

MODEL = ModelConfig(
    vocab=640,
    embed=32,
    dense_layers=1,
    moe_layers=1,
    heads=2,
    q_rank=8,
    kv_rank=8,
    nope=4,
    rope=4,
    value=4,
    ffw=16,
    experts=4,
    expert_ffw=32,
    experts_per_token=2,
    context=80,
)
TEXT = 'A quotation mark " and an exclamation mark! 12345 über 中文\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    state = {"params": initial(specs(Kimi(MODEL)), 0, 0.02)}
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(3, state, {"config": to_json(RunConfig(model=MODEL))})
    train_tokenizer([TEXT * 9], 600, folder / "tiktoken.model")
    strays = ("config.json", "metrics.jsonl", "run.json", "loss.png", "loss.svg", "notes.txt")
    for name in (*strays, "run.json.damaged", "LICENSE", "nohup.out"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def export(run):
    report = convert(run, run.parent / "hf")
    return run.parent / "hf", report


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_an_export_names_what_begins_ends_and_fills_a_text(export):
    folder, _ = export
    tokenizer = Tokenizer.load(folder)
    config, generation = read(folder, "config.json"), read(folder, "generation_config.json")
    for fields in (config, generation):
        assert fields["bos_token_id"] == tokenizer.bos
        assert fields["pad_token_id"] == tokenizer.pad
    assert config["eos_token_id"] == tokenizer.eos
    assert generation["eos_token_id"] == [tokenizer.eos, tokenizer.im_end]
    assert config["model_type"] == "deepseek_v3"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_the_exported_tokenizer_json_gives_the_ids_of_tiktoken_model(export):
    folder, _ = export
    foreign = Foreign.from_file(str(folder / "tokenizer.json"))
    assert foreign.encode(TEXT).ids == Tokenizer.load(folder).encode(TEXT)
    assert read(folder, "tokenizer_config.json")["eos_token"] == "[EOS]"
    assert "<|im_middle|>" in (folder / "chat_template.jinja").read_text()


def test_what_is_no_part_of_the_model_stays_in_the_run(export):
    folder, report = export
    assert report["copied"] == ["LICENSE", "tiktoken.model"]
    made = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(report["made"]) == made | {"chat_template.jinja"}
    weights = {file.name for file in folder.glob("*.safetensors")}
    others = {"config.json", "conversion.json", "model.safetensors.index.json"}
    kept = {*report["made"], *report["copied"], *weights, *others}
    assert {file.name for file in folder.iterdir()} == kept


def test_an_export_says_that_it_rounds(run, export, tmp_path):
    _, report = export
    assert report["notes"] == [
        "float32 weights are rounded to bfloat16; --format float32 keeps them"
    ]
    assert convert(run, tmp_path / "wide", format="float32")["notes"] == []
    assert "rounded to fp8" in convert(run, tmp_path / "fp8", format="fp8")["notes"][0]


def test_an_export_of_an_export_keeps_its_files_and_its_bits(export, tmp_path):
    folder, _ = export
    convert(folder, tmp_path / "ours", format="keep")
    report = convert(tmp_path / "ours", tmp_path / "back")
    assert report["made"] == [] and report["notes"] == []
    for file in (f for f in folder.iterdir() if f.name != "conversion.json"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_kimi_s_model_type_is_an_option(run, export, tmp_path):
    convert(run, tmp_path / "kimi", model_type="kimi_k2")
    assert read(tmp_path / "kimi", "config.json")["model_type"] == "kimi_k2"
    convert(tmp_path / "kimi", tmp_path / "again", to="hf")
    assert read(tmp_path / "again", "config.json")["model_type"] == "deepseek_v3"
    with pytest.raises(ConfigError, match="--model-type is 'kimi'; did you mean 'kimi_k2'"):
        convert(run, tmp_path / "none", model_type="kimi")
    with pytest.raises(ConfigError, match="--model-type has no effect with --to orbax"):
        convert(export[0], tmp_path / "none", model_type="kimi_k2")


def test_an_export_loads_as_the_run(run, export):
    folder, _ = export
    ours, theirs = k2jax.load(run), k2jax.load(folder)
    assert ours.config == theirs.config
    for name, leaf in theirs.params.items():
        want = np.asarray(jax.numpy.asarray(ours.params[name]).astype(leaf.dtype))
        np.testing.assert_array_equal(np.asarray(leaf), want)
