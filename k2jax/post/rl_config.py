"""Settings of reinforcement learning, beside those of the run: `--rl.FIELD VALUE`."""

import dataclasses
from collections.abc import Mapping

from k2jax.config import ConfigError, RunConfig, knob, nearest, override
from k2jax.config.knob import check_fields, each_knob

LOSSES = ("squared", "grpo", "token_clip")
BASELINES = ("mean", "log_mean_exp")
CONTROLS = ("none", "shuffled_rewards")
SQUARED, GRPO = {"loss": "squared"}, {"loss": "grpo"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """How a model learns from its own samples. The report publishes no value of any of these."""

    loss: str = knob("squared", "the loss (squared: K1.5's and K2's)", choices=LOSSES)
    baseline: str = knob("mean", "what a reward is compared with", choices=BASELINES, unless=GRPO)
    tau: float = knob(0.1, "how much the policy is held back", above=0, unless=GRPO)
    group: int = knob(8, "samples of each prompt", low=2)
    temperature: float = knob(1.0, "of the first step's samples", above=0)
    final_temperature: float = knob(
        1.0, "of the last step's; between them it falls evenly", above=0
    )
    budget: int = knob(0, "most new tokens of a sample; 0: the environment's own", low=0)
    truncation_penalty: float = knob(
        0.0, "a sample that ran out of tokens has minus this as its reward", low=0
    )
    toggle: int = knob(
        0, "steps of each phase, with and without a reward for short answers; 0: off", low=0
    )
    toggle_accuracy: float = knob(
        0.8,
        "mean reward of a group from which its long answers get none",
        low=0,
        unless={"toggle": 0},
    )
    toggle_share: float = knob(
        0.5,
        "a group's long answers are longer than this share of its solved ones",
        low=0,
        high=1,
        unless={"toggle": 0},
    )
    updates: int = knob(1, "steps with the samples of one policy; 1: on policy", low=1)
    replay_routing: bool = knob(False, "the trainer uses the experts that the sampler chose")
    clip_low: float = knob(0.2, "how far a ratio may fall below 1", low=0, high=1, unless=SQUARED)
    clip_high: float = knob(0.2, "how far a ratio may rise above 1", low=0, unless=SQUARED)
    band: float = knob(
        0.5,
        "largest log-ratio of a token whose reward still has a gradient",
        above=0,
        unless=SQUARED,
    )
    ptx: float = knob(0.0, "weight of the loss on data.path (PTX); 0: none", low=0)
    ptx_rows: int = knob(8, "rows of data.path in every step", low=1, unless={"ptx": 0})
    eval_prompts: int = knob(256, "held-out prompts of each score", low=1)
    control: str = knob(
        "none", "what is broken on purpose, to see it learn nothing", choices=CONTROLS
    )


def split_settings(settings: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the run's settings, and those of `rl` without that name in front."""
    own = {name: value for name, value in settings.items() if name.startswith("rl.")}
    rest = {name: value for name, value in settings.items() if name not in own}
    return rest, {name.removeprefix("rl."): value for name, value in own.items()}


def configure_rl(settings: Mapping[str, str]) -> RlConfig:
    """Return checked settings.

    Args:
        settings: values by field.

    Raises:
        ConfigError: an unknown field, an impossible value, or a setting without effect.
    """
    knobs = {name: each for name, each, _ in each_knob(RlConfig())}
    for name in settings:
        if name not in knobs:
            raise ConfigError(f"rl has no {name!r}; {nearest(name, knobs)}")
    rl = override(RlConfig(), dict(settings))
    check_fields("rl", rl)
    for name in settings:
        if cause := knobs[name].describe_idleness(rl):
            raise ConfigError(f"rl.{name} has no effect with rl.{cause}")
    return rl


def check_run(run: RunConfig, rl: RlConfig) -> None:
    """Refuse a run that its samples do not fit.

    Raises:
        ConfigError: says which setting to change.
    """
    if run.data.rows % rl.group:
        low = max(run.data.rows // rl.group, 1) * rl.group
        raise ConfigError(
            f"data.rows is {run.data.rows}; it is prompts times rl.group ({rl.group}): {low} or"
            f" {low + rl.group} would do"
        )
    if run.train.save_every % rl.updates:
        raise ConfigError(
            f"train.save_every is {run.train.save_every}; rl.updates ({rl.updates}) must divide it"
        )
    if run.model.mtp_layers:
        raise ConfigError("model.mtp_layers must be 0: MTP layers do not learn from samples")
    parts = run.train.accumulate * run.mesh.replica * run.mesh.data * run.mesh.expert
    if rl.ptx and rl.ptx_rows % parts:
        raise ConfigError(f"rl.ptx_rows is {rl.ptx_rows}; {parts} must divide it")
