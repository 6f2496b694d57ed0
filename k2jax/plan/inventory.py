"""Every parameter of a model, from its config alone.

The declarations in `k2jax.model` say the same; reading them takes seconds of imports, which a
search over meshes on the command line has not. A test holds the two together.
"""

import functools
import math
from collections.abc import Iterator

from k2jax.config import MeshConfig, ModelConfig
from k2jax.params.spec import ParamSpec
from k2jax.sharding.table import STORAGE, TRAIN, split

STACKS = {"dense": "dense_layers", "layers": "moe_layers", "mtp": "mtp_layers"}
# What an MTP layer has besides a mixture layer.
JOIN = (
    ("embed_norm", "gain", 0),
    ("hidden_norm", "gain", 0),
    ("join", "joined embed", 1),
    ("norm", "gain", 0),
)


@functools.cache
def leaves(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Name and declaration of every parameter, published names left out."""
    return {
        name: ParamSpec(
            axes=tuple(axes.split()),
            shape=tuple(map(cfg.size, axes.split())),
            contracted=contracted,
            group=group,
            published="",
        )
        for name, axes, contracted, group in _rows(cfg)
    }


def _rows(cfg: ModelConfig) -> Iterator[tuple[str, str, int, str]]:
    yield "embed", "vocab embed", 0, "adam"
    for stack, axis in STACKS.items():
        if not cfg.size(axis):
            continue
        rows = (*_attention(cfg), *_feed_forward(cfg, stack), *(JOIN if stack == "mtp" else ()))
        for name, axes, contracted in rows:
            group = "bias" if name == "moe.bias" else "muon" if contracted else "adam"
            yield f"{stack}.{name}", f"{axis} {axes}", contracted, group
    yield "norm", "gain", 0, "adam"
    yield "head", "embed vocab", 1, "adam"


def _attention(cfg: ModelConfig) -> Iterator[tuple[str, str, int]]:
    yield "attention_norm", "gain", 0
    if cfg.q_rank:
        yield "attention.q_down", "embed q_rank", 1
        yield "attention.q_norm", "q_gain", 0
        yield "attention.q_up", "q_latent heads qk", 1
    else:
        yield "attention.q", "embed heads qk", 1
    yield "attention.kv_down", "embed latent", 1
    yield "attention.kv_norm", "kv_gain", 0
    yield "attention.kv_up", "kv_latent heads kv", 1
    yield "attention.out", "heads value embed", 2
    yield "mlp_norm", "gain", 0


def _feed_forward(cfg: ModelConfig, stack: str) -> Iterator[tuple[str, str, int]]:
    if stack == "dense":
        yield from _mlp("mlp", "embed", "ffw")
        return
    yield "moe.router", "embed router", 1
    yield "moe.bias", "router", 0
    yield from _mlp("moe.experts", "expert_embed", "expert_ffw", "experts ")
    if cfg.shared_experts:
        yield from _mlp("moe.shared", "embed", "shared_ffw")


def _mlp(name: str, width: str, hidden: str, stack: str = "") -> Iterator[tuple[str, str, int]]:
    yield f"{name}.gate", f"{stack}{width} {hidden}", 1
    yield f"{name}.up", f"{stack}{width} {hidden}", 1
    yield f"{name}.down", f"{stack}{hidden} {width}", 1


def ways(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> int:
    """Into how many parts the mesh cuts a parameter; `gathered`: while it is used."""
    return math.prod([getattr(mesh, axis) for axis in mesh_axes(leaf, mesh, gathered)])


def mesh_axes(leaf: ParamSpec, mesh: MeshConfig, gathered: bool = False) -> tuple[str, ...]:
    """Mesh axes that split a parameter."""
    return _mesh_axes(leaf.axes, mesh, gathered)


@functools.cache
def _mesh_axes(axes: tuple[str, ...], mesh: MeshConfig, gathered: bool) -> tuple[str, ...]:
    kept = [axis for axis in axes if not (gathered and axis in STORAGE)]
    return tuple(name for axis in kept for name in split(axis, mesh.sizes))


@functools.cache
def size(leaf: ParamSpec) -> int:
    """Numbers in a parameter."""
    return math.prod(leaf.shape)


def indivisible_axis(cfg: ModelConfig, mesh: MeshConfig, context: int) -> str:
    """Why the mesh does not divide the model: the logical axis; empty where it does."""
    sizes = mesh.sizes
    for axis in TRAIN:
        if axis == "batch" or (axis == "ffw" and not cfg.dense_layers):
            continue
        size = context if axis == "length" else cfg.size(axis)
        if size % math.prod(sizes[name] for name in split(axis, sizes)):
            return axis
    return ""
