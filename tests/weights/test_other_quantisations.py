"""Quantised weights that are not read are named as what they are, not as a lost tensor."""

import json

import ml_dtypes
import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.weights.hf_folder import Folder
from k2jax.weights.mapping import load_published
from k2jax.weights.other_quantisations import refuse_other
from k2jax.weights.safetensors import write

STEM = "model.layers.0.mlp.gate_proj"
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
U8, I32, F32, BF16 = np.uint8, np.int32, np.float32, ml_dtypes.bfloat16
KINDS = {
    "FP8 with a scale for each channel": {"weight": (E4M3, 4, 8), "weight_scale": (BF16, 4, 1)},
    "FP8 with a scale for each tensor": {"weight": (E4M3, 4, 8), "weight_scale": (F32, 1)},
    "INT8 with a scale for each channel": {"weight": (np.int8, 4, 8), "weight_scale": (BF16, 4, 1)},
    "NVFP4 (ModelOpt)": {
        "weight": (U8, 4, 4),
        "weight_scale": (E4M3, 4, 1),
        "weight_scale_2": (F32,),
    },
    "NVFP4 (compressed-tensors)": {
        "weight_packed": (U8, 4, 4),
        "weight_scale": (E4M3, 4, 1),
        "weight_global_scale": (F32, 1),
    },
    "MXFP4": {"weight_packed": (U8, 4, 16), "weight_scale": (E8M0, 4, 1)},
    "AWQ or GPTQ": {"qweight": (I32, 8, 1), "qzeros": (I32, 1, 1), "scales": (np.float16, 1, 8)},
    "GPTQ": {"qweight": (I32, 1, 8), "g_idx": (I32, 8), "scales": (np.float16, 1, 8)},
    "bitsandbytes (4 bits)": {"weight": (U8, 16, 1), "weight.absmax": (F32, 1)},
    "bitsandbytes (INT8)": {"weight": (np.int8, 4, 8), "SCB": (F32, 4)},
    "FP8 without scales": {"weight": (E4M3, 4, 8)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_are_named_by_their_tensors(kind, tmp_path):
    tensors = {
        f"{STEM}.{part}": np.zeros(shape, dtype) for part, (dtype, *shape) in KINDS[kind].items()
    }
    write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ConfigError) as error:
        load_published(tmp_path, {})
    assert f"quantised as {kind}; k2jax reads FP8 in blocks of 128 x 128" in str(error.value)


def scheme(form, **weights):
    groups = {"group_0": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bits)"),
        ({"quant_method": "something"}, "something"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "each block of 64 x 64"),
        ({"quant_method": "fp8", "weight_block_size": None}, "each channel or tensor"),
        (scheme("float-quantized", num_bits=8, type="float", strategy="channel"), "FP8 with"),
        (scheme("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), "nvfp4-pack"),
        (scheme("pack-quantized", num_bits=4, type="int", group_size=128), "groups of 128"),
        (scheme("pack-quantized", num_bits=4, type="int", symmetric=False), "not symmetric"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_another_kind_are_named_by_their_config(config, named, nested, tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.zeros(1, F32)})
    fields = {"quantization_config": config}
    fields = {"text_config": fields} if nested else fields
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as error:
        load_published(tmp_path, {})
    assert named in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
        scheme("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ],
)
def test_the_releases_own_kinds_pass(config, tmp_path):
    write(tmp_path / "model.safetensors", {f"{STEM}.weight": np.zeros((4, 8), BF16)})
    refuse_other(Folder(tmp_path), {"quantization_config": config}, "here")
