"""Multiple choice and likelihoods of files: what is read, and what is refused."""

import json
import math

import pytest
from guess_task import CFG, drawn

from k2jax.config import ConfigError
from k2jax.evals.perplexity import score
from k2jax.evals.registry import open_tasks
from k2jax.evals.scorer import Scorer
from k2jax.evals.session import Options, evaluate_one
from k2jax.evals.text_tasks import MultipleChoice, TextLikelihood

IDENTITY = {"weights": "w", "tokenizer": "t", "dtype": "float32"}


def test_bits_per_byte_are_those_of_the_full_forward(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a line of text\n" * 4)  # one window
    model = drawn()
    outcome = evaluate_one(TextLikelihood(text), Scorer(model), IDENTITY, Options(tmp_path / "out"))
    numbers = outcome.numbers
    expected = score(model, [text.read_text()])
    # That one also scores [EOS].
    assert numbers["tokens"] == expected["tokens"] - 1 < CFG.context
    assert numbers["bytes"] == expected["bytes"] == 60
    assert numbers["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=0.05)
    assert numbers["bits_per_byte"] == pytest.approx(
        numbers["nats_per_token"] * numbers["tokens"] / 60 / math.log(2)
    )


def test_answers_are_numbers_letters_or_texts(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [
        {"context": "c", "choices": ["x", "y"], "answer": 1},
        {"question": "c", "choices": ["x", "y"], "answer": "B"},
        {"question": "c", "choices": ["x", "y"], "answer": "y", "id": "third"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    items = MultipleChoice(file).items()
    assert [item.target for item in items] == [1, 1, 1]
    assert [item.id for item in items] == ["0", "1", "third"]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"choices": ["x", "y"], "answer": 0}, "line 1 has no 'question'"),
        ({"context": "c", "choices": ["x"], "answer": 0}, "a list of two texts or more"),
        ({"context": "c", "choices": ["x", ""], "answer": 0}, "no text, or empty"),
        ({"context": "c", "choices": ["x", "y"], "answer": 2}, "the answer 2; it must be in 0..1"),
        ({"context": "c", "choices": ["x", "y"]}, "the answer None"),
    ],
)
def test_malformed_questions_get_one_line(tmp_path, row, line):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=line):
        MultipleChoice(file)


@pytest.mark.parametrize(
    ("spec", "preset", "line"),
    [
        ("chioce:a", "", "did you mean 'choice'"),
        ("math", "", "task math needs a file: math:FILE"),
        ("choice:none.jsonl", "", "none.jsonl cannot be read"),
        (__file__, "", "for our own say KIND:"),
        ("choice:a", "k2/math", "did you mean"),
        ("choice:{file}", "k2/math-500", "preset k2/math-500 is for math, not for choice"),
    ],
)
def test_mistakes_in_the_names_of_tasks_get_one_line(tmp_path, spec, preset, line):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"context": "c", "choices": ["x", "y"], "answer": 1}))
    with pytest.raises(ConfigError, match=line):
        open_tasks([spec.format(file=file)], preset)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"context": "c", "choices": ["x", "y"], "answer": 1}))
    with pytest.raises(ConfigError, match="two tasks are called 'choice'"):
        open_tasks([f"choice:{file}"] * 2)
