"""Every knob of a run, as frozen dataclasses. A size has the name of its axis."""

import dataclasses
import math
from typing import Any

from k2jax.config.errors import ConfigError

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
DISPATCH = ("allgather", "alltoall", "alltoall_capacity")
# What values were called before, in saved configs and in scripts.
RENAMED = {
    "dispatch": {"gather": "allgather", "exchange": "alltoall", "bounded": "alltoall_capacity"},
}
NS_METHODS = ("standard", "gram")
NS_POLYNOMIALS = ("moonlight", "polar_express")  # those of optim.newton_schulz.POLYNOMIALS
MATRIX_VIEWS = ("whole", "per_head")
ON_SPIKE = ("log", "skip", "rewind")
TRACKERS = ("tensorboard", "wandb")
LEAST_WINDOW = 20  # losses from which a spike can be told


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
    dispatch: str = knob("allgather", f"how tokens meet their experts: {', '.join(DISPATCH)}")
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
