"""The tasks of `k2jax synth` as an environment: a user, tools, a world, the rubric's judge."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2jax.post.environment import Episode, Observation, Reply, StepResult
from k2jax.post.splits import split_tasks
from k2jax.post.synthesis.pipeline import load_library, load_tasks
from k2jax.post.synthesis.simulate import CALLS, STOP, TURNS, Session
from k2jax.post.synthesis.task_maker import judge_task
from k2jax.post.synthesis.users import ScriptedUser

BUDGET = 1024  # new tokens of an episode, all turns together
SHARE = 0.5  # of the reward that checkpoints give; the rest is for success


class ToolWorlds:
    """Tasks with tools: any number of turns, and a reward at the end.

    The reward has two parts: `checkpoints`, half the share of them that was reached, 0 after any
    violation; and `success`, half, where everything is as it should be. Users are scripted, so an
    episode follows from its number and the replies.
    """

    def __init__(self, folder: str | Path, budget: int = BUDGET):
        """Read a folder that `k2jax synth` made, at least up to its tasks.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        self.name, self.budget = f"tools:{folder}", budget
        self.library = load_library(folder)
        self.agents, tasks = load_tasks(folder)
        self._tasks = split_tasks(tasks, lambda task: task["seed"])

    def count(self, split: str) -> int:
        """Count the tasks of a split."""
        return len(self._tasks[split])

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin a task in a fresh world; `seed` changes nothing, the task's own decides."""
        episode = _ToolEpisode(self, self._tasks[split][number])
        return episode, episode.open()


class _ToolEpisode:
    """A task being tried."""

    def __init__(self, environment: ToolWorlds, task: Mapping[str, Any]):
        self.library, self.task = environment.library, task
        self.agent = environment.agents[task["agent"]]
        world = self.library.make_world(self.agent, task["seed"], task["faults"])
        self.user = ScriptedUser(task)
        self.session = Session(world, self.agent.prompt, task["id"], "policy", "scripted")
        self.turns = 0

    def open(self) -> Observation:
        """The system prompt, the tools and the user's first message."""
        self.session.hear(self.user.open())
        messages = tuple(dict(one) for one in self.session.trajectory.messages)
        return Observation(messages=messages, tools=tuple(self.library.declare(self.agent.tools)))

    def step(self, reply: Reply) -> StepResult:
        """Do the calls of a reply, or let the user answer its text."""
        message = reply.message or {"role": "assistant", "content": reply.text}
        ids = [call["id"] for call in message.get("tool_calls") or ()]
        if len(set(ids)) < len(ids):
            return StepResult(
                {"checkpoints": 0.0, "success": 0.0}
            )  # results could not be told apart
        results = self.session.act(message)
        if results:
            if len(self.session.trajectory.calls) >= CALLS:
                return self._finish("calls")
            shown = [
                {**result, "tool_call_id": id_} for result, id_ in zip(results, ids, strict=True)
            ]
            return StepResult({}, Observation(messages=tuple(shown)))
        self.turns += 1
        answer = self.user.reply(self.session.trajectory.messages[-1]["content"])
        if answer is None or answer == STOP:
            return self._finish("done")
        if self.turns >= TURNS:
            return self._finish("turns")
        self.session.hear(answer)
        return StepResult({}, Observation(messages=({"role": "user", "content": answer},)))

    def _finish(self, ended: str) -> StepResult:
        self.session.trajectory.ended = ended
        trajectory = self.session.trajectory.as_json()
        verdict = judge_task(self.library, self.agent, self.task, trajectory)
        success = (1 - SHARE) * verdict.success
        return StepResult({"checkpoints": SHARE * verdict.score, "success": success})


def open_tool_worlds(folder: str) -> ToolWorlds:
    """The environment `tools:FOLDER`."""
    return ToolWorlds(folder)
