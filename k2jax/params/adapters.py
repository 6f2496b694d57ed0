"""Low-rank adapters (LoRA) as parameters: which weights have one, and what its matrices are.

A weight `name` [in..., out...] with an adapter is `W + scale * A B`: `name.lora_a` [in..., rank]
and `name.lora_b` [rank, out...], one pair for each matrix of the stack. A begins as noise and B as
zeros, so a run begins with the base's own outputs [Hu 2021]. Read without jax.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from k2jax.config import ConfigError, LoraConfig
from k2jax.params.spec import ParamSpec

A, B = ".lora_a", ".lora_b"
RANK = "lora_rank"  # the axis between them, which no mesh splits
# The published modules of each word of `lora.targets`.
MODULES = {
    "attention": r"self_attn\..+_proj(_with_mqa)?",
    "q": r"self_attn\.q_proj",
    "q_a": r"self_attn\.q_a_proj",
    "q_b": r"self_attn\.q_b_proj",
    "kv_a": r"self_attn\.kv_a_proj_with_mqa",
    "kv_b": r"self_attn\.kv_b_proj",
    "o": r"self_attn\.o_proj",
    "dense": r"mlp\.(gate|up|down)_proj",
    "shared": r"mlp\.shared_experts\..+_proj",
    "experts": r"mlp\.experts\.\{e\}\..+_proj",
}


def declare_adapters(specs: Mapping[str, ParamSpec], lora: LoraConfig) -> dict[str, ParamSpec]:
    """Name and declaration of every adapter's matrices; none with rank 0.

    Layers of multi-token prediction have none: nothing that reads PEFT's files knows them.

    Args:
        specs: the parameters of the model.
        lora: rank, and which parameters.

    Raises:
        ConfigError: a target that this model does not have.
    """
    if not lora.rank:
        return {}
    pairs: dict[str, ParamSpec] = {}
    for word in filter(None, lora.targets.split(",")):
        module = re.compile(rf"model\.layers\.\{{l\}}\.{MODULES[word]}\.weight")
        names = [
            name
            for name, leaf in specs.items()
            if module.fullmatch(leaf.published) and "mtp_layers" not in leaf.axes
        ]
        if not names:
            raise ConfigError(f"lora.targets names {word!r}, which this model does not have")
        for name in names:
            pairs[name + A], pairs[name + B] = declare_pair(specs[name], lora.rank)
    return dict(sorted(pairs.items()))


def declare_pair(leaf: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """Declare the two matrices of one weight's adapter."""
    middle = leaf.stacked + leaf.contracted
    module = leaf.published.removesuffix(".weight")
    common = dataclasses.replace(leaf, group="muon", dtype="float32", copies=())
    a = dataclasses.replace(
        common,
        axes=(*leaf.axes[:middle], RANK),
        shape=(*leaf.shape[:middle], rank),
        published=f"{module}.lora_A.weight",
    )
    b = dataclasses.replace(
        common,
        axes=(*leaf.axes[: leaf.stacked], RANK, *leaf.axes[middle:]),
        shape=(*leaf.stack, rank, *leaf.shape[middle:]),
        contracted=1,
        published=f"{module}.lora_B.weight",
        init="zeros",
    )
    return a, b


def adapted_names(names: Iterable[str]) -> list[str]:
    """Names of the weights that have an adapter among these parameters."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def is_adapter(name: str) -> bool:
    """Whether a parameter is a part of an adapter."""
    return name.endswith((A, B))


def freeze(specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The same parameters, moved by nothing."""
    return {name: dataclasses.replace(leaf, group="frozen") for name, leaf in specs.items()}
