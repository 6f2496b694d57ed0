"""What a model learns from by trying: tasks that answer back and give rewards.

One's own is ten lines in a file, and `--env FILE:NAME` opens it:

    from k2jax.post.environment import SingleTurn

    def prompts(split):
        return [f"{n} squared is " for n in range(1000) if (n % 10 == 0) == (split == "heldout")]

    def reward(prompt, reply):
        return float(reply == str(int(prompt.split()[0]) ** 2))

    def squares():
        return SingleTurn("squares", budget=8, prompts=prompts, reward=reward)
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from k2jax.config import ConfigError, nearest

SPLITS = ("train", "heldout")
SECONDS = 10.0  # for one step or reset in a process of its own, where the environment names none
# Where each environment is made: a module and a function without arguments.
REGISTRY = {
    "sum2": "k2jax.post.toy_tasks:sum2",
    "sort6": "k2jax.post.toy_tasks:sort6",
}


# Those that are made from a text behind a colon, as `math:FILE`.
FAMILIES = {
    "tools": "k2jax.post.tool_worlds:open_tool_worlds",
    "math": "k2jax.post.graded_tasks:open_math",
    "code": "k2jax.post.graded_tasks:open_code",
    "code-chat": "k2jax.post.graded_tasks:open_code_chat",
    "reasoning-gym": "k2jax.post.reasoning:open_generator",
}
# Families whose steps need no guard: they end, or a sandbox ends them.
OURS = ("tools", "code", "code-chat")


class Observation(NamedTuple):
    """What the model reads next; it is appended to what it has read and written so far.

    Attributes:
        text: appended as it is, for models without a chat template.
        messages: if any, rendered by the chat template instead of `text`; the assistant's turn is
            opened behind them.
        tools: declared before the first messages.
    """

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


class Reply(NamedTuple):
    """What the model wrote in one turn.

    Attributes:
        text: without the token that ended it.
        ids: with it.
        message: the assistant's message, with `tool_calls`; None where the prompt was plain text.
    """

    text: str
    ids: tuple[int, ...] = ()
    message: Mapping[str, Any] | None = None


class StepResult(NamedTuple):
    """What a turn led to.

    Attributes:
        reward: parts by name; a sample's reward is the sum of all parts of all its turns.
        observation: what the model reads next; None: the episode is over.
    """

    reward: Mapping[str, float]
    observation: Observation | None = None


class Comparison(NamedTuple):
    """How the samples of one task compare.

    Attributes:
        rewards: of each sample, parts by name, which are added to its own.
        notes: numbers by name that are logged, as `env_NAME`, and are no reward.
    """

    rewards: Sequence[Mapping[str, float]]
    notes: Mapping[str, float] = {}


class Episode(Protocol):
    """One task being tried."""

    def step(self, reply: Reply) -> StepResult:
        """Take the model's turn; an exception or a reward that is not finite fails the sample."""


class Environment(Protocol):
    """Tasks by number.

    An environment may have three members more. `seconds`: that a step may take, of one that runs in
    a process of its own. `workers`: how many steps are taken at a time, by as many such processes
    or by threads. `compare(split, number, replies)`: a `Comparison` of the samples of one task by
    what each wrote last, called when all of them have ended; failed and truncated ones are not
    among them. An exception fails all of them.

    Attributes:
        name: for reports.
        budget: most new tokens of a sample, all turns together. A sample that runs out of them is
            not judged: it counts as truncated.
    """

    name: str
    budget: int

    def count(self, split: str) -> int:
        """Count the tasks of a split, "train" or "heldout"."""

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin a task; what it does follows from the arguments and the replies alone."""


class SingleTurn:
    """Prompts of one turn, and functions of a prompt and its replies that give rewards."""

    def __init__(
        self,
        name: str,
        budget: int,
        prompts: Callable[[str], Sequence[str]],
        reward: Callable[[str, str], float | Mapping[str, float]] | None = None,
        *,
        compare: Callable[[str, Sequence[str]], Comparison] | None = None,
        seconds: float = SECONDS,
        workers: int = 1,
    ):
        """List the prompts of both splits.

        Args:
            name: for reports.
            budget: most new tokens of a reply.
            prompts: of "train" and of "heldout".
            reward: of a prompt and a reply; one number, or parts by name. None: nothing.
            compare: of a prompt and the replies of its samples; None: they are not compared.
            seconds: that each of both may take.
            workers: how many of them are computed at a time.

        Raises:
            ConfigError: nothing gives a reward.
        """
        if reward is None and compare is None:
            raise ConfigError(f"environment {name} has neither a reward nor a comparison")
        self.name, self.budget, self.seconds, self.workers = name, budget, seconds, workers
        self._reward, self._rank = reward or _give_nothing, compare
        self._prompts = {split: list(prompts(split)) for split in SPLITS}
        self.compare = self._compare if compare else None

    def count(self, split: str) -> int:
        """Count the prompts of a split."""
        return len(self._prompts[split])

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin with a prompt."""
        prompt = self._prompts[split][number]
        return _Judged(prompt, self._reward), Observation(prompt)

    def _compare(self, split: str, number: int, replies: Sequence[str]) -> Comparison:
        assert self._rank is not None
        return self._rank(self._prompts[split][number], replies)


def _give_nothing(prompt: str, reply: str) -> Mapping[str, float]:
    return {}


class _Judged:
    def __init__(self, prompt: str, reward: Callable[[str, str], float | Mapping[str, float]]):
        self._prompt, self._reward = prompt, reward

    def step(self, reply: Reply) -> StepResult:
        reward = self._reward(self._prompt, reply.text)
        parts = reward if isinstance(reward, Mapping) else {"reward": float(reward)}
        return StepResult(parts)


def open_environment(name: str) -> Environment:
    """Make an environment; what is not ours runs in processes of its own, within a time limit.

    Args:
        name: one of REGISTRY; `FAMILY:TEXT` of FAMILIES; or `FILE.py:FUNCTION`, a function without
            arguments.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    family = name.partition(":")[0]
    if name in REGISTRY or family in OURS:
        return make_environment(name)
    _check_name(name)
    from k2jax.post.guarded import Guarded, GuardedTeam

    guarded = Guarded(name)
    return GuardedTeam(guarded) if guarded.workers > 1 else guarded


def make_environment(name: str) -> Environment:
    """Make an environment in this process, without a time limit; else as `open_environment`."""
    _check_name(name)
    if name in REGISTRY:
        return _load(REGISTRY[name])()
    family, _, text = name.partition(":")
    if family in FAMILIES:
        return _load(FAMILIES[family])(text)
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not hasattr(loaded, function):
        raise ConfigError(f"{file} has no {function!r}; {nearest(function, vars(loaded))}")
    return getattr(loaded, function)()


def _load(place: str) -> Callable[..., Environment]:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def _check_name(name: str) -> None:
    family, _, text = name.partition(":")
    if name in REGISTRY:
        return
    if family in FAMILIES:
        if not text:
            raise ConfigError(f"environment {name!r} needs more: {family}:NAME, or a path")
        return
    file, colon, _ = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        known = [*REGISTRY, *(f"{one}:..." for one in FAMILIES)]
        raise ConfigError(
            f"no environment {name!r}; {nearest(name, known)}; or name one's own as FILE.py:NAME"
        )
    if not Path(file).is_file():
        raise ConfigError(f"no file {file}")
