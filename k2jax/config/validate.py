"""Rules that span fields. Choices, bounds and settings without effect are the knobs' own."""

from collections.abc import Iterable

from k2jax.config.errors import ConfigError
from k2jax.config.knob import check_fields, each_knob
from k2jax.config.schema import RunConfig


def validate(run: RunConfig, settings: Iterable[str] = ()) -> None:
    """Check a run; `settings` names what the user set.

    Raises:
        ConfigError: an impossible value, or a setting that has no effect in this run.
    """
    for section in ("data", "optim", "train", "mesh", "health", "lora"):  # a model checks itself
        check_fields(section, getattr(run, section))
    if run.data.context > run.model.context:
        raise ConfigError(
            f"data.context is {run.data.context}; the model's longest context is"
            f" {run.model.context}"
        )
    if run.model.mtp_layers and not run.optim.mtp_loss:
        raise ConfigError(
            f"optim.mtp_loss is {run.optim.mtp_loss}; it must be above 0 to train"
            f" model.mtp_layers ({run.model.mtp_layers}), or set those to 0"
        )
    if run.lora.rank and not run.lora.targets.strip(","):
        raise ConfigError("lora.targets is empty; it must name what has adapters")
    if run.train.profiled and run.train.profiled[-1] > run.train.steps:
        raise ConfigError(
            f"train.profile is {run.train.profile!r}; the run ends with step {run.train.steps}"
        )
    _check_rows(run)
    knobs = {name: each for name, each, _ in each_knob(run)}
    for name in sorted(set(settings) & set(knobs)):
        if cause := knobs[name].describe_idleness(run):
            raise ConfigError(f"{name} has no effect with {cause}")


def _check_rows(run: RunConfig) -> None:
    """Refuse a batch that the mesh and the micro-batches do not divide."""
    mesh, accumulate, rows = run.mesh, run.train.accumulate, run.data.rows
    spread = mesh.replica * mesh.data * mesh.expert
    step = spread * accumulate
    if rows % step:
        lower = max(step, rows // step * step)
        raise ConfigError(
            f"data.rows is {rows}; replica x data x expert ({spread}) x train.accumulate"
            f" ({accumulate}) must divide it: {lower} or {lower + step} would do"
        )
