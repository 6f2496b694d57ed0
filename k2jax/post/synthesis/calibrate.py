"""Whether a judge can be believed: planted violations it catches, clean ones it refuses."""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.applications import Application, Library
from k2jax.post.synthesis.endpoint import Endpoint, ask_judge
from k2jax.post.synthesis.oracle import Oracle
from k2jax.post.synthesis.plant import VARIATIONS, VIOLATIONS, Planting
from k2jax.post.synthesis.task_maker import Task, judge_task, play

CAUGHT = 0.95  # share of planted violations that a judge must catch
REFUSED = 0.02  # share of clean trajectories that the rubric may refuse
REFUSED_BY_MODEL = 0.1  # that an endpoint's judge may refuse
CLEAN = "clean"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How a judge did on trajectories whose answer is known.

    Attributes:
        caught: share of planted violations refused, by kind and in all ("all").
        refused: share of clean trajectories refused.
        planted: number of planted ones.
        clean: number of clean ones.
    """

    caught: dict[str, float]
    refused: float
    planted: int
    clean: int

    def is_believed(self, refused: float = REFUSED) -> bool:
        """Whether the judge's verdicts count."""
        return self.caught.get("all", 0.0) >= CAUGHT and self.refused <= refused


def make_trials(
    library: Library, agent: Application, task: Task, judge: Endpoint | None = None
) -> Iterator[dict[str, Any]]:
    """Judge one task's planted violations, one a kind, and clean trajectories, one a variation.

    Args:
        library: of worlds and tools.
        agent: of the task.
        task: whose oracle's trajectory is edited.
        judge: asked too, where there is one.
    """
    trajectory = play(library, agent, task, Oracle(task["plan"])).as_json()
    kinds = [*VIOLATIONS.items(), *((CLEAN, (edit,)) for edit in VARIATIONS)]
    for number, (kind, edits) in enumerate(kinds):
        rng = random.Random(f"plant {task['seed']} {number}")
        planted = Planting(library, agent, task, trajectory, rng).plant(edits)
        if planted is None:
            continue
        verdict = judge_task(library, agent, task, planted.as_json())
        trial = {"task": task["id"], "kind": kind, "refused": not verdict.success}
        trial |= {"named": sorted(verdict.violations)}
        if judge is not None:
            trial["model_refused"] = not ask_judge(judge, task, planted.messages)[0]
        yield trial


def sum_up(trials: Sequence[Mapping[str, Any]], field: str = "refused") -> Calibration:
    """Sum trials up; `field` is "refused" of the rubric or "model_refused" of an endpoint."""
    by_kind: dict[str, list[bool]] = {}
    for trial in trials:
        by_kind.setdefault(trial["kind"], []).append(trial[field])
    clean = by_kind.pop(CLEAN, [])
    planted = [refused for all_ in by_kind.values() for refused in all_]
    caught = {kind: round(sum(r) / len(r), 4) for kind, r in sorted(by_kind.items())}
    if planted:
        caught["all"] = round(sum(planted) / len(planted), 4)
    share = round(sum(clean) / len(clean), 4) if clean else 0.0
    return Calibration(caught, share, len(planted), len(clean))
