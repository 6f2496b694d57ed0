"""The files around published weights: which tensor is in which, config.json, what others need."""

import copy
import json
import re
from collections.abc import Iterable
from typing import Any

from k2jax.config import ConfigError
from k2jax.text import hf_export, hf_tokenizer, kimi_tokenizer
from k2jax.text.interface import TokenizerLike
from k2jax.text.jinja_template import TEMPLATE
from k2jax.text.kimi_template import KIMI_K2
from k2jax.weights import quant
from k2jax.weights.hf_config import to_published
from k2jax.weights.source import Source

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
ARCHITECTURE = "DeepseekV3ForCausalLM"
# The first one every reader knows; transformers without the folder's own code does not load Kimi's.
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
GENERATION = "generation_config.json"
METHODS: dict[str, dict[str, Any]] = {
    "fp8": FP8_CONFIG,
    **dict.fromkeys(quant.GRIDS, INT4_CONFIG),
}


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
    source: Source, form: str, model_type: str, skipped_layers: tuple[str, ...]
) -> dict[str, Any]:
    """The `config.json` of an export.

    Args:
        source: of the weights.
        form: "keep" for what the source says, else the format of the weights.
        model_type: one of MODEL_TYPES.
        skipped_layers: starts of the names of prediction layers that are left out.

    Raises:
        ConfigError: the source's `quantization_config` is of a kind that is not known.
    """
    fields = source.fields
    out = copy.deepcopy(fields.get("text_config", fields)) or to_published(source.config)
    out |= {"model_type": model_type, "architectures": [ARCHITECTURE]}
    # What a config leaves out, readers take from their own defaults: 0 and 1 are bytes here.
    out |= {name: id_ for name, id_ in _token_ids(source).items() if out.get(name) is None}
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


def _tokenizer(source: Source) -> TokenizerLike | None:
    """The source's tokenizer; None also where k2jax cannot read it: it is copied all the same."""
    try:
        return source.tokenizer
    except ConfigError:
        return None


def _token_ids(source: Source) -> dict[str, int]:
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    if isinstance(tokenizer, kimi_tokenizer.Tokenizer):
        ids["pad_token_id"] = tokenizer.pad
    return ids


def generated_files(source: Source) -> dict[str, Any]:
    """Files that readers of an export look for and the source's folder lacks, each as it is made.

    Returns:
        What makes the content of each, a text, by the name of the file.
    """
    tokenizer = _tokenizer(source)
    if not isinstance(tokenizer, kimi_tokenizer.Tokenizer):
        return {}
    context = source.config.context
    makers: dict[str, Any] = {
        hf_tokenizer.FILE: lambda: _json(hf_export.tokenizer_json(tokenizer)),
        hf_tokenizer.CONFIG: lambda: _json(hf_export.tokenizer_config(tokenizer, context)),
        GENERATION: lambda: _json(hf_export.generation_config(tokenizer)),
    }
    if not source.fields and tokenizer.template is KIMI_K2:
        makers[TEMPLATE] = lambda: hf_export.CHAT_TEMPLATE
    return {name: make for name, make in makers.items() if name not in source.companions}


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
