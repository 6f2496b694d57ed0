"""Generation: what comes out, when it stops, and what is refused."""

import argparse
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from k2jax import sharding
from k2jax.commands import generate as command
from k2jax.config import ConfigError, MeshConfig, ModelConfig
from k2jax.inference import generate as sampling
from k2jax.inference import placement
from k2jax.model import Kimi, Model, forward
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.text.kimi_template import KimiTemplate, encode
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.reply import parse

CFG = ModelConfig(
    vocab=520,
    embed=16,
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
    expert_ffw=8,
    experts_per_token=2,
    context=80,
    init_std=0.3,
)
BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # 512 ids; the model has 8 more
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]


def drawn(tokenizer: Tokenizer | None = BYTES) -> Model:
    return Model(CFG, initial(specs(Kimi(CFG)), seed=3, std=CFG.init_std), tokenizer)


@pytest.fixture(scope="module")
def model() -> Model:
    return drawn()


@pytest.fixture(scope="module")
def greedy(model: Model) -> list[list[int]]:
    return sampling.generate(model, PROMPTS, 6, stop=())


def test_greedy_takes_the_most_likely_token_the_tokenizer_has(model, greedy):
    rows = [prompt + new for prompt, new in zip(PROMPTS, greedy, strict=True)]
    token_BT = np.zeros((3, max(map(len, rows))), np.int32)
    for row, ids in zip(token_BT, rows, strict=True):
        row[: len(ids)] = ids
    y_BTX = np.asarray(forward(model, token_BT))[..., : BYTES.vocab]
    for y_TX, prompt, new in zip(y_BTX, PROMPTS, greedy, strict=True):
        first = len(prompt) - 1
        assert new == y_TX[first : first + 6].argmax(axis=-1).tolist()


def test_a_row_does_not_depend_on_the_others(model, greedy):
    assert sampling.generate(model, [*PROMPTS[1:], PROMPTS[1]], 6, stop=())[1] == greedy[2]


def test_fewer_tokens_are_the_beginning_of_more(model, greedy):
    assert sampling.generate(model, PROMPTS, 2, stop=()) == [new[:2] for new in greedy]


def test_a_row_ends_before_its_stop_id_and_others_go_on(model, greedy):
    end = greedy[0][2]
    found = sampling.generate(model, PROMPTS, 6, stop=[end, 3])
    expected = [new[: new.index(end)] if end in new else new for new in greedy]
    assert found == expected


def test_a_text_begins_with_bos_and_ends_at_eos_or_im_end(model):
    assert sampling.prompt_ids(model, ["", "ab"]) == [[BYTES.bos], [BYTES.bos, 97, 98]]
    assert sampling.stop_ids(model, None) == [BYTES.eos, BYTES.im_end]


def test_draws_are_a_function_of_the_seed(model):
    def draw(seed):
        return sampling.generate(model, PROMPTS, 6, 1.5, 0.9, seed, stop=())

    assert draw(1) == draw(1) != draw(-2)


def test_lengths_share_few_programs_and_waste_at_most_a_quarter():
    lengths = [1, 64, 65, 128, 300, 511, 5_000, 131_072]
    found = [sampling.bucket(n) for n in lengths]
    assert found[:4] == [64, 64, 128, 128]
    assert all(n <= b <= max(1.25 * n, n + 63) for n, b in zip(lengths, found, strict=True))
    assert len({sampling.bucket(n) for n in range(1, 131_073)}) < 50


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "context": 2, "model": 2},
        {"data": 2, "expert": 2, "model": 2},
        {"expert": 4, "model": 2},  # prompts are exchanged, new tokens gathered
    ],
)
def test_a_mesh_generates_the_same_even_one_that_splits_the_sequence(greedy, axes):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**axes))):
        assert sampling.generate(drawn(), PROMPTS, 6, stop=()) == greedy


def test_one_long_request_fits_on_a_mesh_of_many_devices(model):
    """A sequence lies on one device, which must have room for all of it."""
    alone = sampling.generate(model, PROMPTS[:1], 70, stop=())
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))):
        assert sampling.generate(drawn(), PROMPTS[:1], 70, stop=()) == alone


@pytest.mark.parametrize(("axes", "decoding"), [((1, 4, 2), (1, 4, 2)), ((4, 2, 1), (4, 2, 1))])
def test_weights_are_decoded_with_as_far_split_as_heads_allow(axes, decoding):
    data, expert, context = axes
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=data, expert=expert, context=context))):
        params = initial(specs(Kimi(CFG)), 0, 0.1)
        with placement.decoding(params, CFG) as laid:
            assert tuple(jax.sharding.get_mesh().shape.values()) == decoding
            shape = params[GATE].shape
            part = laid[GATE].sharding.shard_shape(shape)
            assert (part[1], part[3]) == (shape[1] // decoding[1], shape[3] // decoding[2])


GATE = "layers.moe.experts.gate"
MISTAKES = {
    "context is 80: at most 7 new tokens fit": ([[1] * 73], {"max_new_tokens": 8}),
    "prompt 1 has 80 tokens and 32 new ones": ([[1], [1] * 80], {}),
    "shorten the prompt to 48 tokens": ([[1] * 80], {}),
    "no prompts": ([], {}),
    "give a list of texts": ("text", {}),
    "prompt 0 has the id 520; ids are 0..519": ([[520]], {}),
    "prompt 1 has no token ids": ([[1], []], {}),
    "prompt 0 is 7; give a text or a list": ([7], {}),
    "temperature is -1": ([[1]], {"temperature": -1}),
    "top_p is 0": ([[1]], {"temperature": 1.0, "top_p": 0}),
    "top_p is 1.5": ([[1]], {"temperature": 1.0, "top_p": 1.5}),
    "top_p 0.9 has no effect with temperature 0": ([[1]], {"top_p": 0.9}),
    "max_new_tokens is 0": ([[1]], {"max_new_tokens": 0}),
    "stop has the id -1": ([[1]], {"stop": [-1]}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_line(model, message):
    prompts, settings = MISTAKES[message]
    with pytest.raises(ConfigError, match=message) as error:
        sampling.generate(model, prompts, **settings)
    assert "\n" not in str(error.value)


def test_a_text_needs_a_tokenizer(model):
    with pytest.raises(ConfigError, match="no tokenizer"):
        sampling.generate(dataclasses.replace(model, tokenizer=None), ["a"])


def opened(model: Model) -> types.SimpleNamespace:
    """A source of this model."""
    return types.SimpleNamespace(
        config=model.config, tokenizer=model.tokenizer, load=lambda *_: model
    )


def test_the_command_prints_text_or_json(model, monkeypatch, capsys):
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(model))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["folder", "--prompt", "ab", "--prompt", "c", "--max-new-tokens", "3"]
    assert command.main(parser.parse_args([*given, "--json"])) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [s["prompt"] for s in samples] == ["ab", "c"]
    assert samples[0]["text"] == BYTES.decode(samples[0]["ids"])
    command.main(parser.parse_args(given))
    text = capsys.readouterr().out
    assert text == "\n---\n".join(s["prompt"] + s["text"] for s in samples) + "\n"


def parsed(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["folder", *words])


def test_chat_answers_what_a_user_says(model, monkeypatch, capsys):
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(model))
    monkeypatch.setattr(BYTES, "template", KimiTemplate(system=""))  # the context is short
    assert command.main(parsed("--prompt", "ab", "--chat", "--max-new-tokens", "3", "--json")) == 0
    sample = json.loads(capsys.readouterr().out)["samples"][0]
    prompt = encode(BYTES, [{"role": "user", "content": "ab"}])
    assert [sample["ids"]] == sampling.generate(model, [prompt], 3)
    assert sample["message"] == parse(BYTES, sample["ids"]).message()
    assert command.main(parsed("--prompt", "ab", "--chat", "--max-new-tokens", "3")) == 0
    assert capsys.readouterr().out == sample["text"] + "\n"


def test_messages_come_from_a_file(tmp_path):
    file = tmp_path / "talk.json"
    talk = [{"role": "user", "content": "a"}]
    for content in (talk, {"messages": talk}, {"messages": talk, "tools": None}):
        file.write_text(json.dumps(content))
        assert command.conversations(parsed("--messages", str(file))) == [(talk, [])]
    tool = {"type": "function", "function": {"name": "f"}}
    file.write_text(json.dumps({"messages": talk, "tools": [tool]}))
    assert command.conversations(parsed("--messages", str(file))) == [(talk, [tool])]
    assert command.conversations(parsed("--prompt", "a")) == []


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ((), "[]", "needs --prompt TEXT or --messages FILE"),
        (("--prompt", "x", "--messages", "FILE"), "[]", "one of them"),
        (("--chat", "--messages", "FILE"), "[]", "--chat has no effect with --messages"),
        (("--messages", "nowhere"), "", "no file nowhere"),
        (("--messages", "FILE"), "{", "not readable JSON"),
        (("--messages", "FILE"), "3", "must hold a list of messages"),
        (("--messages", "FILE"), '{"messages": [], "tool": []}', "did you mean 'tools'"),
        (("--messages", "FILE"), '[{"role": "usr"}]', r"talk.json: messages\[0\] has the role"),
    ],
)
def test_mistakes_in_a_conversation_are_answered_before_the_model_loads(
    words, content, message, tmp_path
):
    file = tmp_path / "talk.json"
    file.write_text(content)
    words = [str(file) if word == "FILE" else word for word in words]
    with pytest.raises(ConfigError, match=message) as error:
        command.main(parsed(*words))
    assert "\n" not in str(error.value)


def test_the_command_needs_a_tokenizer(model, monkeypatch):
    without = dataclasses.replace(model, tokenizer=None)
    monkeypatch.setattr("k2jax.weights.source.open_source", lambda path: opened(without))
    with pytest.raises(ConfigError, match="folder has no tokenizer"):
        command.main(parsed("--prompt", "a"))


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 2.2250738585072014e-308, 1e-35])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_that_goes_to_zero_goes_to_the_most_likely_token(
    model, greedy, temperature, top_p
):
    assert sampling.generate(model, PROMPTS, 6, temperature, top_p, stop=()) == greedy


@pytest.mark.parametrize("temperature", [1e39, float("inf"), float("nan"), -1e-40])
def test_a_temperature_that_float32_does_not_hold_is_refused(model, temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        sampling.generate(model, PROMPTS, 6, temperature)
