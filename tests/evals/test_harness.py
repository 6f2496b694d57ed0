"""lm-eval's tasks through our engine: numbers are the full forward's, ledgers resume."""

import json

import jax
import numpy as np
import pytest
from guess_task import BYTES, CFG, drawn

from k2jax.config import ConfigError
from k2jax.evals.ledger import read_ledger
from k2jax.evals.registry import open_tasks
from k2jax.evals.scorer import Scorer
from k2jax.evals.session import Options, evaluate_one, open_all
from k2jax.model import forward

pytest.importorskip("lm_eval")
IDENTITY = {"weights": "w", "tokenizer": "t", "dtype": "float32"}
DATA = [
    {"context": "one two ", "choices": ["three", "four four"], "answer": 0, "text": "x" * 150},
    {"context": "a b", "choices": [" c", " d", "e"], "answer": 2, "text": "short"},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "pick": """
task: pick
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "roll": """
task: roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    (made / "data.jsonl").write_text("\n".join(map(json.dumps, DATA)))
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(text + COMMON)
    return made


@pytest.fixture(scope="module")
def scorer():
    return Scorer(drawn())


def test_a_folder_of_tasks_is_scored_as_the_full_forward_does(
    folder, scorer, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = Options(tmp_path / "out")
    tasks = open_all(open_tasks([str(folder)]))
    assert [task.name for task in tasks] == ["pick", "roll", "write"]
    outcomes = {task.name: evaluate_one(task, scorer, IDENTITY, options) for task in tasks}
    logprobs = np.asarray(jax.nn.log_softmax(forward(drawn(), _rows(DATA[0]))))
    _, (first, second) = read_ledger(outcomes["pick"].ledger)
    for row, part, choice in zip(logprobs, first["parts"], DATA[0]["choices"], strict=True):
        start = len("one two")  # the white space goes to the continuation
        ids = BYTES.encode(f" {choice}")
        places = np.arange(start - 1, start - 1 + len(ids))
        assert part["ids"] == ids
        np.testing.assert_allclose(part["logprobs"], row[places, ids], atol=1e-5)
    accuracy = (first["score"] + second["score"]) / 2
    assert outcomes["pick"].numbers["acc"] == outcomes["pick"].numbers["score"] == accuracy
    _, (long, short) = read_ledger(outcomes["roll"].ledger)
    assert [len(part["ids"]) for part in long["parts"]] == [96, 54]
    total = sum(sum(part["logprobs"]) for r in (long, short) for part in r["parts"])
    bits = -total / np.log(2) / 155
    assert outcomes["roll"].numbers["bits_per_byte"] == pytest.approx(bits)
    _, written = read_ledger(outcomes["write"].ledger)
    assert all(0 < len(r["parts"][0]["ids"]) <= 8 for r in written)

    # What a killed evaluation leaves: requests without verdicts.
    for name, outcome in outcomes.items():
        whole = outcome.ledger.read_bytes()
        header, records = read_ledger(outcome.ledger)
        kept = [
            {"item": key, "sample": -1, "parts": [part]}
            for record in records[:1]
            for key, part in zip(record["of"], record["parts"], strict=True)
        ]
        lines = "".join(json.dumps(line) + "\n" for line in (header, *kept))
        outcome.ledger.write_text(lines)
        task = next(task for task in tasks if task.name == name)
        assert evaluate_one(task, scorer, IDENTITY, options).ledger.read_bytes() == whole


def _rows(document):
    rows = [BYTES.encode(document["context"] + choice) for choice in document["choices"]]
    token_BT = np.zeros((len(rows), CFG.context), np.int32)
    for row, ids in zip(token_BT, rows, strict=True):
        row[: len(ids)] = ids
    return token_BT


def test_mistakes_get_one_line(folder, scorer, tmp_path):
    (tmp_path / "bad.yaml").write_text("task: bad\noutput_type: nonsense\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        open_all(open_tasks([str(tmp_path / "bad.yaml")]))
    (task,) = open_all(open_tasks([str(folder / "pick.yaml")]))
    with pytest.raises(ConfigError, match="--samples is for our own tasks"):
        evaluate_one(task, scorer, IDENTITY, Options(tmp_path, {"samples": 2}))
