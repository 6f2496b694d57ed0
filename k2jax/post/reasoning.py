"""The generators of `reasoning-gym` (extra `rl`), with its own verifiers."""

import re
from typing import Any

from k2jax.config import ConfigError, nearest
from k2jax.data.optional import import_optional
from k2jax.post.environment import Episode, Observation, Reply, StepResult
from k2jax.post.toy_tasks import is_held_out

BUDGET = 256  # new tokens of an answer
SIZE = 10_000  # problems that are drawn
COUNTS = {"train": SIZE, "heldout": 500}
SEED = 1  # of the generator
ASK = "\n\nGive your answer between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym:
    """Problems of one generator; the reward is its verifier's score, from 0 to 1.

    The last `<answer>...</answer>` of a reply counts, or the whole reply where there is none. A
    problem belongs to a split by a hash of its question, so that no split has another's.
    """

    def __init__(self, generator: str, budget: int = BUDGET, **options: Any):
        """Make both splits, lazily.

        Args:
            generator: its name in `reasoning_gym`, such as "chain_sum".
            budget: new tokens of an answer.
            options: of the generator, such as `min_terms`.

        Raises:
            ConfigError: the package or the generator is not there, or refuses its options.
        """
        gym = import_optional("reasoning_gym", "pip install 'k2jax[rl]'")
        names = sorted(gym.factory.DATASETS)
        if generator not in names:
            raise ConfigError(f"reasoning-gym has no {generator!r}; {nearest(generator, names)}")
        self.name, self.budget = f"reasoning-gym:{generator}", budget
        try:
            self._data = gym.create_dataset(generator, size=SIZE, seed=SEED, **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.name} refuses its options: {error}") from None

    def count(self, split: str) -> int:
        """Count the problems of a split; the training split may have some twice."""
        return COUNTS[split]

    def reset(self, split: str, number: int, seed: int) -> tuple[Episode, Observation]:
        """Begin with a problem; the same for every seed.

        Raises:
            ConfigError: a generator of few problems has none for this split.
        """
        first = number * (SIZE // COUNTS[split])
        for i in range(SIZE):
            entry = self._data[(first + i) % SIZE]
            if is_held_out(entry["question"]) == (split == "heldout"):
                message = {"role": "user", "content": entry["question"] + ASK}
                return _Verified(self._data, entry), Observation(messages=(message,))
        raise ConfigError(f"{self.name} has no problems for the split {split}")


class _Verified:
    def __init__(self, data: Any, entry: Any):
        self.data, self.entry = data, entry

    def step(self, reply: Reply) -> StepResult:
        answers = ANSWER.findall(reply.text)
        answer = (answers[-1] if answers else reply.text).strip()
        return StepResult({"score": float(self.data.score_answer(answer, self.entry))})


def open_generator(name: str) -> ReasoningGym:
    """The environment `reasoning-gym:NAME`."""
    return ReasoningGym(name)
