"""An environment in a process of its own: a step that hangs or crashes fails that sample alone.

The process answers one JSON line to each; where it takes too long it is killed, and a new one takes
its place. Other episodes that were under way are played again there, from their replies, when their
next step comes: episodes follow from their arguments and replies alone.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError, one_line
from k2jax.post.environment import (
    SECONDS,
    SPLITS,
    Comparison,
    Environment,
    Episode,
    Observation,
    Reply,
    StepResult,
    make_environment,
)

START = 120.0  # seconds to import what the environment needs


class RewardError(Exception):
    """A step raised an error, took too long, or ended its process: this sample has no reward."""


class Guarded:
    """An environment by its name, run in a child process with a time limit.

    Attributes:
        workers: how many such processes the environment asks for.
    """

    def __init__(self, name: str, seconds: float = 0.0):
        """Start the process.

        Args:
            name: as `open_environment` takes it.
            seconds: for each step, reset and comparison; 0: as the environment says, or 10.

        Raises:
            ConfigError: there is no such environment, or it cannot be made.
        """
        self.spec, self._seconds = name, seconds
        self._lock = threading.Lock()
        self._episodes = 0
        self._start()
        self.compare = self._compare if self._compares else None

    def count(self, split: str) -> int:
        """Count the tasks of a split."""
        return self._counts[split]

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin a task; where that fails, the episode's first step does."""
        with self._lock:
            self._episodes += 1
            episode = _GuardedEpisode(self, self._episodes, (split, number, seed))
            try:
                return episode, _to_observation(self.ask(episode, "reset", list(episode.begin)))
            except RewardError as error:
                episode.failure = str(error)
                return episode, Observation()

    def _compare(self, split: str, number: int, replies: Sequence[str]) -> Comparison:
        with self._lock:
            return Comparison(*self._exchange(["compare", 0, [split, number, list(replies)]]))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __del__(self):
        if hasattr(self, "_process"):
            self.close()

    def ask(self, episode: "_GuardedEpisode", method: str, arguments: Any) -> Any:
        """Call a method of an episode in the child; the lock is held."""
        if episode.process is not self._process and method == "step":
            # The child that knew this episode is gone: play it again in this one.
            self._exchange(["reset", episode.id, list(episode.begin)])
            for reply in episode.replies:
                self._exchange(["step", episode.id, reply])
        episode.process = self._process
        return self._exchange([method, episode.id, arguments])

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "k2jax.post.guarded", self.spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._rest = b""
        try:
            about = self._receive(START)
        except RewardError as error:
            raise ConfigError(f"environment {self.spec!r} does not start: {error}") from None
        if "error" in about:
            self.close()
            raise ConfigError(about["error"])
        self.name, self.budget, self._counts = about["name"], about["budget"], about["counts"]
        self._compares, self._seconds = about["compares"], self._seconds or about["seconds"]
        self.workers = about["workers"]

    def _exchange(self, message: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._receive(self._seconds)
        except (RewardError, OSError) as error:
            self.close()
            self._start()
            raise RewardError(one_line(error)) from None
        if "error" in answer:
            raise RewardError(answer["error"])
        return answer["value"]

    def _receive(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(seconds):
                    raise RewardError(f"it took longer than {seconds:g} s")
                part = os.read(descriptor, 1 << 16)
                if not part:
                    raise RewardError("its process ended")
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


class GuardedTeam:
    """Several processes of one environment, which are used in turn."""

    def __init__(self, first: Guarded):
        """Start as many more as the environment asks for."""
        self.name, self.budget, self.workers = first.name, first.budget, first.workers
        self._members = [first, *(Guarded(first.spec) for _ in range(first.workers - 1))]
        self._next = itertools.cycle(self._members)
        self.compare = self._compare if first.compare else None

    def count(self, split: str) -> int:
        """Count the tasks of a split."""
        return self._members[0].count(split)

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin a task, in the next process."""
        return next(self._next).reset(split, number, seed)

    def _compare(self, split: str, number: int, replies: Sequence[str]) -> Comparison:
        return next(self._next)._compare(split, number, replies)

    def close(self) -> None:
        """End the processes."""
        for member in self._members:
            member.close()


@dataclasses.dataclass
class _GuardedEpisode:
    """An episode that lives in the child."""

    environment: Guarded
    id: int
    begin: tuple[str, int, int]
    replies: list[Any] = dataclasses.field(default_factory=list)
    process: Any = None
    failure: str = ""

    def step(self, reply: Reply) -> StepResult:
        """Take a reply.

        Raises:
            RewardError: the environment raised an error or took too long.
        """
        if self.failure:
            raise RewardError(self.failure)
        sent = [reply.text, list(reply.ids), reply.message]
        with self.environment._lock:
            reward, seen = self.environment.ask(self, "step", sent)
        self.replies.append(sent)
        return StepResult(reward, None if seen is None else _to_observation(seen))


def _to_observation(fields: Sequence[Any]) -> Observation:
    text, messages, tools = fields
    return Observation(text, tuple(messages), tuple(tools))


def serve_environment(name: str) -> int:
    """Answer a parent's lines until it is gone; the exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an environment prints is no answer

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    try:
        environment = make_environment(name)
        about = _describe(environment)
    except Exception as error:
        answer({"error": one_line(error, typed=not isinstance(error, ConfigError))})
        return 2
    answer(about)
    episodes: dict[int, Episode] = {}
    for line in sys.stdin.buffer:
        method, id_, arguments = json.loads(line)
        try:
            value = _call(environment, episodes, method, id_, arguments)
            answer({"value": value})
        except Exception as error:
            episodes.pop(id_, None)
            answer({"error": one_line(error, typed=True)})
    return 0


def _describe(environment: Environment) -> dict[str, Any]:
    return {
        "name": environment.name,
        "budget": environment.budget,
        "counts": {split: environment.count(split) for split in SPLITS},
        "seconds": getattr(environment, "seconds", SECONDS),
        "workers": getattr(environment, "workers", 1),
        "compares": getattr(environment, "compare", None) is not None,
    }


def _call(
    environment: Environment,
    episodes: dict[int, Episode],
    method: str,
    id_: int,
    arguments: Sequence[Any],
) -> list[Any]:
    """Call the environment or one of its episodes; what it returns, as JSON takes it."""
    if method == "reset":
        episodes[id_], seen = environment.reset(*arguments)
        return list(seen)
    if method == "compare":
        rewards, notes = environment.compare(*arguments)  # type: ignore[attr-defined]
        return [[_to_numbers(reward) for reward in rewards], _to_numbers(notes)]
    text, ids, message = arguments
    result = episodes[id_].step(Reply(text, tuple(ids), message))
    if result.observation is None:
        del episodes[id_]
        return [_to_numbers(result.reward), None]
    return [_to_numbers(result.reward), list(result.observation)]


def _to_numbers(parts: Mapping[str, Any]) -> dict[str, float]:
    """Return plain floats: JSON takes none of numpy's."""
    return {name: float(value) for name, value in parts.items()}


if __name__ == "__main__":
    sys.exit(serve_environment(sys.argv[1]))
