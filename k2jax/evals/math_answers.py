r"""Mathematics with short answers in \boxed{}: the format of MATH and MATH-500.

Fields of a problem: `problem`, `answer` (or `solution`, which boxes it), and, if there, `subject`,
`level`, `unique_id`. Answers are compared by the package `math-verify` (extra `eval`).
Source: [MATH] "Measuring Mathematical Problem Solving With the MATH Dataset", 2103.03874.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.evals.math_judge import Judge
from k2jax.evals.records import Record, digest_files, read_records, require_unique
from k2jax.evals.task import (
    FAILED,
    PASSED,
    TIMED_OUT,
    UNPARSED,
    Answer,
    Generate,
    Item,
    Task,
    TaskSettings,
    Verdict,
)

BOXES = (r"\boxed", r"\fbox")
# Ours: the report does not publish its prompt.
PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PLACE = 200  # characters of a wrong answer that a reason shows


def extract_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} or \fbox{...}; None if there is none.

    Braces nest, escaped ones do not count; `\boxed 7` is read up to the end of its word.
    """
    starts = sorted((i + len(box) for box in BOXES for i in _find_all(text, box)), reverse=True)
    for start in starts:
        content = _read_group(text, start)
        if content is not None:
            return content.strip()
    return None


def _find_all(text: str, part: str) -> list[int]:
    places, at = [], text.find(part)
    while at >= 0:
        places.append(at)
        at = text.find(part, at + 1)
    return places


def _read_group(text: str, start: int) -> str | None:
    rest = text[start:].lstrip()
    if not rest.startswith("{"):
        word = rest.split("$")[0].split()[:1]
        return word[0].rstrip(".,;") if text[start : start + 1] == " " and word else None
    depth, escaped = 0, False
    for i, letter in enumerate(rest):
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return rest[1:i]
    return None


class MathAnswers(Task):
    """MATH-500 and files like it, answered in chat."""

    settings = TaskSettings(max_new_tokens=8192)

    def __init__(self, path: str | Path, judge: Judge | None = None):
        """Read problems.

        Args:
            path: JSON lines.
            judge: compares answers; None: one of its own, started when it is needed.

        Raises:
            ConfigError: the file is missing or malformed, or `math-verify` is not installed.
        """
        records = read_records(path, ("problem",))
        self.name, self._judge = "math", judge or Judge()
        self._items = [_make_item(i, record) for i, record in enumerate(records)]
        require_unique([item.id for item in self._items], path)
        self.digest = digest_files(path, more=f"{PROMPT} {self._judge.version}")

    def items(self) -> Sequence[Item]:
        """All problems, in the order of the file."""
        return self._items

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Compare the last boxed answer with the problem's."""
        extracted, target = extract_boxed(answers[-1].text), item.target["answer"]
        if extracted is None:
            return Verdict(0.0, UNPARSED, "", r"no complete \boxed{} in the answer")
        equal = extracted == target or self._judge.are_equal(target, extracted)
        if equal is None:
            return Verdict(0.0, TIMED_OUT, extracted, "the comparison took too long")
        if equal:
            return Verdict(1.0, PASSED, extracted)
        return Verdict(0.0, FAILED, extracted, f"{extracted[:PLACE]!r} is not {target[:PLACE]!r}")

    def summarise(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """Accuracy of each subject and each level that the file names."""
        scores: dict[str, list[float]] = {}
        for item in self._items:
            for kind in item.target["kinds"]:
                scores.setdefault(kind, []).extend(v.score for v in verdicts.get(item.id, ()))
        return {kind: sum(all_) / len(all_) for kind, all_ in sorted(scores.items()) if all_}


def _make_item(number: int, record: Record) -> Item:
    fields: Mapping[str, Any] = record.fields
    answer = fields.get("answer")
    if answer is None:
        answer = extract_boxed(record.text("solution"))
        if answer is None:
            raise ConfigError(rf"{record.place}: its solution has no \boxed{{}} answer")
    kinds = [f"{name}: {fields[name]}" for name in ("subject", "level") if name in fields]
    content = PROMPT.format(problem=fields["problem"])
    return Item(
        str(fields.get("unique_id", number)),
        Generate(messages=({"role": "user", "content": content},)),
        {"answer": str(answer).strip(), "kinds": kinds},
    )
