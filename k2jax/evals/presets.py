"""Settings of the published scores, by name: how many tokens, how many samples, how they are drawn.

`k2/NAME` is Kimi K2 Instruct without thinking, `k2-thinking/NAME` is Kimi K2 Thinking. What no
source fixes says so: scores under it are ours. Source: [K2-TR] sec. 4.1, [K2-README], [K2T-README].
"""

import dataclasses

from k2jax.config import ConfigError, nearest
from k2jax.evals.task import TaskSettings

TOKENS, AGENTLESS_TOKENS = 8192, 16384  # [K2-TR] sec. 4.1: outputs, and SWE-bench's
# [K2-README] recommends it for chat. The report does not say how evaluations were drawn.
CHAT_TEMPERATURE = 0.6
BUDGET, CODE_BUDGET = 96 << 10, 128 << 10  # [K2T-README]: tokens of thought


@dataclasses.dataclass(frozen=True)
class Preset:
    """Published settings of a benchmark.

    Attributes:
        task: kind of task that they are for; "": none of ours.
        settings: for the task.
        metric: "Avg@k": mean over the samples; "pass@1".
        published: score of the released model, in percent; None: none is published.
        source: where it says so, and what it leaves open.
    """

    task: str
    settings: TaskSettings
    metric: str
    published: float | None
    source: str


def _k2(
    task: str,
    published: float | None,
    samples: int = 1,
    tokens: int = TOKENS,
    temperature: float = CHAT_TEMPERATURE,
) -> Preset:
    settings = TaskSettings(samples=samples, max_new_tokens=tokens, temperature=temperature)
    metric = f"Avg@{samples}" if samples > 1 else "pass@1"
    source = "[K2-TR] sec. 4.1"
    if temperature == CHAT_TEMPERATURE:
        source += "; temperature: [K2-README], for chat"
    return Preset(task, settings, metric, published, source)


def _thinking(task: str, published: float | None, samples: int, budget: int) -> Preset:
    settings = TaskSettings(samples=samples, max_new_tokens=budget, temperature=1.0)
    metric = f"Avg@{samples}" if samples > 1 else "pass@1"
    return Preset(task, settings, metric, published, "[K2T-README]; INT4 weights")


PRESETS = {
    "k2/math-500": _k2("math", 97.4),
    "k2/aime-2024": _k2("math", 69.6, samples=64),
    "k2/aime-2025": _k2("math", 49.5, samples=64),
    "k2/hmmt-2025": _k2("math", 38.8, samples=32),
    "k2/cnmo-2024": _k2("math", 74.3, samples=16),
    "k2/polymath-en": _k2("math", 65.1, samples=4),
    "k2/gpqa-diamond": _k2("", 75.1, samples=8),
    "k2/humaneval": _k2("humaneval-chat", None),
    "k2/multipl-e": _k2("multipl-e", 85.7),
    "k2/livecodebench-v6": _k2("livecodebench", 53.7),
    "k2/swe-bench-agentless": _k2("swe-bench", 51.8, tokens=AGENTLESS_TOKENS),
    "k2/bfcl": _k2("bfcl", None),
    "k2/tau2": _k2("", 66.1, samples=4, temperature=0.0),
    "k2/acebench-en": _k2("", 76.5, temperature=0.0),
    "k2-thinking/aime-2025": _thinking("math", 94.5, 32, BUDGET),
    "k2-thinking/hmmt-2025": _thinking("math", None, 32, BUDGET),
    "k2-thinking/gpqa-diamond": _thinking("", 84.5, 1, BUDGET),
    "k2-thinking/livecodebench-v6": _thinking("livecodebench", 83.1, 1, CODE_BUDGET),
}


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name]
