"""lm-eval's `local-completions` against our server, and our engine in process: the same scores.

`python bench/harness_http.py RUN TASKS [--limit N] [--task NAME]`: RUN is what `k2jax serve` takes,
TASKS a folder of lm-eval's tasks. Needs the extras `eval` and `serve`, and `lm-eval[api]`. One JSON
line: for each task its metrics and seconds over HTTP and in process, and the names of metrics that
differ. Over HTTP lm-eval asks for a new token behind each text that it scores, so a text may be one
token shorter than the context, and a window of a rolling score two; here they are so in process
too.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROWS = 16


def evaluate(model: Any, folder: Path, task: str, limit: int | None) -> tuple[dict, float]:
    """Evaluate one task; its numbers, and seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    began = time.perf_counter()
    with contextlib.chdir(folder):
        manager = TaskManager(include_path=".", include_defaults=False)
        found = lm_eval.simple_evaluate(
            model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0
        )
    numbers = {k: v for k, v in found["results"][task].items() if isinstance(v, float)}
    return numbers, round(time.perf_counter() - began, 1)


def evaluate_http(loaded: Any, folder: Path, names: list[str], limit: int | None) -> list[tuple]:
    """Evaluate over HTTP; also the length of windows."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from k2jax.inference.engine import Engine
    from k2jax.inference.request import EngineSettings
    from k2jax.serve.lifecycle import serve_in_thread
    from k2jax.serve.service import ModelCard, Service

    with Engine(loaded, EngineSettings(rows=ROWS)) as engine:
        card = ModelCard(("m",), loaded.tokenizer, loaded.config.vocab, engine.context)
        with serve_in_thread(Service(engine, card)) as url:
            model = LocalCompletionsAPI(
                model="m",
                base_url=f"{url}/v1/completions",
                tokenizer_backend="remote",
                num_concurrent=ROWS,
                max_length=engine.context,
                timeout=600,
            )
            return [(*evaluate(model, folder, name, limit), model.max_length) for name in names]


def main() -> None:
    """Print one JSON line."""
    import k2jax
    from k2jax.evals.harness import HarnessModel
    from k2jax.evals.scorer import Scorer

    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("tasks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--task", default="*")
    args = parser.parse_args()
    folder = Path(args.tasks).resolve()
    names = sorted(path.stem for path in folder.glob(f"{args.task}.yaml"))
    loaded = k2jax.load(args.run)
    line: dict[str, Any] = {"bench": "harness_http"}
    over_http = evaluate_http(loaded, folder, names, args.limit)

    class Inside(HarnessModel):
        def loglikelihood_rolling(self, *args: Any, **options: Any) -> list[float]:
            self.max_length -= 1
            try:
                return super().loglikelihood_rolling(*args, **options)
            finally:
                self.max_length += 1

    inside = Inside(Scorer(loaded, ROWS, over_http[0][2]))
    for name, (numbers, seconds, _) in zip(names, over_http, strict=True):
        same, in_process = evaluate(inside, folder, name, args.limit)
        line[name] = {
            "http": numbers,
            "in_process": same,
            "seconds": [seconds, in_process],
            "differ": [k for k in numbers if abs(numbers[k] - same[k]) > 1e-6 * abs(same[k])],
        }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
