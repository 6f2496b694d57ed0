"""Rules that span fields: an impossible value, a setting without effect."""

import dataclasses
from collections.abc import Iterable

from k2jax.config.errors import ConfigError, nearest
from k2jax.config.schema import (
    DISPATCH,
    DTYPES,
    LEAST_WINDOW,
    MATRIX_VIEWS,
    NS_METHODS,
    NS_POLYNOMIALS,
    ON_SPIKE,
    OPTIMIZERS,
    REMAT,
    TRACKERS,
    RunConfig,
    Yarn,
)


def validate(run: RunConfig, settings: Iterable[str] = ()) -> None:
    """Check what spans fields; `settings` names what the user set.

    Raises:
        ConfigError: an impossible value, or a setting that has no effect in this run.
    """
    _validate_choices(run)
    data, train, mesh = run.data, run.train, run.mesh
    least = {
        "data.rows": data.rows, "data.context": data.context, "train.steps": train.steps,
        "train.accumulate": train.accumulate, "train.save_every": train.save_every,
        "train.keep": train.keep, "train.log_every": train.log_every,
        "train.eval_rows": train.eval_rows,
    }  # fmt: skip
    least |= {f"mesh.{axis}": size for axis, size in mesh.sizes.items()}
    for name, value in least.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if data.context > run.model.context:
        raise ConfigError(
            f"data.context is {data.context}; the model's longest context is {run.model.context}"
        )
    if train.buffer <= 0:
        raise ConfigError(f"train.buffer is {train.buffer}; it must be more than 0")
    _validate_optim(run)
    spread = mesh.replica * mesh.data * mesh.expert
    micro = data.rows // train.accumulate
    if data.rows % train.accumulate or micro % spread:
        step = spread * train.accumulate
        lower = max(step, data.rows // step * step)
        raise ConfigError(
            f"data.rows is {data.rows}; replica x data x expert ({spread}) x train.accumulate"
            f" ({train.accumulate}) must divide it: {lower} or {lower + step} would do"
        )
    _validate_upkeep(run)
    _validate_effects(run, set(settings))


def _validate_optim(run: RunConfig) -> None:
    optim = run.optim
    if optim.learning_rate <= 0 or not 0 <= optim.decay <= 1 or optim.warmup < 0:
        raise ConfigError(
            "optim needs learning_rate > 0, decay in 0..1 and warmup >= 0; they are"
            f" {optim.learning_rate}, {optim.decay} and {optim.warmup}"
        )
    for name in ("alpha", "momentum", "b1", "b2", "final_rate"):
        if not 0 <= getattr(optim, name) <= 1:
            raise ConfigError(f"optim.{name} is {getattr(optim, name)}; it must be in 0..1")
    for name in ("weight_decay", "clip_norm", "bias_rate", "aux_loss", "mtp_loss", "eps"):
        if not getattr(optim, name) >= 0:
            raise ConfigError(f"optim.{name} is {getattr(optim, name)}; it must be at least 0")
    for name in ("tau", "adam_scale"):
        if not getattr(optim, name) > 0:
            raise ConfigError(f"optim.{name} is {getattr(optim, name)}; it must be more than 0")
    if run.model.mtp_layers and optim.mtp_loss <= 0:
        raise ConfigError(
            f"optim.mtp_loss is {optim.mtp_loss}; it must be above 0 to train model.mtp_layers"
            f" ({run.model.mtp_layers}), or set those to 0"
        )


def _validate_upkeep(run: RunConfig) -> None:
    health, train = run.health, run.train
    for name in ("keep_every", "eval_every"):
        if getattr(train, name) < 0:
            raise ConfigError(f"train.{name} is {getattr(train, name)}; it must be at least 0")
    least = {"spike": 0, "window": LEAST_WINDOW, "patience": 1}
    for name, low in least.items():
        if getattr(health, name) < low:
            raise ConfigError(
                f"health.{name} is {getattr(health, name)}; it must be at least {low}"
            )
    for name in train.trackers:
        if name not in TRACKERS:
            raise ConfigError(f"train.log_to names {name!r}; {nearest(name, TRACKERS)}")
    if train.profiled and train.profiled[-1] > train.steps:
        raise ConfigError(
            f"train.profile is {train.profile!r}; the run ends with step {train.steps}"
        )


def _validate_choices(run: RunConfig) -> None:
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "train.dtype": (run.train.dtype, DTYPES),
        "train.grad_dtype": (run.train.grad_dtype, DTYPES),
        "train.remat": (run.train.remat, REMAT),
        "train.dispatch": (run.train.dispatch, DISPATCH),
        "optim.name": (run.optim.name, OPTIMIZERS),
        "optim.momentum_dtype": (run.optim.momentum_dtype, DTYPES),
        "optim.ns_dtype": (run.optim.ns_dtype, DTYPES),
        "optim.ns_method": (run.optim.ns_method, NS_METHODS),
        "optim.ns_polynomial": (run.optim.ns_polynomial, NS_POLYNOMIALS),
        "optim.matrix_view": (run.optim.matrix_view, MATRIX_VIEWS),
        "health.on_spike": (run.health.on_spike, ON_SPIKE),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; {nearest(value, known)}")


def _validate_effects(run: RunConfig, settings: set[str]) -> None:
    """A setting that does nothing in this run is a mistake, not a shrug."""
    idle: dict[str, str] = {}
    if run.optim.name == "adamw":
        muons = (
            "momentum", "momentum_dtype", "ns_dtype", "ns_method", "ns_polynomial", "matrix_view",
            "adam_scale", "tau", "alpha",
        )  # fmt: skip
        idle |= {f"optim.{name}": "optim.name adamw" for name in muons}
    if run.model.yarn.factor == 1.0:
        yarn = (f"model.yarn.{f.name}" for f in dataclasses.fields(Yarn) if f.name != "factor")
        idle |= dict.fromkeys(yarn, "model.yarn.factor 1")
    if run.model.groups == 1:
        idle["model.groups_per_token"] = "model.groups 1"
    if run.model.dense_layers == 0:
        idle["model.ffw"] = "model.dense_layers 0"
    idle |= _idle_between_devices(run)
    if run.model.mtp_layers == 0:
        idle["optim.mtp_loss"] = "model.mtp_layers 0"
    if run.train.eval_every == 0:
        idle["train.eval_rows"] = "train.eval_every 0"
    if run.health.spike == 0:
        idle |= dict.fromkeys(("health.window", "health.on_spike"), "health.spike 0")
    for name in sorted(settings & set(idle)):
        raise ConfigError(f"{name} has no effect with {idle[name]}")


def _idle_between_devices(run: RunConfig) -> dict[str, str]:
    idle: dict[str, str] = {}
    if run.mesh.expert == 1:
        idle = dict.fromkeys(("train.dispatch", "train.buffer"), "mesh.expert 1")
    elif run.train.dispatch == "allgather":
        idle = {"train.buffer": "train.dispatch allgather"}
    if run.mesh.devices == 1:
        idle["train.grad_dtype"] = "one device"
    return idle
