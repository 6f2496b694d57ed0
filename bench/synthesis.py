"""Synthesis of agentic data: tools, calls a second, tasks, the judge's calibration, replay.

    python bench/synthesis.py [--tasks 200] [--calls 100000]

Prints one line of JSON. A call is everything between the text of its arguments and the text of its
result: parsing, the check against the schema, the tool's work, and a digest of the world after it.
Seconds are of CPU time of this process, which runs on one core.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from k2jax.post.synthesis.applications import Library
from k2jax.post.synthesis.calibrate import make_trials, sum_up
from k2jax.post.synthesis.pipeline import FILES, Settings, load_library, load_tasks, synthesise
from k2jax.post.synthesis.simulate import Session
from k2jax.post.synthesis.stored import read_lines


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "made"
        began = time.process_time()
        synthesise(folder, Settings(tasks=args.tasks, seed=args.seed), say=lambda line: None)
        pipeline = time.process_time() - began
        library = load_library(folder)
        agents, tasks = load_tasks(folder)
        trials = [
            trial for task in tasks for trial in make_trials(library, agents[task["agent"]], task)
        ]
        calibration = sum_up(trials)
        trajectories = read_lines(folder / FILES["run"])
        replays = read_lines(folder / FILES["replay"])
        verdicts = read_lines(folder / FILES["judge"])
        pairs = [(tasks[int(one["task"].split("-")[1])], one) for one in trajectories]
        rate = measure_calls(library, agents, pairs, args.calls)
        report = {
            "bench": "synthesis",
            "tools": len(library.tools),
            "domains": len(library.domains),
            "tasks": len(tasks),
            "drafts_rejected": sum(sum(t["rejected_drafts"].values()) for t in tasks),
            "oracle_scores_1": sum(one["score"] == 1 for one in verdicts) / len(verdicts),
            "calls_a_second": round(rate),
            "replayed": sum(not one["differs"] for one in replays) / len(replays),
            "planted": calibration.planted,
            "caught": calibration.caught,
            "clean": calibration.clean,
            "clean_refused": calibration.refused,
            "pipeline_cpu_seconds": round(pipeline, 2),
        }
    print(json.dumps(report))


def measure_calls(library: Library, agents: dict, pairs: list, calls: int) -> float:
    """Calls a second of CPU time: the trajectories' own calls, and drawn reads between them.

    Worlds are made before the clock starts.
    """
    rng = random.Random(0)
    done, seconds = 0, 0.0
    while done < calls:
        task, trajectory = rng.choice(pairs)
        agent = agents[task["agent"]]
        world = library.make_world(agent, task["seed"], task["faults"])
        session = Session(world, agent.prompt)
        work = [(call["tool"], call["arguments"]) for call in trajectory["calls"]]
        tools = [tool for tool in world.tools.values() if tool.kind in ("get", "list", "count")]
        for tool in rng.choices(tools, k=20):
            ids = list(world.state[tool.entity])
            arguments = {tool.id_name: rng.choice(ids)} if tool.kind == "get" else {}
            work.insert(rng.randint(0, len(work)), (tool.name, json.dumps(arguments)))
        began = time.process_time()
        for name, text in work:
            session.call(name, text)
        seconds += time.process_time() - began
        done += len(work)
    return done / seconds


if __name__ == "__main__":
    main()
