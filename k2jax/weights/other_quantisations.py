"""Quantised weights that k2jax does not read, named as what they are.

Two are read: FP8 with a scale for each block of 128 x 128, and INT4 in groups of 32. A folder says
in `quantization_config` what it holds, but not always: the names and dtypes of tensors do.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.weights.encodings import SCALE, Tensors
from k2jax.weights.quant import BLOCK, FP8, GROUP

READ = f"k2jax reads FP8 in blocks of {BLOCK} x {BLOCK}, and INT4 in groups of {GROUP}"
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "fbgemm_fp8": "FP8 with a scale for each channel (FBGEMM)",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "NVFP4 (ModelOpt)",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "torchao": "TorchAO",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "quark": "Quark",
    "compressed-tensors": "compressed-tensors",
}
# Ends of the names of tensors that only one kind has, the telling ones first.
ENDS = (
    (".g_idx", "GPTQ"),
    (".qzeros", "AWQ or GPTQ"),
    (".qweight", "AWQ or GPTQ"),
    (".absmax", "bitsandbytes (4 bits)"),
    (".SCB", "bitsandbytes (INT8)"),
    (".weight_global_scale", "NVFP4 (compressed-tensors)"),
    (".weight_scale_2", "NVFP4 (ModelOpt)"),
    ("_blocks", "MXFP4"),
    (".weight_zero_point", "asymmetric integers (compressed-tensors)"),
    (".W_q", "HQQ"),
    (".weight_g_idx", "INT4 with reordered groups (compressed-tensors)"),
)


def refuse_other(tensors: Tensors, fields: Mapping[str, Any], where: str) -> None:
    """Refuse weights that are quantised in another way than k2jax reads.

    Args:
        tensors: the published ones.
        fields: of `config.json`.
        where: names their folder.

    Raises:
        ConfigError: says what they are.
    """
    if what := _by_config(fields) or _by_tensors(tensors):
        raise ConfigError(f"{where} holds weights quantised as {what}; {READ}")


def _by_config(fields: Mapping[str, Any]) -> str:
    text = fields.get("text_config")
    inner = text if isinstance(text, dict) else {}
    config = fields.get("quantization_config") or inner.get("quantization_config")
    if not isinstance(config, dict):
        return ""
    method = str(config.get("quant_method"))
    if method == "fp8":
        block = config.get("weight_block_size", [BLOCK, BLOCK])
        form = "each channel or tensor" if block is None else f"each block of {_by(block)}"
        return "" if block == [BLOCK, BLOCK] else f"FP8 with a scale for {form}"
    if method == "compressed-tensors":
        return _compressed(config)
    if method == "bitsandbytes":
        return f"bitsandbytes ({'4 bits' if config.get('load_in_4bit') else 'INT8'})"
    return METHODS.get(method.lower(), method)


def _compressed(config: Mapping[str, Any]) -> str:
    """What compressed-tensors' own description says, where it is not what is read."""
    form = str(config.get("format") or "pack-quantized")
    groups = config.get("config_groups")
    schemes = [g.get("weights") for g in groups.values()] if isinstance(groups, dict) else []
    for scheme in (s for s in schemes if isinstance(s, dict)):
        bits, kind = scheme.get("num_bits", 4), scheme.get("type", "int")
        strategy, size = scheme.get("strategy", "group"), scheme.get("group_size", GROUP)
        per = f"groups of {size}" if strategy in ("group", "tensor_group") else f"each {strategy}"
        same = (bits, kind, per) == (4, "int", f"groups of {GROUP}")
        if scheme.get("symmetric", True) is False or scheme.get("actorder"):
            return f"{kind.upper()}{bits}, not symmetric or with reordered groups ({form})"
        if not same:
            name = "FP" if kind == "float" else kind.upper()
            return f"{name}{bits} with scales for {per} (compressed-tensors, {form})"
    return "" if form == "pack-quantized" else f"compressed-tensors, {form}"


def _by_tensors(tensors: Tensors) -> str:
    names = list(tensors)
    for end, what in ENDS:
        if any(name.endswith(end) for name in names):
            return what
    for scale in (name for name in names if name.endswith(".weight_scale")):
        weight = scale.removesuffix("_scale")
        packed = f"{weight}_packed"
        if packed in tensors and tensors.dtype(packed) == np.uint8:
            return "NVFP4" if tensors.dtype(scale) == FP8 else "MXFP4"
        if packed not in tensors and weight in tensors:
            dtype = tensors.dtype(weight)
            size = {FP8: "FP8", np.dtype("int8"): "INT8", np.dtype("uint8"): "FP4"}.get(dtype)
            per = "channel" if any(n > 1 for n in tensors.shape(scale)) else "tensor"
            return f"{size or dtype} with a scale for each {per}"
    first = next((name for name in names if name.endswith("_proj.weight")), None)
    scaled = any(name.endswith(SCALE) for name in names)
    bare = first is not None and not scaled and tensors.dtype(first) == FP8
    return "FP8 without scales" if bare else ""


def _by(block: Any) -> str:
    return " x ".join(map(str, block)) if isinstance(block, list) else str(block)
