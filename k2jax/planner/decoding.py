"""One call of inference on a mesh: memory, time, and what bounds it.

A call reads chunks of sequences: one token in every row where they decode, a block of a prompt
where they are read, the same with logits of all tokens where text is scored.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator

from k2jax.config import ConfigError, MeshConfig, ModelConfig
from k2jax.ops.limits import ALIGNED, ONE_ROUND
from k2jax.params import low_bit_parts
from k2jax.params.counts import count_flops
from k2jax.params.kimi import declare_kimi
from k2jax.params.spec import ParamSpec
from k2jax.planner import network
from k2jax.planner.network import Wire
from k2jax.planner.roofline import Roofline
from k2jax.planner.targets import Target
from k2jax.sharding.table import INFERENCE_AXES, INFERENCE_LAYOUT, split

BF16 = 2  # bytes of a plain weight and of a cached number
BYTES = {"bfloat16": 2, "float32": 4, "int32": 4, "float8_e4m3fn": 1}
WEIGHTS = {"bf16": "plain", "fp8": "fp8", "int4": "int4"}  # of --weights: form of a parameter
PAGE = 64  # tokens
KEY_BLOCK = 128  # keys that queries meet at a time
# Assumed: a collective of few bytes takes so long whatever it carries. NCCL's are 10 to 30 us.
LATENCY = 10e-6
# tpu7x: its compiler wants bfloat16 in tiles of 16 rows and gets arguments in tiles of 8, so that
# every call copies the stacks of layers. A layout that it chose (`Layout.AUTO`) was the same, and
# with xla_tpu_enable_large_2nd_minor_layout_for_x16 off it did not end (libtpu 0.0.42.1).
RETILES = "tpu7x"


@dataclasses.dataclass(frozen=True)
class Call:
    """What is computed.

    Attributes:
        model: sizes.
        mesh: devices along `replica`, `expert` and `model`.
        target: of which they are.
        chunks: of the call, on all devices.
        tokens: of a chunk; 1: it decodes.
        context: tokens of a sequence that the cache has room for.
        form: of the weights, a value of `WEIGHTS`.
        scored: whether all tokens' logits are wanted, not each chunk's last.
        sequences: that the cache has room for; 0: as many as chunks.
    """

    model: ModelConfig
    mesh: MeshConfig
    target: Target
    chunks: int
    tokens: int
    context: int
    form: str = "plain"
    scored: bool = False
    sequences: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of a mesh for inference."""
        return {axis: self.mesh.sizes[axis] for axis in INFERENCE_AXES}

    @property
    def rows(self) -> float:
        """Tokens of a device outside of attention; devices along `model` have the same."""
        return self.chunks * self.tokens / (self.mesh.replica * self.mesh.expert)

    @property
    def wanted(self) -> int:
        """Tokens of all devices whose logits are computed."""
        return self.chunks * (self.tokens if self.scored else 1)

    @property
    def wanted_here(self) -> float:
        """Those of a device."""
        return self.wanted / (self.mesh.replica * self.mesh.expert)

    @property
    def keys(self) -> float:
        """Keys that a token meets: all where it decodes, else half of them on average."""
        return self.context if self.tokens == 1 else self.context / 2

    @property
    def pages(self) -> int:
        """Of a device's part of the pool, one of them scratch."""
        rows = -(-(self.sequences or self.chunks) // self.mesh.devices)
        return rows * -(-self.context // PAGE) + 1

    @property
    def buffer_rows(self) -> int:
        """Rows that a device's experts receive at a time."""
        pairs = int(self.rows * self.model.experts_per_token)
        if self.mesh.expert == 1:
            return pairs
        share = -(-2 * pairs // ALIGNED) * ALIGNED
        return min(max(share, ONE_ROUND), pairs * self.mesh.expert)


@dataclasses.dataclass(frozen=True)
class Decode(Roofline):
    """A call on one device; bytes, operations, seconds."""

    call: Call
    memory: dict[str, float]
    flops: float
    memory_traffic: float
    wire: Wire
    collectives: int

    @property
    def mesh(self) -> MeshConfig:
        """Of the devices."""
        return self.call.mesh

    @property
    def target(self) -> Target:
        """The machines."""
        return self.call.target

    @property
    def peak(self) -> float:
        """Bytes held."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether they fit the device."""
        return self.peak <= self.target.hbm

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds of each resource, and what collectives take that carry nothing."""
        return {
            "compute": self.flops / self.target.flops,
            "memory": self.memory_traffic / self.target.bandwidth,
            "network": network.seconds(self.wire, self.mesh, self.target),
            "latency": LATENCY * self.collectives,
        }

    @property
    def seconds(self) -> float:
        """Nothing hides the network."""
        return super().seconds + self.roofline["latency"]


def decode(call: Call) -> Decode:
    """The plan of a call. Weights rest where they are used; absorbed attention reads latents."""
    cfg = dataclasses.replace(call.model, mtp_layers=0)  # no part of decoding token by token
    call = dataclasses.replace(call, model=cfg)
    specs = declare_kimi(cfg)
    forms = low_bit_parts.forms_of(specs, call.form)
    held = {name: _held(leaf, forms[name], call) for name, leaf in specs.items()}
    cache = BF16 * cfg.layers * call.pages * PAGE * _lanes(cfg.kv_rank + cfg.rope, call.target)
    routed = sum(n for name, n in held.items() if specs[name].routed)
    # Experts that any of the choices in a replica falls on, were they even.
    tokens = call.chunks * call.tokens / call.mesh.replica
    chosen = 1 - (1 - cfg.experts_per_token / cfg.experts) ** tokens
    read = sum(held.values()) - held["embed"] - routed * (1 - chosen)
    attended = call.rows / call.mesh.model * call.keys * cfg.layers * (cfg.kv_rank + cfg.rope)
    latents = BF16 * attended / (1 if call.tokens == 1 else KEY_BLOCK)
    counted = count_flops(cfg, call.context)
    head = 2 * cfg.embed * cfg.vocab
    absorbed = counted["absorbed_attention_flops_per_token_per_key"]
    flops = call.rows * (counted["matmul_flops_per_token"] - head + absorbed * call.keys)
    temporaries = _temporaries(call)
    plain = (n for name, n in held.items() if forms[name] == "plain" and name.startswith("layers."))
    copied = sum(plain) if call.target.generation == RETILES else 0.0
    wire, collectives = _wire(call)
    return Decode(
        call=call,
        memory={
            "weights": sum(held.values()),
            "cache": cache,
            "temporaries": temporaries + copied,
        },
        flops=(flops + head * call.wanted_here) / call.mesh.model,
        memory_traffic=read
        + latents
        + 2 * copied
        + 2 * temporaries * (1 if call.tokens == 1 else cfg.layers),
        wire=wire,
        collectives=collectives,
    )


def _held(leaf: ParamSpec, form: str, call: Call) -> float:
    """Bytes of a parameter on a device, with what TPUs pad."""
    if form == "plain":
        return BF16 * _device_size(leaf, call)
    parts = low_bit_parts.parts_of(leaf, form).values()
    return sum(BYTES[part.dtype] * _device_size(part, call) for part in parts)


def _device_size(leaf: ParamSpec, call: Call) -> float:
    shape = [
        size // math.prod(call.sizes[name] for name in split(axis, call.sizes))
        for axis, size in zip(leaf.axes, leaf.shape, strict=True)
    ]
    shape[-1] = _lanes(shape[-1], call.target)
    return float(math.prod(shape))


def _lanes(size: int, target: Target) -> int:
    """TPUs keep a last dim in whole lanes of 128."""
    return -(-size // 128) * 128 if target.chip.kind == "tpu" else size


def _temporaries(call: Call) -> float:
    """Bytes of the largest moment: experts, attention or logits."""
    cfg, model = call.model, call.mesh.model
    latent, own = cfg.kv_rank + cfg.rope, call.rows / model
    experts = BF16 * call.buffer_rows * (cfg.embed + 3 * cfg.expert_ffw / model)
    if call.mesh.expert > 1:  # results too, and both where the tokens are
        experts += BF16 * (call.buffer_rows + 2 * call.rows * cfg.experts_per_token) * cfg.embed
    heads = own * cfg.heads
    attention = heads * (2 * BF16 * latent + 8 * cfg.kv_rank + 10 * KEY_BLOCK)
    logits = 6 * call.wanted_here * cfg.vocab / model
    return 6 * call.rows * cfg.embed + max(experts, attention, logits)


def _wire(call: Call) -> tuple[Wire, int]:
    """Bytes that a device sends, and the number of collectives."""
    cfg, mesh, rows = call.model, call.mesh, call.rows
    wire: Wire = {}
    count = 0

    def add(kind: str, axes: list[str], size: float, times: int) -> None:
        nonlocal count
        network.add(wire, kind, axes, mesh, times * size)
        count += times if network.group(axes, mesh)[1] > 1 else 0

    pairs = rows * cfg.experts_per_token
    add("ragged-all-to-all", ["expert"], BF16 * pairs * cfg.embed, 2 * cfg.moe_layers)
    add("ragged-all-to-all", ["expert"], 4 * pairs, cfg.moe_layers)  # weights of the choices
    add("all-gather", ["expert"], 4 * cfg.experts * mesh.expert, cfg.moe_layers)  # their counts
    # Sums of float32 accumulators: attention, and experts with the shared ones.
    add("all-reduce", ["model"], 4 * rows * cfg.embed, 2 * cfg.layers)
    if call.target.chip.kind != "tpu":  # TPUs add routed and shared experts before they sum
        add("all-reduce", ["model"], BF16 * rows * cfg.embed, cfg.moe_layers)
    add("all-reduce", ["model"], BF16 * rows * cfg.embed, 1)  # rows of the table
    heads = BF16 * rows * cfg.heads / mesh.model
    add("all-to-all", ["model"], heads * (cfg.kv_rank + cfg.rope), cfg.layers)
    add("all-to-all", ["model"], heads * cfg.kv_rank, cfg.layers)
    picked = BF16 * call.wanted * cfg.embed
    add("reduce-scatter", ["replica", "expert"], picked, 1)
    return wire, count


def best(calls: Iterable[Call], prefill: int = 0) -> list[Decode]:
    """Plans, best first; those that do not fit last, nearest first.

    Args:
        calls: that decode.
        prefill: tokens of prompts; the time of a call that reads them counts too.
    """
    plans = []
    for call in calls:
        plan = decode(call)
        reads = decode(prompt_call(call, prefill)) if prefill else None
        fits = plan.fits and (reads is None or reads.fits)
        seconds = plan.seconds + (reads.seconds if reads else 0.0)
        plans.append((not fits, seconds if fits else plan.peak, plan))
    return [plan for *_, plan in sorted(plans, key=operator.itemgetter(0, 1))]


def divides(cfg: ModelConfig, mesh: MeshConfig, target: Target) -> bool:
    """Whether the mesh is one for inference and divides the model.

    TPUs would copy all experts whose hidden width is not in whole lanes.
    """
    width = cfg.expert_ffw // mesh.model
    if mesh.data > 1 or mesh.context > 1 or width != _lanes(width, target):
        return False
    sizes = {axis: mesh.sizes[axis] for axis in INFERENCE_AXES}
    logical = [axis for axis in INFERENCE_LAYOUT if axis not in ("batch", "cache")]
    return not any(
        cfg.size(axis) % math.prod(sizes[name] for name in split(axis, sizes))
        for axis in logical
        if axis != "ffw" or cfg.dense_layers
    )


def decode_calls(
    cfg: ModelConfig,
    meshes: Iterable[MeshConfig],
    target: Target,
    batch: int,
    context: int,
    form: str,
) -> Iterator[Call]:
    """Calls that decode, one for each mesh that divides the model and the batch."""
    for mesh in meshes:
        if divides(cfg, mesh, target) and batch % mesh.devices == 0:
            yield Call(cfg, mesh, target, batch, 1, context, form)


def prompt_call(decoded: Call, tokens: int, scored: bool = False) -> Call:
    """The call that reads so many tokens of prompts, a chunk on each device, beside the same cache.

    Raises:
        ConfigError: the devices do not divide them, or a chunk is longer than a sequence.
    """
    devices = decoded.mesh.devices
    if tokens % devices or tokens // devices > decoded.context:
        most = devices * decoded.context
        raise ConfigError(
            f"--prefill is {tokens}; it must be a multiple of the {devices} devices, at most {most}"
        )
    return dataclasses.replace(
        decoded,
        chunks=devices,
        tokens=tokens // devices,
        scored=scored,
        sequences=decoded.chunks,
    )
