"""A model as the judge of open answers: scores by rubrics, and comparisons of pairs.

Source: [K2-TR] 3.2: K2 ranks its own answers by core, prescriptive and written rubrics. Ours: each
pair is shown in both orders; where they disagree it is a tie, and how often they do is reported.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.environment import Comparison
from k2jax.post.parallel import map_in_order
from k2jax.post.synthesis.endpoint import Endpoint

RUBRICS = {
    "helpful": "It does what was asked, completely, and nothing that was not asked.",
    "true": "What it states is true, or said to be uncertain.",
    "clear": "It is as short as it can be and easy to follow.",
    "plain": "It neither praises the question or the user, nor argues for its own quality.",
}
SCORE = (
    "Judge an answer by one rubric, from 0 (not at all) to 10 (fully). Answer with one JSON object:"
    ' {"reason": TEXT, "score": NUMBER}.'
)
COMPARE = (
    "Say which of two answers is better by the rubrics, whatever their length and order. Answer"
    ' with one JSON object: {"reason": TEXT, "better": "first", "second" or "tie"}.'
)
POINTS = 10.0


class CriticError(Exception):
    """The judge's answer cannot be read: this sample has no score."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How several answers to one prompt compare.

    Attributes:
        scores: of each answer, from 0 to 1: its share of wins, a tie counts half.
        disagreement: share of pairs whose two orders gave different winners.
        unread: verdicts that could not be read; they count as ties.
    """

    scores: tuple[float, ...]
    disagreement: float
    unread: int


class Critic:
    """A judge behind an endpoint, at temperature 0."""

    def __init__(self, endpoint: Endpoint, rubrics: Mapping[str, str] = RUBRICS, workers: int = 8):
        """Judge by these rubrics.

        Args:
            endpoint: of the model; its own temperature does not count.
            rubrics: sentences by name.
            workers: questions at a time.
        """
        self.endpoint = dataclasses.replace(endpoint, temperature=0.0)
        self.rubrics, self.workers = dict(rubrics), workers

    def score(self, prompt: str, reply: str) -> dict[str, float]:
        """Score an answer by each rubric: parts of a reward, which add up to at most 1.

        Raises:
            CriticError: an answer of the judge cannot be read.
        """

        def score_one(name: str) -> float:
            rubric = self.rubrics[name]
            text = f"Rubric: {rubric}\n\nPrompt:\n{prompt}\n\nAnswer:\n{reply}"
            value = self._ask(SCORE, text).get("score")
            if not isinstance(value, int | float) or not 0 <= value <= POINTS:
                raise CriticError(f"{name}: the judge gives the score {value!r}")
            return value / POINTS / len(self.rubrics)

        scores = map_in_order(score_one, list(self.rubrics), self.workers)
        return dict(zip(self.rubrics, scores, strict=True))

    def compare(self, prompt: str, replies: Sequence[str]) -> Comparison:
        """Reward each answer by its share of wins: `compare` of an environment (self-critique)."""
        ranking = self.rank(prompt, replies)
        notes = {"disagreement": ranking.disagreement, "unread": float(ranking.unread)}
        return Comparison([{"wins": score} for score in ranking.scores], notes)

    def rank(self, prompt: str, replies: Sequence[str]) -> Ranking:
        """Compare each pair of answers in both orders.

        Args:
            prompt: that all of them answer.
            replies: at least two.
        """
        wins = [0.0] * len(replies)
        pairs = list(itertools.combinations(range(len(replies)), 2))
        orders = [order for one, other in pairs for order in ((one, other), (other, one))]

        def compare_one(order: tuple[int, int]) -> str:
            return self._compare(prompt, *(replies[i] for i in order))

        answers = list(map_in_order(compare_one, orders, self.workers))
        disagreed = unread = 0
        for (one, other), first, second in zip(pairs, answers[::2], answers[1::2], strict=True):
            verdicts = [first, _swap(second)]
            unread += verdicts.count("")
            agreed = verdicts[0] == verdicts[1] and verdicts[0] in ("first", "second")
            disagreed += verdicts[0] != verdicts[1]
            share = {"first": 1.0, "second": 0.0}[verdicts[0]] if agreed else 0.5
            wins[one] += share
            wins[other] += 1 - share
        others = max(len(replies) - 1, 1)
        disagreement = disagreed / len(pairs) if pairs else 0.0
        return Ranking(tuple(win / others for win in wins), disagreement, unread)

    def _compare(self, prompt: str, first: str, second: str) -> str:
        """Return "first", "second", "tie", or "" where the judge's answer cannot be read."""
        listed = "\n".join(f"- {rubric}" for rubric in self.rubrics.values())
        text = f"Rubrics:\n{listed}\n\nPrompt:\n{prompt}\n\nFirst:\n{first}\n\nSecond:\n{second}"
        try:
            better = self._ask(COMPARE, text).get("better")
        except CriticError:
            return ""
        return better if better in ("first", "second", "tie") else ""

    def _ask(self, task: str, text: str) -> dict[str, Any]:
        asked = [{"role": "system", "content": task}, {"role": "user", "content": text}]
        content = self.endpoint.ask(asked)["content"]
        match = re.search(r"\{.*\}", content, re.DOTALL)
        try:
            value = json.loads(match[0]) if match else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CriticError("the judge's answer is no JSON object")
        return value


def _swap(verdict: str) -> str:
    return {"first": "second", "second": "first"}.get(verdict, verdict)
