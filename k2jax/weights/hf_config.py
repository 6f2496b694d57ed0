"""A published `config.json` and our `ModelConfig`, both ways."""

import json
import math
import typing
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError, ModelConfig, Yarn
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign
from k2jax.weights.hf_fields import FIXED, check_attention_factor, check_fields, read_rope

# Our field: the published one [JLE, k2_config.json].
PUBLISHED = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "kv_rank": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "ffw": "intermediate_size",
    "experts": "n_routed_experts",
    "expert_ffw": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "routed_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
    "context": "max_position_embeddings",
}


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
    check_fields(fields)
    missing = [
        name for name in (*PUBLISHED.values(), "num_hidden_layers") if fields.get(name) is None
    ]
    if missing:
        raise ConfigError(f"config.json has no {missing[0]!r}; is it of the DeepSeek-V3 family?")
    _check_kinds(fields)
    theta, rope = read_rope(fields)
    return ModelConfig(
        **{ours: fields[theirs] for ours, theirs in PUBLISHED.items()},
        moe_layers=fields["num_hidden_layers"] - fields["first_k_dense_replace"],
        q_rank=fields.get("q_lora_rank") or 0,
        shared_experts=fields.get("n_shared_experts") or 0,
        mtp_layers=fields.get("num_nextn_predict_layers") or 0,
        groups=fields.get("n_group") or 1,
        groups_per_token=fields.get("topk_group") or 1,
        rope_theta=theta,
        init_std=fields.get("initializer_range", 0.02),
        yarn=_published_yarn(rope),
    )


def _check_kinds(fields: dict[str, Any]) -> None:
    """Numbers are numbers, and sizes are whole."""
    kinds = typing.get_type_hints(ModelConfig)
    wanted = {theirs: kinds[ours] for ours, theirs in PUBLISHED.items()}
    whole = (
        "num_hidden_layers",
        "q_lora_rank",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "num_nextn_predict_layers",
    )
    wanted |= dict.fromkeys(whole, int) | dict.fromkeys(("rope_theta", "initializer_range"), float)
    for name, kind in wanted.items():
        value = fields.get(name)
        right = (int,) if kind is int else (int, float)
        if value is not None and (not isinstance(value, right) or isinstance(value, bool)):
            noun = "a whole number" if kind is int else "a number"
            raise ConfigError(f"config.json: {name} is {value!r}; it must be {noun}")
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"config.json: {name} is {value}; it must be finite")
    if fields["rms_norm_eps"] <= 0:
        raise ConfigError(
            f"config.json: rms_norm_eps is {fields['rms_norm_eps']}; it must be more than 0"
        )
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
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ConfigError(f"config.json: rope_scaling lacks a number: {rope}")
    yarn = Yarn(
        factor=float(rope["factor"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        context=int(rope["original_max_position_embeddings"]),
    )
    check_attention_factor(rope, yarn.mscale, yarn.mscale_all_dim)
    return yarn


def to_published(model: ModelConfig) -> dict[str, Any]:
    """A `config.json` that `from_published` reads back, for a model trained here.

    It names DeepSeek-V3, the architecture of the whole family that every reader knows.
    """
    fields = {theirs: getattr(model, ours) for ours, theirs in PUBLISHED.items()}
    fields |= {name: allowed[0] for name, allowed in FIXED.items()}
    yarn = model.yarn
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.context,
    }
    return fields | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.heads,
        "q_lora_rank": model.q_rank or None,
        "n_shared_experts": model.shared_experts or None,
        "n_group": model.groups,
        "topk_group": model.groups_per_token,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if yarn.factor > 1 else None,
        "initializer_range": model.init_std,
        "num_nextn_predict_layers": model.mtp_layers,
        "torch_dtype": "bfloat16",
    }


def published_fields(path: str | Path) -> dict[str, Any]:
    """What a published folder's `config.json`, or the file itself, says.

    Raises:
        ConfigError: no such file, or no JSON object.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    content = b""
    try:
        content = path.read_bytes()
        fields = json.loads(content)
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (ValueError, OSError, RecursionError) as error:
        if foreign := describe_foreign(content[:FOREIGN_BYTES]):
            raise ConfigError(f"{path} is {foreign}") from None
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return fields
