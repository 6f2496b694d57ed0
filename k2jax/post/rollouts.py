"""Samples of a policy: the engine writes, the environment answers, token ids are kept throughout.

A rollout is a function of the weights, the task and its seed. The ids that the model wrote are the
ids that it learns from: what the environment adds is appended, and nothing is tokenised again.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from k2jax.config import ConfigError, one_line
from k2jax.inference.engine import Engine
from k2jax.inference.request import Request, Result, Sampling
from k2jax.post.environment import Environment, Episode, Observation, Reply
from k2jax.post.parallel import map_in_order
from k2jax.text import kimi_template
from k2jax.text.interface import TokenizerLike
from k2jax.text.messages import check_messages, renumber_calls
from k2jax.text.reply import parse

SOLVED = 1.0  # reward from which a sample counts as right


class Try(NamedTuple):
    """A task to try."""

    number: int
    seed: int


@dataclasses.dataclass
class Rollout:
    """One sample.

    Attributes:
        ids: prompt, the model's turns and what was observed between them.
        own: of each id, whether the model wrote it.
        logprobs: of the model's own tokens in order, by the engine, at temperature 1.
        parts: rewards by name, summed over turns.
        text: what the model wrote last, without the token that ended it.
        notes: numbers by name that are logged and are no reward; see `Comparison`.
        is_truncated: it ran out of tokens, and was not judged.
        messages: of the conversation so far; empty where the prompt was plain text.
        failure: why its reward is unknown; "": it is known.
        experts: of all ids but the last, int16 [tokens, layers, experts a token], where the engine
            keeps them; those of the turn in which a token was first read.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    own: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    text: str = ""
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    is_truncated: bool = False
    messages: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    failure: str = ""
    experts: np.ndarray | None = None

    @property
    def reward(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def own_count(self) -> int:
        """Tokens that the model wrote."""
        return len(self.logprobs)


class Sampler:
    """Tries tasks of one environment with one engine.

    Attributes:
        failures: how many samples failed so far, by what the environment said.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TokenizerLike,
        env: Environment,
        budget: int = 0,
        length: int = 0,
    ):
        """Sample with what the engine holds at each call.

        Args:
            engine: of the policy.
            tokenizer: of the model.
            env: tasks.
            budget: most new tokens of a sample; 0: the environment's.
            length: most tokens of prompt and sample together; 0: the engine's context.
        """
        self.engine, self.tokenizer, self.env = engine, tokenizer, env
        self.budget = budget or env.budget
        self.length = min(length or engine.context, engine.context)
        self.failures: Counter[str] = Counter()

    def sample(self, split: str, tries: Sequence[Try], temperature: float) -> list[Rollout]:
        """Try tasks to their end, all at once.

        Raises:
            ConfigError: a prompt leaves no room for an answer.
            RuntimeError: the model's logits are not finite.
        """
        rollouts = [Rollout() for _ in tries]
        run = functools.partial(map_in_order, workers=getattr(self.env, "workers", 1))
        begun = list(run(lambda task: self.env.reset(split, task.number, task.seed), tries))

        def take(answer: tuple[int, Result]) -> Observation | None:
            i, result = answer
            return self._take(rollouts[i], begun[i][0], result)

        waiting = {i: seen for i, (_, seen) in enumerate(begun)}
        turn = 0
        while waiting:
            requests = {}
            for i, seen in waiting.items():
                request = self._ask(rollouts[i], seen, (tries[i].seed, turn), temperature)
                if request is not None:
                    requests[i] = request
            results = self.engine.run(requests.values()) if requests else []
            if wrong := next((result.error for result in results if result.error), ""):
                raise RuntimeError(f"a sample failed: {wrong}")
            following = run(take, list(zip(requests, results, strict=True)))
            pairs = zip(requests, following, strict=True)
            waiting = {i: seen for i, seen in pairs if seen is not None}
            turn += 1
        groups = self._group(tries, rollouts)
        list(run(lambda number: self._compare(split, number, groups[number]), list(groups)))
        self.failures.update(r.failure for r in rollouts if r.failure)
        return rollouts

    def _group(self, tries: Sequence[Try], rollouts: Sequence[Rollout]) -> dict[int, list[Rollout]]:
        """Return what is to be compared, by task: nothing where the environment does not."""
        groups: dict[int, list[Rollout]] = {}
        if getattr(self.env, "compare", None) is not None:
            for task, rollout in zip(tries, rollouts, strict=True):
                if not rollout.failure and not rollout.is_truncated:
                    groups.setdefault(task.number, []).append(rollout)
        return {number: group for number, group in groups.items() if len(group) > 1}

    def _compare(self, split: str, number: int, group: Sequence[Rollout]) -> None:
        """Let the environment compare a task's samples."""
        texts = [rollout.text for rollout in group]
        try:
            rewards, notes = self.env.compare(split, number, texts)  # type: ignore[attr-defined]
            for rollout, reward in zip(group, rewards, strict=True):
                _add_parts(rollout.parts, reward)
                rollout.notes = notes
        except Exception as error:
            for rollout in group:
                rollout.failure = one_line(error, typed=True)

    def _ask(
        self, rollout: Rollout, seen: Observation, seed: tuple[int, int], temperature: float
    ) -> Request | None:
        """Append what is read next, and ask for the model's turn; None: the sample has ended."""
        try:
            ids = self._encode(rollout, seen)
        except ConfigError as error:
            if not rollout.ids:
                raise
            rollout.failure = one_line(error)  # such as a result of no call, or two calls in one
            return None
        left = min(self.budget - rollout.own_count, self.length - len(rollout.ids) - len(ids))
        if left < 1 and not rollout.ids:
            raise ConfigError(
                f"a prompt of {self.env.name} has {len(ids)} tokens, and a row {self.length}:"
                " nothing fits behind it; raise data.context"
            )
        if left < 1:
            rollout.is_truncated = True
            return None
        rollout.ids += ids
        rollout.own += [False] * len(ids)
        draws = int(np.random.SeedSequence(seed).generate_state(1)[0])
        stops = frozenset(self.tokenizer.stops)
        sampling = Sampling(temperature, seed=draws)
        return Request(tuple(rollout.ids), left, sampling, stops, logprobs=0)

    def _encode(self, rollout: Rollout, seen: Observation) -> Sequence[int]:
        if not seen.messages:
            text = self.tokenizer.encode(seen.text)
            return text if rollout.ids else [self.tokenizer.bos, *text]
        rollout.messages += seen.messages
        if not rollout.ids:
            return kimi_template.encode(self.tokenizer, rollout.messages, seen.tools)
        assert self.tokenizer.template is not None
        turns = renumber_calls(check_messages(rollout.messages))
        parts = self.tokenizer.template.parts(turns)
        # Every turn has one mark at its end: what follows that of the reply is new.
        ends = [i for i, part in enumerate(parts) if part == kimi_template.END]
        reply = ends[-len(seen.messages) - 1]
        return kimi_template.to_ids(self.tokenizer, parts[reply + 1 :])

    def _take(self, rollout: Rollout, episode: Episode, result: Result) -> Observation | None:
        """Add the model's turn, and let the environment answer; None: the sample has ended."""
        before = len(rollout.ids)
        rollout.ids += result.ids
        rollout.own += [True] * len(result.ids)
        rollout.logprobs += [entry.logprob for entry in result.logprobs]
        if result.experts is not None:
            before_this = [] if rollout.experts is None else [rollout.experts]
            read = sum(map(len, before_this))
            rollout.experts = np.concatenate([*before_this, result.experts[read:]])
        if result.finish_reason != "stop":
            rollout.is_truncated = True
            return None
        message = None
        if rollout.messages:
            message = parse(self.tokenizer, result.ids, rollout.ids[:before]).message()
            rollout.messages.append(message)
        rollout.text = self.tokenizer.decode(result.ids[:-1])
        try:
            answer = episode.step(Reply(rollout.text, tuple(result.ids), message))
            _add_parts(rollout.parts, answer.reward)
        except Exception as error:
            rollout.failure = one_line(error, typed=True)
            return None
        return answer.observation


def _add_parts(parts: dict[str, float], reward: Mapping[str, float]) -> None:
    for name, value in reward.items():
        if not math.isfinite(value):
            raise ValueError(f"reward {name!r} is {value}")
        parts[name] = parts.get(name, 0.0) + float(value)


def summarise(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return shares and means of samples: those that failed count only as failed.

    `accuracy` is the share with a reward of at least 1. A sample is solved, wrong or truncated.
    """
    judged = [r for r in rollouts if not r.failure]
    whole = [r for r in judged if not r.is_truncated]
    solved = sum(r.reward >= SOLVED for r in whole)
    count = max(len(judged), 1)
    return {
        "accuracy": solved / count,
        "wrong": (len(whole) - solved) / count,
        "truncated": (len(judged) - len(whole)) / count,
        "failed": float(len(rollouts) - len(judged)),
        "answer_tokens": sum(r.own_count for r in judged) / count,
    }
