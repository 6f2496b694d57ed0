"""Published settings have a task of ours or none, and say where they come from."""

import pytest

from k2jax.config import ConfigError
from k2jax.evals.presets import PRESETS, find_preset


def test_presets_name_their_source_and_average_over_their_samples():
    for name, preset in PRESETS.items():
        assert name.partition("/")[0] in ("k2", "k2-thinking")
        assert preset.source.startswith("[K2")
        assert preset.settings.samples == 1 or preset.metric == f"Avg@{preset.settings.samples}"
    assert find_preset("k2/aime-2024").settings.samples == 64
    assert find_preset("k2/swe-bench-agentless").settings.max_new_tokens == 16384
    with pytest.raises(ConfigError, match="did you mean 'k2/math-500'"):
        find_preset("k2/math500")
