"""Every setting of a run, as frozen dataclasses of knobs. A size has the name of its axis."""

import dataclasses
import math

from k2jax.config.errors import ConfigError
from k2jax.config.knob import check_fields, knob

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
# What adapters can be trained for; `params.adapters` says which weights each word means.
LORA_TARGETS = ("attention", "q_a", "q_b", "q", "kv_a", "kv_b", "o", "dense", "shared", "experts")
LEAST_WINDOW = 20  # losses from which a spike can be detected
LEAST_EPS = 1e-18  # squares of gradients smaller than it are 0 in float32
LEAST_TAU = 1e-6

# Values of one setting that leave others without effect.
ADAMW = {"optim.name": "adamw"}
NO_YARN = {"model.yarn.factor": 1}
NO_LORA = {"lora.rank": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Context extension of the rotary frequencies; factor 1 is plain RoPE [JLE]."""

    factor: float = knob(1.0, "context extension; 1 is plain RoPE", low=1)
    beta_fast: float = knob(
        1.0, "rotations above which a frequency is kept", low=1e-6, unless=NO_YARN
    )
    beta_slow: float = knob(
        1.0, "rotations below which a frequency is divided by factor", low=1e-6, unless=NO_YARN
    )
    mscale: float = knob(1.0, "attention scale coefficient of cos and sin", unless=NO_YARN)
    mscale_all_dim: float = knob(
        1.0, "attention scale coefficient of the softmax; 0: none", unless=NO_YARN
    )
    context: int = knob(4096, "tokens of context before the extension", low=1, unless=NO_YARN)

    def __post_init__(self) -> None:
        """Reject what gives no frequencies."""
        check_fields("model.yarn", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network. The defaults are Kimi K2 [JLE, k2_config.json]."""

    vocab: int = knob(163_840, "tokens in the vocabulary", low=1)
    embed: int = knob(7_168, "width of the residual stream", low=1)
    dense_layers: int = knob(1, "leading layers with a dense MLP", low=0)
    moe_layers: int = knob(60, "layers with routed experts", low=1)
    heads: int = knob(64, "attention heads", low=1)
    q_rank: int = knob(1_536, "rank of the query projection; 0: a direct projection", low=0)
    kv_rank: int = knob(512, "rank of the key and value projection", low=1)
    nope: int = knob(128, "width of the content part of a head's queries and keys", low=1)
    rope: int = knob(64, "width of the rotary part of a head's queries and keys", low=1)
    value: int = knob(128, "width of a head's values", low=1)
    ffw: int = knob(18_432, "hidden width of a dense MLP", low=1, unless={"model.dense_layers": 0})
    mtp_layers: int = knob(
        0, "layers that each predict one token further ahead (MTP); K2 has none", low=0
    )
    experts: int = knob(384, "routed experts per layer", low=1)
    expert_ffw: int = knob(2_048, "hidden width of an expert", low=1)
    experts_per_token: int = knob(8, "routed experts that each token is sent to", low=1)
    shared_experts: int = knob(1, "experts that process every token, as one MLP", low=0)
    routed_scale: float = knob(2.827, "sum of a token's expert weights")
    groups: int = knob(1, "groups that the router divides the experts into", low=1)
    groups_per_token: int = knob(
        1, "groups that a token may choose experts from", low=1, unless={"model.groups": 1}
    )
    norm_eps: float = knob(
        1e-6, "epsilon of the outer norms; the inner ones always have 1e-6", above=0
    )
    rope_theta: float = knob(50_000.0, "base of the rotary frequencies", above=1)
    yarn: Yarn = Yarn()
    context: int = knob(131_072, "longest context in tokens", low=1)
    init_std: float = knob(0.02, "standard deviation of the initial matrices")

    def __post_init__(self) -> None:
        """Reject shapes that no mesh can rescue."""
        check_fields("model", self)
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
        if self.rope % 2:
            raise ConfigError(f"model.rope is {self.rope}; rotations need an even width")

    @property
    def layers(self) -> int:
        """Number of layers without the MTP layers."""
        return self.dense_layers + self.moe_layers

    @property
    def shared_ffw(self) -> int:
        """Hidden width of the shared experts' one MLP."""
        return self.shared_experts * self.expert_ffw

    @property
    def softmax_scale(self) -> float:
        """Factor on attention logits, including YaRN's mscale squared [JLE]."""
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
    rows: int = knob(8, "rows in a global batch", low=1)
    context: int = knob(4_096, "tokens per row", low=1)
    seed: int = knob(0, "seed of the order of rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move. Defaults are K2's where published [K2-TR], Moonlight's elsewhere [ML]."""

    name: str = knob("muonclip", "the optimizer", choices=OPTIMIZERS)
    learning_rate: float = knob(2e-4, "peak learning rate, the same for all weights", above=0)
    final_rate: float = knob(0.1, "last learning rate divided by the peak", low=0, high=1)
    warmup: int = knob(500, "steps of linear warm-up", low=0)
    decay: float = knob(0.35, "fraction of all steps in the final cosine decay", low=0, high=1)
    weight_decay: float = knob(0.1, "decoupled, norms included [ML, appendix D]", low=0)
    momentum: float = knob(0.95, "Muon's momentum (Nesterov)", low=0, high=1, unless=ADAMW)
    momentum_dtype: str = knob(
        "float32", "dtype in which Muon's momentum is stored", choices=DTYPES, unless=ADAMW
    )
    ns_dtype: str = knob(
        "bfloat16", "dtype of Muon's Newton-Schulz iteration", choices=DTYPES, unless=ADAMW
    )
    ns_method: str = knob(
        "standard",
        "how Newton-Schulz iterates (gram: fewer FLOPs)",
        choices=NS_METHODS,
        unless=ADAMW,
    )
    ns_polynomial: str = knob(
        "moonlight", "coefficients of Newton-Schulz", choices=NS_POLYNOMIALS, unless=ADAMW
    )
    matrix_view: str = knob(
        "whole",
        "how Muon sees q_b and kv_b, as one matrix or one per head",
        choices=MATRIX_VIEWS,
        unless=ADAMW,
    )
    b1: float = knob(0.9, "AdamW's first decay", low=0, high=1)
    b2: float = knob(0.95, "AdamW's second decay", low=0, high=1)
    eps: float = knob(1e-8, "AdamW's epsilon", low=LEAST_EPS)
    adam_scale: float = knob(
        1.0, "AdamW's learning rate divided by Muon's, in MuonClip", above=0, unless=ADAMW
    )
    tau: float = knob(
        100.0,
        "QK-Clip: attention logit above which a head is scaled down",
        low=LEAST_TAU,
        unless=ADAMW,
    )
    alpha: float = knob(
        0.5, "QK-Clip: share of the scaling that the queries take", low=0, high=1, unless=ADAMW
    )
    clip_norm: float = knob(0.0, "largest global gradient norm; 0: no clipping", low=0)
    bias_rate: float = knob(1e-3, "change of the router bias per step; 0: fixed", low=0)
    aux_loss: float = knob(0.0, "weight of the sequence-wise balance loss; 0: none", low=0)
    mtp_loss: float = knob(
        0.3,
        "weight of the loss of model.mtp_layers [DSV3-TR 4.2]",
        low=0,
        unless={"model.mtp_layers": 0},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, in which precision, and what to keep."""

    steps: int = knob(100, "optimizer steps of the whole run", low=1)
    seed: int = knob(0, "seed of the initial weights")
    dtype: str = knob("bfloat16", "compute dtype; weights are stored in float32", choices=DTYPES)
    grad_dtype: str = knob(
        "float32",
        "dtype in which gradients are communicated",
        choices=DTYPES,
        unless={"mesh.devices": 1},
    )
    remat: str = knob("full", "what the backward pass recomputes", choices=REMAT)
    accumulate: int = knob(1, "micro-batches per step", low=1)
    dispatch: str = knob(
        "allgather",
        "how tokens reach their experts",
        choices=DISPATCH,
        unless={"mesh.expert": 1},
    )
    buffer: float = knob(
        2.0,
        "rows that a device can receive in one exchange, divided by its even share",
        above=0,
        unless={"mesh.expert": 1, "train.dispatch": "allgather"},
    )
    eval_every: int = knob(100, "steps between held-out losses; 0: only at the end", low=0)
    eval_rows: int = knob(
        64, "held-out rows of each; the last one reads all", low=1, unless={"train.eval_every": 0}
    )
    save_every: int = knob(100, "steps between checkpoints; the last step is always saved", low=1)
    keep: int = knob(2, "newest checkpoints to keep", low=1)
    keep_every: int = knob(0, "keep checkpoints of multiples of this step for ever; 0: none", low=0)
    loads_every: int = knob(
        1, "steps between lines of metrics.jsonl that have the load of each expert", low=1
    )
    log_every: int = knob(10, "steps between printed lines where there is no terminal", low=1)
    log_to: str = knob("", "where to log too (several: a,b)", choices=TRACKERS, several=True)
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
    """When a step counts as bad, and what is done about it."""

    spike: float = knob(
        6.0, "deviations of the loss above the window's median that are a spike; 0: off", low=0
    )
    window: int = knob(
        100,
        "recent losses that median and deviation are computed from",
        low=LEAST_WINDOW,
        unless={"health.spike": 0},
    )
    on_spike: str = knob(
        "log", "what to do about a spike", choices=ON_SPIKE, unless={"health.spike": 0}
    )
    patience: int = knob(
        10, "skipped steps in a row, or rewinds to a checkpoint, that end the run", low=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: W + alpha / rank * A B learns A and B alone [Hu 2021]."""

    rank: int = knob(0, "rank of the adapters (LoRA); 0: all weights learn", low=0)
    alpha: float = knob(32.0, "adapters are scaled by alpha / rank", above=0, unless=NO_LORA)
    targets: str = knob(
        "attention",
        "what has adapters (several: a,b)",
        choices=LORA_TARGETS,
        several=True,
        unless=NO_LORA,
    )

    @property
    def scale(self) -> float:
        """Factor on the product of an adapter's two matrices."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices."""

    replica: int = knob(1, "copies of the weights, over the slow network", low=1)
    data: int = knob(1, "splits the batch, and the stored weights (FSDP)", low=1)
    expert: int = knob(1, "splits the experts; outside of them the batch", low=1)
    context: int = knob(1, "splits the sequence", low=1)
    model: int = knob(1, "splits heads, hidden widths and the vocabulary", low=1)

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
    lora: LoraConfig = LoraConfig()
