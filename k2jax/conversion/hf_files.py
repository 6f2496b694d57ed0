"""The files around published weights: which tensor is in which, config.json, the index."""

import copy
import re
from collections.abc import Iterable
from typing import Any

from k2jax.config import ConfigError, ModelConfig
from k2jax.weights.hf_config import to_published

LAYER = re.compile(r"model\.layers\.(\d+)\.")
FP8_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT4_CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
METHODS: dict[str, dict[str, Any]] = {"fp8": FP8_CONFIG, "int4": INT4_CONFIG}


def file_names(tensors: Iterable[str]) -> dict[str, str]:
    """The file of each tensor: one for a layer; the first has the embedding, the last the head."""
    numbers = {
        name: int(m[1]) if (m := LAYER.match(name)) else 0 if "embed" in name else -1
        for name in tensors
    }
    last = max(numbers.values())
    return {
        name: f"model-{(last if n < 0 else n) + 1:05d}-of-{last + 1:06d}.safetensors"
        for name, n in numbers.items()
    }


def exported_config(
    fields: dict[str, Any], model: ModelConfig, form: str, skipped_layers: tuple[str, ...]
) -> dict[str, Any]:
    """The `config.json` of an export.

    Args:
        fields: of the source's; empty for a model trained here.
        model: its sizes.
        form: "fp8", "int4", "bfloat16", "float32", or "keep" for what the source says.
        skipped_layers: starts of the names of prediction layers that are left out.

    Raises:
        ConfigError: the source's `quantization_config` is of a kind that is not known.
    """
    out = copy.deepcopy(fields.get("text_config", fields)) if fields else to_published(model)
    found = fields.get("quantization_config", out.get("quantization_config"))
    if found is not None and found.get("quant_method") not in ("fp8", "compressed-tensors"):
        raise ConfigError(
            f"config.json: quantization_config.quant_method is {found.get('quant_method')!r};"
            " k2jax has 'fp8' and 'compressed-tensors'"
        )
    out.pop("quantization_config", None)
    method = METHODS.get(form)
    if form == "keep" and found is not None:
        out["quantization_config"] = found
    elif method is not None:
        same = found is not None and found["quant_method"] == method["quant_method"]
        out["quantization_config"] = found if same else method
    if form in ("bfloat16", "float32"):
        out["dtype" if "dtype" in out else "torch_dtype"] = form
    if skipped_layers:
        out["num_nextn_predict_layers"] = 0
    return out
