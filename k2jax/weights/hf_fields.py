"""Fields of a published `config.json` that change the numbers, and that k2jax does not have.

A config that sets one describes another model, whose weights may have the same names and shapes:
nothing else would show it. What is in no list here is taken to be harmless: settings of
generation, of training, of other programs.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from k2jax.config import ConfigError, yarn_scale

# What the architecture fixes, the usual value first. Absent fields mean that value.
FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
}
# Such fields are allowed if they are off; multipliers also if they are 1.
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
CHANGING = re.compile(
    r"""
    (use_)?sliding_window\w* | attention_chunk_size | window_size | local_attention\w*   # windows
    | index(er)?_\w+ | use_index\w* | sparse_attention\w* | nsa_\w+                      # sparse
    | linear_(attn|attention|key|value|num|conv)\w* | full_attention_interval | ssm_\w+ | mamba_\w+
    | \w*softcap\w* | attn_temperature_tuning | attention_sinks?\w* | \w*sink_bias
    | attn_output_gate
    | (use_)?qk_(layer)?norm\w* | query_pre_attn_scalar | attention_scale | attn_scale
    | (use_)?swiglu_\w+ | (clamp|swiglu|gate)_limit | activation_clamp\w*                # MLPs
    | (use|mlp|qkv|use_qkv|lm_head|moe|o|o_proj|linear|projection)_bias | add_bias_linear
    | mlp_only_layers | interleave_moe_layer_step | zero_expert_\w+ | apply_router_weight_on_input
    | no_rope_layers | no_rope_layer_interval | nope_layer_interval | mla_use_nope | use_nope
    | mrope_\w+ | rope_local_base_freq | (use_)?alibi | compress_\w+                     # positions
    | hc_\w+ | num_hash_layers | o_lora_rank | o_groups | mla_scale_\w+                  # others
    | use_bidirectional_attention | add_cross_attention | parallel_residual | use_parallel_residual
    | scale_depth | dim_model_base | layerscale\w* | (use_)?post_norm | sandwich_norm
    """,
    re.VERBOSE,
)
MULTIPLIER = re.compile(
    r"\w+_multiplier|logits?_scal(e|ing)|scale_emb\w*|embedding_scale|residual_scale"
    r"|partial_rotary_factor|rotary_pct|rope_pct|rope_ratio"
)
# Models that share most fields with DeepSeek-V3 and compute something else.
OTHER_MODELS = (
    "deepseek",
    "deepseek_v2",
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
)
ROPE = (
    "type",
    "rope_type",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rope_theta",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
    "finetuned",
)
CLOSE = 1e-6  # relative difference of two spellings of one number


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse a config of another architecture.

    Args:
        fields: of the text model's config.

    Raises:
        ConfigError: names the first field that k2jax does not carry out, and its value.
    """
    if fields.get("model_type") in OTHER_MODELS:
        raise ConfigError(
            f"config.json: model_type is {fields['model_type']!r}, another architecture than"
            " DeepSeek-V3's"
        )
    for name, allowed in FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"config.json: {name} is {fields[name]!r}; k2jax has {allowed[0]!r}")
    for name, value in fields.items():
        neutral = (*OFF, 1) if MULTIPLIER.fullmatch(name) else OFF
        idle = name.startswith("sliding_window") and fields.get("use_sliding_window") is False
        listed = CHANGING.fullmatch(name) or MULTIPLIER.fullmatch(name)
        if listed and value not in neutral and not idle:
            raise ConfigError(f"config.json: {name} is {_short(value)}; k2jax does not have that")
    _check_layers(fields)


def _check_layers(fields: Mapping[str, Any]) -> None:
    """Lists with a word for each layer say what our sizes say."""
    kinds = fields.get("layer_types") or []
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise ConfigError(
            f"config.json: layer_types has {other[0]!r}; k2jax has 'full_attention' alone"
        )
    mlps, dense = fields.get("mlp_layer_types"), fields.get("first_k_dense_replace")
    if mlps and mlps != ["dense" if i < (dense or 0) else "sparse" for i in range(len(mlps))]:
        raise ConfigError(
            f"config.json: mlp_layer_types does not fit first_k_dense_replace {dense}: dense"
            " layers must come first, and be as many"
        )
    content, rotary = fields.get("qk_nope_head_dim"), fields.get("qk_rope_head_dim")
    whole = fields.get("qk_head_dim")
    if whole is not None and whole != (content or 0) + (rotary or 0):
        raise ConfigError(
            f"config.json: qk_head_dim is {whole}; qk_nope_head_dim and qk_rope_head_dim make"
            f" {(content or 0) + (rotary or 0)}"
        )


def read_rope(fields: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The rotary base, and the fields of the context extension.

    Reads `rope_scaling` of the releases and `rope_parameters` of transformers 5.

    Raises:
        ConfigError: names a field that k2jax does not carry out, or two that contradict.
    """
    named = {n: fields[n] for n in ("rope_scaling", "rope_parameters") if fields.get(n)}
    name = next(iter(named), "rope_scaling")
    rope = dict(named.get(name, {}))
    if len(named) > 1 and _alike(rope) != _alike(named["rope_parameters"]):
        raise ConfigError("config.json: rope_scaling and rope_parameters say different things")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ConfigError(
            f"config.json: {name} differs by the kind of layer ({', '.join(nested)}); k2jax has one"
            " for all"
        )
    for key, value in rope.items():
        wrong = key not in ROPE and value not in OFF
        wrong |= key == "truncate" and value not in (None, True)
        wrong |= key == "partial_rotary_factor" and value not in (None, 1)
        if wrong:
            raise ConfigError(
                f"config.json: {name}.{key} is {_short(value)}; k2jax does not have that"
            )
    _check_pair(f"{name}.type", rope.get("type"), f"{name}.rope_type", rope.get("rope_type"))
    theta, inner = fields.get("rope_theta"), rope.get("rope_theta")
    _check_pair("rope_theta", theta, f"{name}.rope_theta", inner)
    theta = inner if theta is None else theta
    return 10_000.0 if theta is None else float(theta), rope


def check_attention_factor(rope: Mapping[str, Any], mscale: float, all_dim: float) -> None:
    """Refuse an explicit scale of cosine and sine that is not the one from `mscale`.

    Raises:
        ConfigError: it is another number.
    """
    asked, factor = rope.get("attention_factor"), float(rope["factor"])
    ours = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    if asked is None or (_is_number(asked) and math.isclose(asked, ours, rel_tol=CLOSE)):
        return
    raise ConfigError(
        f"config.json: attention_factor of the rotary embedding is {asked!r}; k2jax has {ours:.6g},"
        " which follows from factor, mscale and mscale_all_dim"
    )


def _alike(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Without differences of spelling alone."""
    kind = rope.get("type", rope.get("rope_type", "default"))
    names = ("type", "rope_type", "rope_theta")
    return {n: value for n, value in rope.items() if n not in names} | {"type": kind}


def _check_pair(first: str, a: Any, second: str, b: Any) -> None:
    if a is not None and b is not None and a != b:
        raise ConfigError(f"config.json: {first} is {a!r} and {second} is {b!r}; which is right?")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
