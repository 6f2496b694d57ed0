"""Two small tasks that a model of a million parameters learns by trying, in minutes on a CPU.

An eighth of the prompts is held out, by a hash of the prompt: none of them is ever trained on.
`python -m k2jax.post.toy_tasks sum2 FOLDER` writes answers to learn from before that.
"""

import functools
import hashlib
import itertools
import json
import random
import sys
from pathlib import Path

from k2jax.post.environment import SingleTurn
from k2jax.runtime.files import write_atomic

HELD_OUT = 8  # one prompt in so many
MOST_EXAMPLES = 20_000


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is for scores only."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT == 0


def sum2() -> SingleTurn:
    """Sums of two numbers below 100: "34+7=" is answered by "41"."""
    return _single_turn("sum2", 4, list_sums)


def sort6() -> SingleTurn:
    """Six different digits to sort: "503812=" is answered by "012358"."""
    return _single_turn("sort6", 7, list_sortings)


@functools.cache
def list_sums() -> dict[str, str]:
    """Return all prompts with their answers."""
    return {f"{a}+{b}=": str(a + b) for a in range(100) for b in range(100)}


@functools.cache
def list_sortings() -> dict[str, str]:
    """Return all prompts with their answers."""
    orders = map("".join, itertools.permutations("0123456789", 6))
    return {f"{digits}=": "".join(sorted(digits)) for digits in orders}


def _single_turn(name, budget, answers):
    def prompts(split: str) -> list[str]:
        return [text for text in answers() if is_held_out(text) == (split == "heldout")]

    def reward(prompt: str, reply: str) -> float:
        return float(reply == answers()[prompt])

    return SingleTurn(name, budget, prompts, reward)


def write_examples(task: str, folder: str) -> Path:
    """Write right answers to prompts that are not held out, as text to learn from first.

    Args:
        task: "sum2" or "sort6".
        folder: `<task>.jsonl` is written there.
    """
    answers = {"sum2": list_sums, "sort6": list_sortings}[task]()
    texts = [prompt + answer for prompt, answer in answers.items() if not is_held_out(prompt)]
    random.Random(0).shuffle(texts)
    path = Path(folder) / f"{task}.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:MOST_EXAMPLES]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{write_examples(*sys.argv[1:])}\n")
