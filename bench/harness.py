"""Our engine as a model of lm-eval, beside lm-eval's own `hf` model: answers and speed.

`python bench/harness.py RUN EXPORT TASKS [--limit N] [--rows 8] [--softmax-dtype float64]
[--only TASK ...]`: RUN is a run's folder, EXPORT its export (`k2jax convert RUN EXPORT --format
float32`), TASKS a folder of lm-eval's tasks. Needs the extras `eval` and `parity`. One JSON line:
for each task tokens a second of both, counted as `hf` reads them (context and continuation of every
request), the ratios of wall and of CPU time, the largest difference of a log-likelihood over 1e-4 +
1e-6 times its size (below 1: as near as that), greedy flags and metrics that differ. Times are
those of the model's calls alone, after one small call that compiles.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Timed:
    """Calls a model of lm-eval, and keeps its answers and its time."""

    def __init__(self, model: Any):
        self.answers: list[Any] = []
        self.wall = self.cpu = 0.0
        for name in METHODS:
            setattr(model, name, self._wrap(getattr(model, name)))

    def _wrap(self, method: Any) -> Any:
        def call(requests: Any, **options: Any) -> Any:
            began, used = time.perf_counter(), time.process_time()
            answers = method(requests, **options)
            self.wall += time.perf_counter() - began
            self.cpu += time.process_time() - used
            self.answers += answers
            return answers

        return call


def open_ours(run: str, rows: int, length: int) -> Any:
    """Our model, compiled."""
    from lm_eval.api.instance import Instance

    import k2jax
    from k2jax.evals.harness import HarnessModel
    from k2jax.evals.scorer import Scorer

    k2jax.prepare(1)
    model = HarnessModel(Scorer(k2jax.load(run), rows, length))
    warm = [
        Instance("loglikelihood", {}, ("word " * n, f" {n}"), 0, ("warm", n, 1))
        for n in (1, 9, 50, 60, 70, 80, 90, 100)
    ]
    model.loglikelihood(warm)
    until = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    model.generate_until(
        [Instance("generate_until", {}, ("word", until), 0, ("warm", n, 1)) for n in range(8)]
    )
    return model


def open_theirs(export: str, rows: int, length: int, softmax_dtype: str | None = None) -> Any:
    """lm-eval's own; its sum of a softmax in float32 loses what is small."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(os.cpu_count() or 1)
    return HFLM(
        pretrained=export,
        dtype="float32",
        device="cpu",
        batch_size=rows,
        max_length=length,
        softmax_dtype=softmax_dtype,
    )


def count_tokens(model: Any, samples: list[dict[str, Any]]) -> int:
    """Count the tokens of contexts and continuations, as if each request were computed alone."""
    texts = ["".join(map(str, a[:2])) for s in samples for a in s["arguments"]]
    return sum(len(model.tok_encode(text)) for text in texts)


def evaluate(model: Any, folder: Path, task: str, limit: int) -> tuple[dict[str, Any], Timed]:
    """Evaluate one task; lm-eval's results, and what the model was asked."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    timed = Timed(model)
    with contextlib.chdir(folder):
        manager = TaskManager(include_path=".", include_defaults=False)
        found = lm_eval.simple_evaluate(
            model, tasks=[task], task_manager=manager, limit=limit or None, bootstrap_iters=0
        )
    for name in METHODS:
        delattr(model, name)
    return found, timed


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """Say how far answers are apart."""
    if isinstance(ours[0], str):
        return {"texts_differ": sum(x != y for x, y in zip(ours, theirs, strict=True))}
    pairs = [
        (x, y) if isinstance(x, tuple) else ((x, True), (y, True))
        for x, y in zip(ours, theirs, strict=True)
    ]
    over = [abs(x[0] - y[0]) / (1e-4 + 1e-6 * abs(y[0])) for x, y in pairs]
    return {
        "largest_over_bound": round(max(over), 4),
        "greedy_differ": sum(bool(x[1]) != bool(y[1]) for x, y in pairs),
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("export")
    parser.add_argument("tasks")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--softmax-dtype", help="of lm-eval's own model")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    folder = Path(args.tasks).resolve()
    names = args.only or sorted(path.stem for path in folder.glob("*.yaml"))
    ours = open_ours(args.run, args.rows, args.length)
    export = str(Path(args.export).resolve())
    theirs = open_theirs(export, args.rows, args.length, args.softmax_dtype)
    line: dict[str, Any] = {"bench": "harness", "rows": args.rows}
    for name in names:
        found, mine = evaluate(ours, folder, name, args.limit)
        other, hf = evaluate(theirs, folder, name, args.limit)
        tokens = count_tokens(ours, found["samples"][name])
        numbers = [
            {k: v for k, v in each["results"][name].items() if isinstance(v, float)}
            for each in (found, other)
        ]
        line[name] = compare(mine.answers, hf.answers) | {
            "requests": len(mine.answers),
            "tokens": tokens,
            "tokens_per_second": round(tokens / mine.wall, 1),
            "hf_tokens_per_second": round(tokens / hf.wall, 1),
            "ratio": round(hf.wall / mine.wall, 3),
            "cpu_ratio": round(hf.cpu / mine.cpu, 3),
            "metrics": numbers[0],
            "metrics_differ": [
                k
                for k in numbers[0]
                if abs(numbers[0][k] - numbers[1][k]) > 1e-5 * abs(numbers[1][k])
            ],
        }
        sys.stderr.write(f"{name}: {json.dumps(line[name])}\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
