"""Scores of a task from its verdicts, with intervals and with counts of what went wrong."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.evals.code_problems import pass_at_k
from k2jax.evals.task import PASSED, Verdict

Z95 = 1.959963984540054  # standard errors on either side of 95%
Verdicts = Mapping[str, Sequence[Verdict]]  # of each item, one for each sample


def summarise(verdicts: Verdicts, pass_at: Sequence[int]) -> dict[str, Any]:
    """Return the numbers that every task has.

    Keys: `items`, `samples`, `results` (samples by what became of them), `score` (mean over items
    of the mean over their samples, Avg@k), `score_low` and `score_high` (95%), and for each k
    `pass@k` with its own interval. Intervals treat items as draws from more such items.

    Args:
        verdicts: of each item, one for each sample.
        pass_at: each k that is wanted; those above the number of samples are left out.
    """
    means = [sum(v.score for v in each) / len(each) for each in verdicts.values()]
    results = Counter(v.result for each in verdicts.values() for v in each)
    out: dict[str, Any] = {
        "items": len(verdicts),
        "samples": results.total(),
        "results": dict(sorted(results.items())),
    }
    out |= with_interval("score", means)
    for k in pass_at:
        if verdicts and all(len(each) >= k for each in verdicts.values()):
            shares = [
                pass_at_k(len(each), sum(v.result == PASSED for v in each), k)
                for each in verdicts.values()
            ]
            out |= with_interval(f"pass@{k}", shares)
    return out


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return a mean and its 95% interval under `name`, `name_low` and `name_high`.

    Of zeros and ones it is Wilson's, which has a width at 0% and 100% too; else normal, and absent
    for one value.
    """
    if not values:
        return {name: 0.0, f"{name}_low": 0.0, f"{name}_high": 1.0}
    count, mean = len(values), sum(values) / len(values)
    if all(value in (0, 1) for value in values):
        centre = (mean + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
        spread = mean * (1 - mean) / count + Z95**2 / (4 * count**2)
        half = Z95 * math.sqrt(spread) / (1 + Z95**2 / count)
        # At 0% and 100% rounding must not leave the mean outside.
        low, high = min(centre - half, mean), max(centre + half, mean)
        return {name: mean, f"{name}_low": max(low, 0.0), f"{name}_high": min(high, 1.0)}
    if count < 2:
        return {name: mean}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = Z95 * math.sqrt(variance / count)
    low, high = mean - half, mean + half
    if all(0 <= value <= 1 for value in values):  # shares: so is their mean
        low, high = max(low, 0.0), min(high, 1.0)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
