"""Evaluation tasks as environments: their questions, and their graders' scores as the reward."""

from collections.abc import Mapping

from k2jax.config import ConfigError
from k2jax.evals.task import Answer, Call, Generate, Item, Task
from k2jax.post.environment import Episode, Observation, Reply, StepResult
from k2jax.post.splits import split_tasks
from k2jax.runtime.hardware import count_cores

BUDGET = 1024  # new tokens of an episode


class GradedTasks:
    """The questions of a task of `k2jax.evals` that are answered by text, in one turn or more."""

    def __init__(self, task: Task, budget: int = BUDGET, workers: int = 1):
        """Take a task's questions.

        Args:
            task: grades.
            budget: new tokens of an episode.
            workers: threads that grade.

        Raises:
            ConfigError: they are no questions that are answered by text.
        """
        self.task, self.name, self.budget, self.workers = task, task.name, budget, workers
        items = list(task.items())
        if not all(isinstance(item.ask, Generate) for item in items):
            raise ConfigError(f"{task.name} asks for choices, not for text: it gives no reward")
        self._items = split_tasks(items, lambda item: item.id)

    def count(self, split: str) -> int:
        """Count the questions of a split."""
        return len(self._items[split])

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin with a question."""
        item = self._items[split][number]
        assert isinstance(item.ask, Generate)
        return _Graded(self.task, item), _observe(item.ask)


class _Graded:
    def __init__(self, task: Task, item: Item):
        self.task, self.item = task, item
        self.answers: list[Answer] = []

    def step(self, reply: Reply) -> StepResult:
        message = reply.message or {}
        self.answers.append(
            Answer(
                text=reply.text if reply.message is None else message.get("content", ""),
                thought=message.get("reasoning_content", ""),
                calls=tuple(_call(one["function"]) for one in message.get("tool_calls", ())),
                message=message,
                tokens=len(reply.ids),
            )
        )
        ask = self.task.follow_up(self.item, self.answers)
        if ask is not None:
            return StepResult({}, _observe(ask))
        return StepResult({"score": self.task.grade(self.item, self.answers).score})


def _call(function: Mapping[str, str]) -> Call:
    return Call(function["name"], function["arguments"])


def _observe(ask: Generate) -> Observation:
    return Observation(text=ask.prompt, messages=tuple(ask.messages), tools=tuple(ask.tools))


def open_math(path: str) -> GradedTasks:
    """The environment `math:FILE`: problems in MATH's format, graded by `math-verify`."""
    from k2jax.evals.math_answers import MathAnswers

    return GradedTasks(MathAnswers(path))


def open_code(path: str) -> GradedTasks:
    """The environment `code:FILE`: problems in HumanEval's format, their tests in the sandbox."""
    return _open_human_eval(path, chat=False)


def open_code_chat(path: str) -> GradedTasks:
    """The environment `code-chat:FILE`: the same in chat; the answer's last code block is run."""
    return _open_human_eval(path, chat=True)


def _open_human_eval(path: str, chat: bool) -> GradedTasks:
    from k2jax.evals.code_problems import HumanEval

    return GradedTasks(HumanEval(path, chat), workers=count_cores())
