"""Evaluate a task of lm-eval from local files, with every request in a ledger.

Importing this needs the extra `eval`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Files alone: what a task needs and is not there is a mistake, never a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from k2jax.config import ConfigError, one_line
from k2jax.evals.harness import HarnessModel
from k2jax.evals.ledger import Ledger, Record
from k2jax.evals.registry import HarnessFiles
from k2jax.evals.scorer import Scorer
from k2jax.evals.task import FAILED, PASSED
from k2jax.evals.text_tasks import SCORED

SEEDS = 0, 1234, 1234  # lm-eval's own: of `random`, of NumPy, and of examples in prompts
REQUEST = -1  # number of a line that has a request, and no verdict yet


@dataclasses.dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval.

    Attributes:
        name: of the task.
        folder: of its files; names of data files are relative to it.
        digest: SHA-256 of its configuration, its documents and the folder's functions.
    """

    name: str
    folder: Path
    digest: str


def open_harness_tasks(files: HarnessFiles) -> list[HarnessTask]:
    """Return the tasks of a YAML file, or of a folder of them.

    Raises:
        ConfigError: lm-eval finds none, or cannot read one.
    """
    with contextlib.chdir(files.folder):
        manager = TaskManager(include_path=str(files.folder), include_defaults=False)
        known = sorted(manager.all_subtasks)
        names = known if files.file is None else [_name_of(files.file)]
        place = files.file or files.folder
        if missing := [name for name in names if name not in known]:
            raise ConfigError(f"{place}: lm-eval finds no task {missing[0]!r} there")
        if not names:
            raise ConfigError(f"{place}: lm-eval finds no task there")
        try:
            return [HarnessTask(name, files.folder, _digest(manager, name)) for name in names]
        except Exception as error:
            raise ConfigError(f"{place}: {one_line(error, typed=True)}") from None


def _name_of(file: Path) -> str:
    named = re.search(r"^task:\s*['\"]?([\w.-]+)", file.read_text(), re.MULTILINE)
    if named is None:
        raise ConfigError(f"{file} has no line 'task: NAME'")
    return named[1]


def _digest(manager: TaskManager, name: str) -> str:
    task = manager.load([name])["tasks"][name]
    config = json.dumps(task.dump_config(), default=str, sort_keys=True)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", config).encode())
    for document in task.eval_docs:
        digest.update(json.dumps(document, default=str, sort_keys=True).encode())
    for file in sorted(Path().glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def evaluate_harness(
    task: HarnessTask,
    scorer: Scorer,
    ledger: Ledger,
    *,
    limit: int = 0,
    seed: int = 0,
    add_bos: bool = False,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate, and finish the ledger; the task's own numbers.

    Until all is done the ledger has requests; then a line for each document and filter.

    Args:
        task: from `open_harness_tasks`.
        scorer: with the model.
        ledger: of this evaluation.
        limit: documents; 0: all.
        seed: of draws.
        add_bos: put [BOS] before texts.
        on_sample: called with the number of requests that have ended, and 0.

    Raises:
        ConfigError: lm-eval cannot evaluate it.
    """
    known = {
        record["item"]: part
        for record in ledger.records.values()
        for part in record["parts"]
        if record["sample"] == REQUEST
    }
    if finished := [r for r in ledger.records.values() if r["sample"] != REQUEST]:
        known = {
            name: part for r in finished for name, part in zip(r["of"], r["parts"], strict=True)
        }

    def keep(name: str, part: dict[str, Any]) -> None:
        ledger.add({"item": name, "sample": REQUEST, "parts": [part]})
        on_sample(len(model.parts), 0)

    model = HarnessModel(scorer, add_bos=add_bos, seed=seed, parts=known, keep=keep)
    with contextlib.chdir(task.folder):
        manager = TaskManager(include_path=str(task.folder), include_defaults=False)
        try:
            found = _run(model, manager, task.name, limit)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"task {task.name}: {one_line(error, typed=True)}") from error
    records = make_records(task.name, found["samples"][task.name], model.parts)
    ledger.records = {(record["item"], record["sample"]): record for record in records}
    ledger.finish(list(ledger.records))
    return read_numbers(found["results"][task.name])


def _run(model: HarnessModel, manager: TaskManager, name: str, limit: int) -> dict[str, Any]:
    """Do what `lm_eval.simple_evaluate` does, but for its looks at git and at the machine."""
    loaded = manager.load([name])
    task = loaded["tasks"][name]
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS[2])
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    found = lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit or None, bootstrap_iters=0)
    assert found is not None
    return found


def make_records(
    name: str, samples: list[dict[str, Any]], parts: Mapping[str, dict[str, Any]]
) -> list[Record]:
    """Return the ledger's lines of documents, in order, with the requests of each."""
    by_document: dict[str, list[str]] = {}
    for key in sorted(parts, key=_order_of):
        by_document.setdefault(key.removeprefix(f"{name}/").split("/")[0], []).append(key)
    records, seen = [], dict[int, int]()
    for sample in sorted(samples, key=lambda s: (s["doc_id"], s["filter"])):
        document = sample["doc_id"]
        number = seen[document] = seen.get(document, -1) + 1
        of = by_document.get(str(document), [])
        values = {metric: _number(sample[metric]) for metric in sample["metrics"]}
        numbers = {metric: value for metric, value in values.items() if value is not None}
        score = next(iter(numbers.values()), 0.0)
        results = {0.0: FAILED, 1.0: PASSED}
        records.append(
            {
                "item": str(document),
                "sample": number,
                "of": of,
                "parts": [parts[key] for key in of],
                "extracted": json.dumps(sample["filtered_resps"], default=str),
                "score": score,
                "result": results.get(score, SCORED) if numbers else SCORED,
                "reason": f"target {json.dumps(sample['target'], default=str)}",
                "numbers": numbers,
                "filter": sample["filter"],
            }
        )
    return records


def _order_of(key: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"(?<=/)\d+", key))


def _number(value: Any) -> float | None:
    if isinstance(value, tuple) and len(value) == 2:  # a log-likelihood, and what divides it
        value = value[0]
    return float(value) if isinstance(value, int | float) else None


def read_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's numbers by plain names, as `acc`, or `exact_match@strip` of a filter."""
    named = {key.replace(",none", "").replace(",", "@"): value for key, value in values.items()}
    return {
        key: value
        for key, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
