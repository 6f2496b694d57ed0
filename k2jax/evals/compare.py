"""In which samples two evaluations differ, and what differs first: prompt, tokens, ..."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.evals.ledger import Key, Record, list_differences, read_ledger
from k2jax.evals.task import PASSED

SHOWN = 20  # samples that are described
LENGTH = 60  # characters of what is quoted
COMPARED = ("parts", "extracted", "score", "result", "reason")

Parts = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A sample that two ledgers have, and not alike.

    Attributes:
        item: of the task.
        sample: its number.
        why: what differs first: "prompt", "tokens", "logprobs", "text", "extraction" or "verdict".
        text: one line that says how.
        verdicts: of both.
    """

    item: str
    sample: int
    why: str
    text: str
    verdicts: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two ledgers have in common.

    Attributes:
        files: both.
        header: each name that differs, as `settings.samples`, with both values.
        samples: that both have.
        only: samples that one has and not the other, for each.
        differences: in the order of the first ledger.
        scores: means over the samples that both have.
    """

    files: tuple[str, str]
    header: dict[str, tuple[Any, Any]]
    samples: int
    only: tuple[int, int]
    differences: tuple[Difference, ...]
    scores: tuple[float, float]


def compare_ledgers(first: str | Path, second: str | Path) -> Comparison:
    """Compare two ledgers of one task, sample by sample.

    Raises:
        ConfigError: one cannot be read, or they are of different tasks.
    """
    (header_a, records_a), (header_b, records_b) = read_ledger(first), read_ledger(second)
    if header_a.get("task") != header_b.get("task"):
        raise ConfigError(
            f"{first} is of task {header_a.get('task')}, {second} of {header_b.get('task')}"
        )
    a, b = _by_key(first, records_a), _by_key(second, records_b)
    both = [key for key in a if key in b]
    pairs = [(a[key], b[key]) for key in both]
    return Comparison(
        (str(first), str(second)),
        list_differences(header_a, header_b),
        len(both),
        (len(a) - len(both), len(b) - len(both)),
        tuple(d for pair in pairs if (d := find_difference(*pair))),
        (_mean([x for x, _ in pairs]), _mean([y for _, y in pairs])),
    )


def _by_key(path: str | Path, records: Sequence[Record]) -> dict[Key, Record]:
    judged = [record for record in records if "score" in record]  # others wait for their verdict
    for record in judged:
        if missing := [name for name in COMPARED if name not in record]:
            raise ConfigError(f"{path}: sample {record['item']!r} has no {missing[0]!r}")
    return {(record["item"], record["sample"]): record for record in judged}


def _mean(records: Sequence[Record]) -> float:
    return sum(record["score"] for record in records) / max(len(records), 1)


def find_difference(a: Record, b: Record) -> Difference | None:
    """Return what differs first between two samples; None: nothing does."""
    why, text = _first(a, b)
    if not why:
        return None
    return Difference(a["item"], a["sample"], why, text, (a["result"], b["result"]))


def _first(a: Record, b: Record) -> tuple[str, str]:
    if asked := _differ_in_requests(a["parts"], b["parts"]):
        return asked
    for name, kind in (("extracted", "extraction"), ("score", "verdict"), ("result", "verdict")):
        if a[name] != b[name]:
            return kind, f"{_quote(a[name])} and {_quote(b[name])}"
    if off := _differ_by(a["parts"], b["parts"]):
        return "logprobs", f"by at most {off:.2g}"
    if a["reason"] != b["reason"]:
        return "verdict", f"{_quote(a['reason'])} and {_quote(b['reason'])}"
    return ("text", "of equal tokens") if a != b else ("", "")


def _differ_in_requests(a: Parts, b: Parts) -> tuple[str, str] | None:
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        where = f"request {number}: " if len(a) > 1 else ""
        if x.get("prompt") != y.get("prompt"):
            return "prompt", f"{where}hashes {x.get('prompt')} and {y.get('prompt')}"
        if x["ids"] != y["ids"]:
            return "tokens", where + _describe_tokens(x, y)
    return None if len(a) == len(b) else ("prompt", f"{len(a)} and {len(b)} requests")


def _differ_by(a: Parts, b: Parts) -> float:
    pairs = [
        pair
        for x, y in zip(a, b, strict=True)
        for pair in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    return max((abs(p - q) for p, q in pairs), default=0.0)


def _describe_tokens(x: dict[str, Any], y: dict[str, Any]) -> str:
    pairs = enumerate(zip(x["ids"], y["ids"], strict=False))
    at = next((i for i, (p, q) in pairs if p != q), min(len(x["ids"]), len(y["ids"])))
    quoted = []
    for part in (x, y):
        if at < len(part["ids"]):
            quoted.append(f"{part['ids'][at]} ({part['logprobs'][at]:.4f})")
        else:
            quoted.append("the end")
    return f"from token {at} of {len(x['ids'])} and {len(y['ids'])}: {' and '.join(quoted)}"


def _quote(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def describe(comparison: Comparison) -> str:
    """A comparison as text."""
    lines = [f"{name}: {_quote(a)} and {_quote(b)}" for name, (a, b) in comparison.header.items()]
    for file, count in zip(comparison.files, comparison.only, strict=True):
        if count:
            lines.append(f"only in {file}: {count} samples")
    differences = comparison.differences
    changed = [d for d in differences if (d.verdicts[0] == PASSED) != (d.verdicts[1] == PASSED)]
    kinds = Counter(d.why for d in differences)
    lines.append(
        f"{comparison.samples} samples in both, mean score {comparison.scores[0]:.4f} and"
        f" {comparison.scores[1]:.4f}; {len(differences)} differ, {len(changed)} pass in one alone"
    )
    if kinds:
        lines.append("first difference: " + ", ".join(f"{n} {why}" for why, n in kinds.items()))
    # Those that change the score first.
    for d in [*changed, *(d for d in differences if d not in changed)][:SHOWN]:
        lines.append(
            f"  {d.item} #{d.sample}: {d.verdicts[0]} and {d.verdicts[1]}; {d.why}, {d.text}"
        )
    if len(differences) > SHOWN:
        lines.append(f"  and {len(differences) - SHOWN} more; --json has all")
    return "\n".join(lines)
