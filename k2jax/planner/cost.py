"""What a plan costs: hours, money, energy."""

import math

from k2jax.planner.targets import Target


def cost(target: Target, seconds: float) -> dict[str, float]:
    """Of keeping all chips of a target busy for so long.

    Keys: `hours` (wall clock), `chip_hours`, `dollars`, `kwh`.
    """
    hours = seconds / 3600
    chip_hours = hours * target.chips
    return {
        "hours": hours,
        "chip_hours": chip_hours,
        "dollars": chip_hours * target.chip.dollars,
        "kwh": chip_hours * target.chip.watts / 1000,
    }


def training(target: Target, step_seconds: float, step_tokens: int, tokens: float) -> dict:
    """Of training on so many tokens."""
    return cost(target, step_seconds * math.ceil(tokens / step_tokens))


def generating(target: Target, token_seconds: float, batch: int, tokens: float = 1e6) -> dict:
    """Of generating so many tokens, a batch at a time."""
    return cost(target, token_seconds * tokens / batch)
