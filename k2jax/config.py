"""Every knob of a run, as frozen dataclasses. A size has the name of its axis.

This module imports nothing heavy, so that a mistake on the command line is answered at once.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Logical axes whose length follows from fields. Two arrays of one size that are laid out
# differently have two axis names.
DERIVED_AXES: dict[str, tuple[str, ...]] = {
    "qk": ("nope", "rope"),
    "kv": ("nope", "value"),
    "latent": ("kv_rank", "rope"),
    "router": ("experts",),
    "expert_embed": ("embed",),
    "gain": ("embed",),
    "joined": ("embed", "embed"),
    "q_latent": ("q_rank",),
    "kv_latent": ("kv_rank",),
    "q_gain": ("q_rank",),
    "kv_gain": ("kv_rank",),
    "heads_of_row": ("heads",),
}
MESH_AXES = ("replica", "data", "expert", "context", "model")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots", "offload")
OPTIMIZERS = ("muonclip", "adamw")
DISPATCH = ("gather", "exchange", "bounded")
NS_METHODS = ("standard", "gram")
NS_POLYNOMIALS = ("moonlight", "polar_express")  # those of optim.newton_schulz.POLYNOMIALS
MATRIX_VIEWS = ("whole", "per_head")
ON_SPIKE = ("log", "skip", "rewind")
TRACKERS = ("tensorboard", "wandb")
LEAST_WINDOW = 20  # losses from which a spike can be told


class ConfigError(ValueError):
    """A run was described in a way that cannot work; the message says what to change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def knob(default: Any, text: str) -> Any:
    """A dataclass field with its one-line explanation, shown by `k2jax train CONFIG --help`."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Context extension of the rotary frequencies; factor 1 is plain RoPE. Source: spec 1.6."""

    factor: float = knob(1.0, "context extension; 1 is plain RoPE")
    beta_fast: float = knob(1.0, "rotations above which a frequency is kept")
    beta_slow: float = knob(1.0, "rotations below which a frequency is divided by factor")
    mscale: float = knob(1.0, "attention scale coefficient of cos and sin")
    mscale_all_dim: float = knob(1.0, "attention scale coefficient of the softmax; 0: none")
    context: int = knob(4096, "tokens of context before the extension")

    def __post_init__(self) -> None:
        """Reject what gives no frequencies."""
        least = {"factor": 1, "beta_fast": 1e-6, "beta_slow": 1e-6, "context": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"model.yarn.{name} is {getattr(self, name)}; it must be at least {low}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network. The defaults are Kimi K2 [JLE, k2_config.json]."""

    vocab: int = knob(163_840, "tokens in the vocabulary")
    embed: int = knob(7_168, "width of the residual stream")
    dense_layers: int = knob(1, "leading layers with a dense MLP")
    moe_layers: int = knob(60, "layers with routed experts")
    heads: int = knob(64, "attention heads")
    q_rank: int = knob(1_536, "rank of the query projection; 0: a direct projection")
    kv_rank: int = knob(512, "rank of the key and value projection")
    nope: int = knob(128, "content part of a head's queries and keys")
    rope: int = knob(64, "rotary part of a head's queries and keys")
    value: int = knob(128, "width of a head's values")
    ffw: int = knob(18_432, "hidden width of a dense MLP")
    mtp_layers: int = knob(0, "layers that each predict one token further (MTP); K2 has none")
    experts: int = knob(384, "routed experts a layer")
    expert_ffw: int = knob(2_048, "hidden width of an expert")
    experts_per_token: int = knob(8, "routed experts that work on a token")
    shared_experts: int = knob(1, "experts that work on every token, as one MLP")
    routed_scale: float = knob(2.827, "what a token's expert weights sum to")
    groups: int = knob(1, "groups the experts are divided into for the choice")
    groups_per_token: int = knob(1, "groups a token may choose from")
    norm_eps: float = knob(1e-6, "epsilon of the outer norms; the inner ones always have 1e-6")
    rope_theta: float = knob(50_000.0, "base of the rotary frequencies")
    yarn: Yarn = Yarn()
    context: int = knob(131_072, "longest context in tokens")
    init_std: float = knob(0.02, "standard deviation of the initial matrices")

    def __post_init__(self) -> None:
        """Reject shapes no mesh can rescue."""
        for field in dataclasses.fields(self):
            optional = ("q_rank", "shared_experts", "dense_layers", "mtp_layers")
            least = 0 if field.name in optional else 1
            if field.type is int and getattr(self, field.name) < least:
                value = getattr(self, field.name)
                raise ConfigError(f"model.{field.name} is {value}; it must be at least {least}")
        if self.experts_per_token > self.experts * self.groups_per_token // self.groups:
            raise ConfigError(
                f"model.experts_per_token is {self.experts_per_token}; it must be in 1.."
                f"{self.experts * self.groups_per_token // self.groups}, the experts a token can"
                " choose from"
            )
        if self.experts % self.groups or self.groups_per_token > self.groups:
            raise ConfigError(
                f"model.groups is {self.groups}; it must divide experts ({self.experts}) and be"
                f" at least groups_per_token ({self.groups_per_token})"
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ConfigError(
                f"model.groups is {self.groups}; groups of {self.experts} experts must have at"
                " least 2 each"
            )
        if self.rope_theta <= 1:
            raise ConfigError(f"model.rope_theta is {self.rope_theta}; it must be more than 1")
        if self.rope % 2:
            raise ConfigError(f"model.rope is {self.rope}; rotations need an even width")

    @property
    def layers(self) -> int:
        """All layers but those that predict further, dense ones first."""
        return self.dense_layers + self.moe_layers

    @property
    def shared_ffw(self) -> int:
        """Hidden width of the shared experts' one MLP."""
        return self.shared_experts * self.expert_ffw

    @property
    def softmax_scale(self) -> float:
        """What attention logits are multiplied by, YaRN's mscale squared included [spec 1.6]."""
        scale = (self.nope + self.rope) ** -0.5
        return scale * yarn_scale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    def size(self, axis: str) -> int:
        """Length of a logical axis."""
        return sum(getattr(self, part) for part in DERIVED_AXES.get(axis, (axis,)))


def yarn_scale(factor: float, coefficient: float) -> float:
    """YaRN's m(s, a) = 0.1 a ln(s) + 1, or 1 without extension. Source: [JLE] 225-330."""
    return 1.0 if factor <= 1.0 else 0.1 * coefficient * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on and how it is cut into batches."""

    path: str = knob(
        "",
        "text, shards, a folder of them, folders of tokens (a:0.7,b:0.3); empty: Python's source",
    )
    tokenizer: str = knob("", "a tiktoken.model file or its folder; empty: trained on the spot")
    rows: int = knob(8, "rows in a global batch")
    context: int = knob(4_096, "tokens in a row")
    seed: int = knob(0, "orders the rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move. Defaults are K2's where published [K2-TR], Moonlight's elsewhere [ML]."""

    name: str = knob("muonclip", f"one of: {', '.join(OPTIMIZERS)}")
    learning_rate: float = knob(2e-4, "peak, the same for every group of weights")
    final_rate: float = knob(0.1, "last learning rate over the peak")
    warmup: int = knob(500, "steps of linear warm-up")
    decay: float = knob(0.35, "share of all steps in the closing cosine")
    weight_decay: float = knob(0.1, "decoupled, norms included [ML, appendix D]")
    momentum: float = knob(0.95, "Muon's momentum (Nesterov)")
    momentum_dtype: str = knob("float32", f"of Muon's momentum between steps: {', '.join(DTYPES)}")
    ns_dtype: str = knob("bfloat16", "dtype of Muon's Newton-Schulz iteration")
    ns_method: str = knob("standard", f"how it iterates: {', '.join(NS_METHODS)} (fewer FLOPs)")
    ns_polynomial: str = knob("moonlight", f"of its steps: {', '.join(NS_POLYNOMIALS)}")
    matrix_view: str = knob(
        "whole", f"q_b and kv_b as one matrix or one a head: {', '.join(MATRIX_VIEWS)}"
    )
    b1: float = knob(0.9, "AdamW's first decay")
    b2: float = knob(0.95, "AdamW's second decay")
    eps: float = knob(1e-8, "AdamW's epsilon")
    adam_scale: float = knob(1.0, "AdamW's steps over Muon's, where both are at work")
    tau: float = knob(100.0, "QK-Clip: largest attention logit before a head is shrunk")
    alpha: float = knob(0.5, "QK-Clip: share of a head's shrinking that its queries take, 0..1")
    clip_norm: float = knob(0.0, "largest global gradient norm; 0: no clipping")
    bias_rate: float = knob(1e-3, "router bias moved a step towards balance; 0: fixed")
    aux_loss: float = knob(0.0, "weight of the sequence-wise balance loss; 0: none")
    mtp_loss: float = knob(0.3, "weight of the loss of model.mtp_layers [DSV3-TR 4.2]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, in which precision, and what to keep."""

    steps: int = knob(100, "optimizer steps of the whole run")
    seed: int = knob(0, "draws the initial weights")
    dtype: str = knob("bfloat16", "compute dtype; weights are kept in float32")
    grad_dtype: str = knob("float32", f"that gradients travel in: {', '.join(DTYPES)}")
    remat: str = knob("full", f"what is recomputed in the backward pass: {', '.join(REMAT)}")
    accumulate: int = knob(1, "micro-batches a step")
    dispatch: str = knob("gather", f"how tokens meet their experts: {', '.join(DISPATCH)}")
    buffer: float = knob(2.0, "rows a device takes in one exchange, over its even share")
    eval_every: int = knob(100, "steps between held-out losses; 0: only at the end")
    eval_rows: int = knob(64, "held-out rows in each of them; the last one reads all")
    save_every: int = knob(100, "steps between checkpoints; the last step is always saved")
    keep: int = knob(2, "newest checkpoints kept")
    keep_every: int = knob(0, "steps it divides are kept for ever, if saved; 0: none")
    log_every: int = knob(10, "steps between printed lines where there is no terminal")
    log_to: str = knob("", f"also log to: {', '.join(TRACKERS)} (several: a,b)")
    profile: str = knob("", "steps to profile, FROM:TO (both included); empty: none")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `log_to`, each once."""
        return tuple(dict.fromkeys(name for name in self.log_to.split(",") if name))

    @property
    def profiled(self) -> range:
        """The steps in `profile`.

        Raises:
            ConfigError: it is not FROM:TO.
        """
        if not self.profile:
            return range(0)
        first, _, last = self.profile.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"train.profile is {self.profile!r}; give steps as FROM:TO, as 20:24")
        return range(int(first), int(last) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a step counts as sick, and what is done about it."""

    spike: float = knob(6.0, "loss over the window's median that is a spike, in deviations; 0: off")
    window: int = knob(100, "losses that median and deviation are of")
    on_spike: str = knob("log", f"what to do about a spike: {', '.join(ON_SPIKE)}")
    patience: int = knob(10, "skipped steps in a row, or rewinds to a checkpoint, that end the run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices."""

    replica: int = knob(1, "copies of the weights, over the slow network")
    data: int = knob(1, "batch, and storage of the weights (FSDP)")
    expert: int = knob(1, "experts; batch outside of them")
    context: int = knob(1, "sequence")
    model: int = knob(1, "heads, hidden widths, vocabulary")

    @property
    def shape(self) -> tuple[int, ...]:
        """In the order of MESH_AXES."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """By the name of the axis."""
        return dict(zip(MESH_AXES, self.shape, strict=True))

    @property
    def devices(self) -> int:
        """How many devices the mesh takes."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """Only the axes that split something: `data=2 expert=4`."""
        split = [f"{a}={n}" for a, n in self.sizes.items() if n > 1]
        return " ".join(split) or "one device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a model, its data, how it learns and how it is laid out."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    health: HealthConfig = HealthConfig()


def override(config: Any, settings: dict[str, str]) -> Any:
    """`config` with each `dotted.name: value` applied.

    Raises:
        ConfigError: unknown name (the closest one is given), or a value of the wrong type.
    """
    for name, value in settings.items():
        config = _set(config, name, name.split("."), value)
    return config


def _set(node: Any, full: str, path: list[str], value: str) -> Any:
    name, *rest = path
    kinds = typing.get_type_hints(type(node))
    names = [field.name for field in dataclasses.fields(node)]
    if name not in names:
        where = full.removesuffix("." + ".".join(rest)).rpartition(".")[0]
        raise ConfigError(f"{where or 'the run'} has no {name!r}; {nearest(name, names)}")
    old = getattr(node, name)
    if dataclasses.is_dataclass(old):
        if not rest:
            fields = ", ".join(field.name for field in dataclasses.fields(old))
            raise ConfigError(f"{full} is a section; set one of its fields: {fields}")
        new = _set(old, full, rest, value)
    elif rest:
        raise ConfigError(f"{full.removesuffix('.' + '.'.join(rest))} has no fields")
    else:
        new = _parse(full, value, kinds[name])
    return dataclasses.replace(node, **{name: new})


def _parse(name: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
    except ValueError:
        raise ConfigError(f"{name} is {kind.__name__}, {value!r} is not") from None
    if kind is float and not math.isfinite(number):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return number


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
    elif run.train.dispatch == "gather":
        idle = {"train.buffer": "train.dispatch gather"}
    if run.mesh.devices == 1:
        idle["train.grad_dtype"] = "one device"
    return idle


def to_json(run: Any) -> dict[str, Any]:
    """The config as plain numbers, strings and dicts; `from_json` reads it back."""
    return dataclasses.asdict(run)


def from_json(fields: dict[str, Any], kind: type = RunConfig) -> Any:
    """The config that `to_json` wrote.

    Raises:
        ConfigError: a field that this version does not know.
    """
    kinds = typing.get_type_hints(kind)
    for name in fields:
        if name not in kinds:
            raise ConfigError(f"saved config has an unknown field {name!r}; {nearest(name, kinds)}")
    nested = {
        name: from_json(value, kinds[name]) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return kind(**nested)


# Our field: the published one [JLE, k2_config.json].
PUBLISHED = {
    "vocab": "vocab_size", "embed": "hidden_size", "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads", "kv_rank": "kv_lora_rank", "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim", "value": "v_head_dim", "ffw": "intermediate_size",
    "experts": "n_routed_experts", "expert_ffw": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok", "routed_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps", "context": "max_position_embeddings",
}  # fmt: skip
# What the architecture fixes: a config that says otherwise describes another model.
FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,),
    "moe_layer_freq": (1,), "attention_bias": (False,), "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",), "tie_word_embeddings": (False,),
}  # fmt: skip


def from_published(fields: dict[str, Any]) -> ModelConfig:
    """The model that a published `config.json` describes.

    Reads both the releases' own fields and those that transformers 5 writes (`rope_parameters`).
    A multimodal config (K2.5) is read through its `text_config`.

    Raises:
        ConfigError: a missing field, or a value this architecture does not have.
    """
    fields = fields.get("text_config", fields)
    if not isinstance(fields, dict):
        raise ConfigError(f"config.json: text_config is {fields!r}; it must be an object")
    for name, allowed in FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; k2jax has {allowed[0]!r}")
    missing = [
        name for name in (*PUBLISHED.values(), "num_hidden_layers") if fields.get(name) is None
    ]
    if missing:
        raise ConfigError(f"config.json has no {missing[0]!r}; is it of the DeepSeek-V3 family?")
    _check_kinds(fields)
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = fields.get("rope_theta") or rope.get("rope_theta", 10_000.0)
    return ModelConfig(
        **{ours: fields[theirs] for ours, theirs in PUBLISHED.items()},
        moe_layers=fields["num_hidden_layers"] - fields["first_k_dense_replace"],
        q_rank=fields.get("q_lora_rank") or 0,
        shared_experts=fields.get("n_shared_experts") or 0,
        mtp_layers=fields.get("num_nextn_predict_layers") or 0,
        groups=fields.get("n_group") or 1,
        groups_per_token=fields.get("topk_group") or 1,
        rope_theta=float(theta),
        init_std=fields.get("initializer_range", 0.02),
        yarn=_published_yarn(rope),
    )


def _check_kinds(fields: dict[str, Any]) -> None:
    """Numbers are numbers, and sizes are whole."""
    kinds = typing.get_type_hints(ModelConfig)
    wanted = {theirs: kinds[ours] for ours, theirs in PUBLISHED.items()}
    whole = (
        "num_hidden_layers", "q_lora_rank", "n_shared_experts", "n_group", "topk_group",
        "num_nextn_predict_layers",
    )  # fmt: skip
    wanted |= dict.fromkeys(whole, int) | dict.fromkeys(("rope_theta", "initializer_range"), float)
    for name, kind in wanted.items():
        value = fields.get(name)
        right = (int,) if kind is int else (int, float)
        if value is not None and (not isinstance(value, right) or isinstance(value, bool)):
            noun = "a whole number" if kind is int else "a number"
            raise ConfigError(f"config.json: {name} is {value!r}; it must be {noun}")
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(fields.get(name) or {}, dict):
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; it must be an object")


def _published_yarn(rope: dict[str, Any]) -> Yarn:
    kind = rope.get("type", rope.get("rope_type", "default"))
    if kind in ("default", None):
        return Yarn()
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling.type is {kind!r}; k2jax has 'yarn'")
    numbers = [rope.get(n) for n in ("factor", "original_max_position_embeddings")]
    numbers += [rope.get(n) or 0 for n in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")]
    if not all(isinstance(n, (int, float)) for n in numbers):
        raise ConfigError(f"config.json: rope_scaling lacks a number: {rope}")
    return Yarn(
        factor=float(rope["factor"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        context=int(rope["original_max_position_embeddings"]),
    )


def to_published(model: ModelConfig) -> dict[str, Any]:
    """A `config.json` that `from_published` reads back, for a model trained here.

    It names DeepSeek-V3, the architecture of the whole family that every reader knows.
    """
    fields = {theirs: getattr(model, ours) for ours, theirs in PUBLISHED.items()}
    fields |= {name: allowed[0] for name, allowed in FIXED.items()}
    yarn = model.yarn
    scaling = {
        "type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.context,
    }  # fmt: skip
    return fields | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_hidden_layers": model.layers, "num_key_value_heads": model.heads,
        "q_lora_rank": model.q_rank or None, "n_shared_experts": model.shared_experts or None,
        "n_group": model.groups, "topk_group": model.groups_per_token,
        "rope_theta": model.rope_theta, "rope_scaling": scaling if yarn.factor > 1 else None,
        "initializer_range": model.init_std, "num_nextn_predict_layers": model.mtp_layers,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def read_published(path: str | Path) -> ModelConfig:
    """The model of a published folder or of its `config.json`.

    Raises:
        ConfigError: no such file, not JSON, or another architecture.
    """
    return from_published(published_fields(path))


def published_fields(path: str | Path) -> dict[str, Any]:
    """What a published folder's `config.json`, or the file itself, says.

    Raises:
        ConfigError: no such file, or no JSON object.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return fields
