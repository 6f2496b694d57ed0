"""Tasks: goals for one agent and one user, an oracle's plan, a rubric; checked from both sides."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from k2jax.post.synthesis.applications import Application, Library
from k2jax.post.synthesis.goal_makers import make_goal
from k2jax.post.synthesis.goals import Goal, Scene
from k2jax.post.synthesis.oracle import Oracle, Planner, Step
from k2jax.post.synthesis.rubric import Verdict, judge
from k2jax.post.synthesis.simulate import Session, Trajectory, converse
from k2jax.post.synthesis.users import ScriptedUser, draw_persona
from k2jax.post.synthesis.world import find_changes

GOALS = ((1, 40), (2, 35), (3, 25))  # how many, and of 100 tasks how many have so many
TRIES = 60  # of one task
READS = 0.25  # share of goals that ask, not act
DECLINES = 0.12  # share of questions for confirmation that the user answers with no

Task = dict[str, Any]


class Idle:
    """An agent that does nothing but say something, or nothing at all."""

    name = "idle"

    def __init__(self, text: str):
        """Say this, whatever is asked."""
        self.text = text

    def reply(self, messages: Any, tools: Any = ()) -> dict[str, Any]:
        """The same text."""
        return {"role": "assistant", "content": self.text}


LEFT_ALONE = (
    "as it is", "unchanged", "nothing", "did not", "didn't", "have not", "haven't", "will not",
    "won't", "stays", "remains", "kept", "leave it", "left it",
)  # fmt: skip
IDLE = ("", "All done, everything is as you asked. Yes, no problem.")


def make_task(
    library: Library, agent: Application, number: int, seed: int, faults: float
) -> tuple[Task, dict[str, int]]:
    """Make the task of that number for an agent: the first draft that both sides accept.

    Args:
        library: of worlds and tools.
        agent: who is asked.
        number: from 0.
        seed: of the whole run.
        faults: see `World`.

    Returns:
        The task; and how many drafts were rejected, by reason.
    """
    rejected: dict[str, int] = {}
    for attempt in range(TRIES):
        task = draft_task(library, agent, f"{seed}-{number}-{attempt}", faults)
        why = find_flaw(library, agent, task) if task else "no goal"
        if task and not why:
            task["id"] = f"task-{number:05d}"
            return task, rejected
        rejected[why] = rejected.get(why, 0) + 1
    raise AssertionError(f"{agent.id} has no task in {TRIES} drafts: {rejected}")


def draft_task(library: Library, agent: Application, seed: str, faults: float) -> Task | None:
    """Draft a task; None: its world has no goal for it."""
    rng = random.Random(f"task {seed}")
    world = library.make_world(agent, seed)
    before, persona = world.snapshot(), draw_persona(rng)
    planner = Planner(world, persona, rng)
    scene = Scene(world, {name: library.tools[name] for name in agent.tools}, rng)
    goals: list[Goal] = []
    points: list[dict[str, Any]] = []
    (count,) = rng.choices([n for n, _ in GOALS], [share for _, share in GOALS])
    for _ in range(count):
        goal = _draw_goal(scene, goals)
        if goal is None:
            return None
        earlier = world.snapshot()
        planner.add(goal)
        if planner.is_broken:
            return None
        goals.append(goal)
        points += _checkpoints(goal, scene, find_changes(earlier, world.state))
    used = {goal.tool for goal in goals}
    tools = [library.tools[name] for name in agent.tools if name not in used]
    rubric = {
        "changes": find_changes(before, world.state),
        "checkpoints": points,
        "forbidden": [
            t.name for t in tools if t.writes and (t.operation.confirm or t.operation.role)
        ],
    }
    return {
        "id": "",
        "agent": agent.id,
        "seed": seed,
        "faults": faults,
        "level": "simple" if count == 1 else "compound",
        "persona": persona,
        "goals": [dataclasses.asdict(goal) for goal in goals],
        "plan": planner.finish(),
        "rubric": rubric,
    }


def _draw_goal(scene: Scene, goals: list[Goal]) -> Goal | None:
    """A goal whose tool no other goal has."""
    used = {goal.tool for goal in goals}
    tools = [tool for tool in scene.tools.values() if tool.name not in used]
    for _ in range(TRIES):
        reads = scene.rng.random() < READS
        pool = [t for t in tools if t.writes != reads and t.kind not in ("list", "search")]
        tool = scene.rng.choice(pool) if pool else None
        goal = make_goal(scene, tool) if tool else None
        if goal is not None:
            goal.declines = goal.confirm and not goal.refused and scene.rng.random() < DECLINES
            return goal
    return None


def _checkpoints(goal: Goal, scene: Scene, changes: list[Any]) -> list[dict[str, Any]]:
    """What a good trajectory does on the way to a goal."""
    tool = scene.tools[goal.tool]
    touched = [{"touch": name} for name in goal.subjects]
    called: list[dict[str, Any]]
    if goal.refused or goal.declines:
        called = [{"tool": goal.tool}, *touched]
    elif tool.writes:
        called = [{"tool": goal.tool, "arguments": goal.arguments}]
    elif tool.kind in ("count", "total", "related"):
        called = [{"tool": t.name} for t in scene.tools.values() if t.entity == tool.entity]
    else:
        called = touched
    points: list[dict[str, Any]] = [{"called": called}]
    points += [{"changed": changes}] if changes else []
    points += [{"said": spelled} for spelled in goal.say]
    entities = scene.world.entities.values()
    names = [*goal.subjects, *(query for _, query in goal.lookups)]
    for entity in entities:
        records = scene.world.state[entity.name]
        names += [str(records[id_][entity.key]) for id_ in goal.subjects if id_ in records]
    if names and tool.kind != "related":
        words = LEFT_ALONE if goal.declines else ()
        points.append({"said": list(dict.fromkeys([*names, *words]))})
    return points


def play(
    library: Library, agent: Application, task: Mapping[str, Any], player: Any, user: Any = None
) -> Trajectory:
    """Let an agent do a task in its world."""
    world = library.make_world(agent, task["seed"], task["faults"])
    user = user or ScriptedUser(task)
    session = Session(world, agent.prompt, task["id"], player.name, user.name)
    return converse(session, user, player, library.declare(agent.tools))


def judge_task(
    library: Library, agent: Application, task: Mapping[str, Any], trajectory: Mapping[str, Any]
) -> Verdict:
    """Judge a trajectory in a fresh world of its task."""
    world = library.make_world(agent, task["seed"], task["faults"])
    return judge(task, trajectory, world)


def find_flaw(library: Library, agent: Application, task: Task) -> str:
    """Check a task from both sides: doing nothing scores 0, its oracle 1; the first flaw."""
    for text in IDLE:
        trajectory = play(library, agent, task, Idle(text))
        if judge_task(library, agent, task, trajectory.as_json()).score > 0:
            return "doing nothing scores"
    plan: list[Step] = task["plan"]
    verdict = judge_task(library, agent, task, play(library, agent, task, Oracle(plan)).as_json())
    if verdict.success and verdict.score == 1:
        return ""
    return f"the oracle fails: {next(iter(verdict.violations), 'a checkpoint')}"
