"""The simplest tasks: how likely texts are, and multiple choice from a file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.data import sources
from k2jax.evals.records import Record, digest_files, read_records, require_unique
from k2jax.evals.task import FAILED, PASSED, Answer, Choose, Item, Roll, Task, Verdict

SCORED = "scored"  # of a sample that is neither right nor wrong


class TextLikelihood(Task):
    """Bits per byte and perplexity of files, every token scored once in full windows."""

    def __init__(self, path: str | Path):
        """Read texts.

        Args:
            path: whatever `k2jax evaluate --data` takes; each document is an item.

        Raises:
            ConfigError: there is no text.
        """
        self.name = "text"
        source = sources.find(str(path))
        self._items = [Item(name, Roll(text)) for name, text in source.documents()]
        require_unique([item.id for item in self._items], path)
        self.digest = digest_files(*source.files)

    def items(self) -> Sequence[Item]:
        """All documents that have text."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Count; `score` is the document's bits per byte."""
        assert isinstance(item.ask, Roll)
        size = len(item.ask.text.encode())
        nats = -sum(answers[-1].logprobs)
        numbers = {"nats": nats, "bytes": size, "tokens": answers[-1].tokens}
        return Verdict(nats / math.log(2) / max(size, 1), SCORED, numbers=numbers)

    def summarise(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """Add up over all text: `bits_per_byte`, `nats_per_token`, `perplexity`, and what of."""
        totals = {name: 0.0 for name in ("nats", "bytes", "tokens")}
        for each in verdicts.values():
            for name in totals:
                totals[name] += each[0].numbers[name]
        nats = totals["nats"] / max(totals["tokens"], 1)
        return {
            "bits_per_byte": totals["nats"] / math.log(2) / max(totals["bytes"], 1),
            "nats_per_token": nats,
            "perplexity": math.exp(min(nats, 700.0)),
            "tokens": int(totals["tokens"]),
            "bytes": int(totals["bytes"]),
        }


class MultipleChoice(Task):
    """Questions whose answer is the likeliest of given texts.

    Fields: `context` (or `question`), `choices`, `answer` (a number from 0, a letter, or one of the
    choices), and, if there, `id`.
    """

    def __init__(self, path: str | Path):
        """Read questions.

        Raises:
            ConfigError: the file is missing or malformed; the line is named.
        """
        self.name = "choice"
        self._items = [_make_item(i, record) for i, record in enumerate(read_records(path))]
        require_unique([item.id for item in self._items], path)
        self.digest = digest_files(path)

    def items(self) -> Sequence[Item]:
        """All questions."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Take the likeliest choice; `acc_norm` divides by the bytes of each, as lm-eval does."""
        assert isinstance(item.ask, Choose)
        logprobs, choices = answers[-1].logprobs, item.ask.choices
        best = max(range(len(choices)), key=logprobs.__getitem__)
        by_byte = [p / max(len(c.encode()), 1) for p, c in zip(logprobs, choices, strict=True)]
        normed = max(range(len(choices)), key=by_byte.__getitem__)
        numbers = {"acc_norm": float(normed == item.target)}
        if best == item.target:
            return Verdict(1.0, PASSED, choices[best], numbers=numbers)
        reason = f"choice {best} has {logprobs[best]:.4f} nats, the answer {item.target} has"
        reason += f" {logprobs[item.target]:.4f}"
        return Verdict(0.0, FAILED, choices[best], reason, numbers)

    def summarise(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """Return `acc_norm`; `score` is the accuracy."""
        normed = [each[0].numbers["acc_norm"] for each in verdicts.values()]
        return {"acc_norm": sum(normed) / max(len(normed), 1)}


def _make_item(number: int, record: Record) -> Item:
    fields = record.fields
    context = record.text("context" if "context" in fields else "question")
    choices = fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ConfigError(f"{record.place} has no 'choices', a list of two texts or more")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError(f"{record.place} has a choice that is no text, or empty")
    target = _find_answer(record.place, fields.get("answer"), choices)
    return Item(str(fields.get("id", number)), Choose(context, tuple(choices)), target)


def _find_answer(place: str, answer: Any, choices: list[str]) -> int:
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{place} has the answer {answer!r}; it must be in 0..{len(choices) - 1}, a letter, or"
            " one of the choices"
        )
    return answer
