"""Whether an agent's texts name only what somebody told it: the user, its prompt or a tool."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.speech import flatten

ID = re.compile(r"\b[A-Z]{2,4}-\d{2,}\b")
DAY = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]*\w")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)")
SMALL = 10  # numbers below it may be counted by the agent itself
RECENT = 3  # messages whose numbers an agent may add or subtract


def find_invention(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the first fact of an assistant's text that nobody told; "" where there is none.

    Facts are ids, days, mail addresses and numbers from 10. Sums and differences of two numbers
    of the latest messages count as told.

    Args:
        messages: of a conversation.
    """
    told = ""
    numbers: set[float] = set()
    recent: list[set[float]] = []
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant":
            told += f" {content}"
            recent = [*recent[1 - RECENT :], _numbers(content)]
            numbers |= recent[-1]
        elif invented := _find_name(content, told) or _find_number(content, numbers, recent):
            return f"nobody told the agent {invented}"
    return ""


def _find_name(text: str, told: str) -> str:
    for pattern in (ID, DAY, MAIL):
        for name in pattern.findall(text):
            if flatten(name) not in flatten(told):
                return name
    return ""


def _find_number(text: str, numbers: set[float], recent: Sequence[set[float]]) -> str:
    for name in (ID, DAY, MAIL):
        text = name.sub(" ", text)
    for value in sorted(_numbers(text)):
        if value < SMALL and value == int(value):
            continue
        if not _is_near(value, numbers) and not _is_computed(value, set().union(*recent)):
            return f"{value:g}"
    return ""


def _numbers(text: str) -> set[float]:
    plain = text.replace("$", " ").replace('"', " ").replace("-", " ")
    return {float(number.replace(",", "")) for number in NUMBER.findall(plain) if number.strip(",")}


def _is_near(value: float, numbers: set[float]) -> bool:
    return value in numbers or any(abs(value - number) < 0.005 for number in numbers)


def _is_computed(value: float, numbers: set[float]) -> bool:
    large = [number for number in numbers if number >= 1]
    return any(
        abs(value - abs(a + sign * b)) < 0.005 for a in large for b in large for sign in (1, -1)
    )
