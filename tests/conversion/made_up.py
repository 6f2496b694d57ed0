"""Made-up published folders of a small model, in every format that releases use."""

import dataclasses
import json

import ml_dtypes
import numpy as np

from k2jax.model import Kimi
from k2jax.params.arrays import initial
from k2jax.params.declare import specs
from k2jax.weights import manifest, quant
from k2jax.weights.hf_config import from_published
from k2jax.weights.hf_folder import INDEX, Folder
from k2jax.weights.mapping import to_published
from k2jax.weights.safetensors import write

CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 160,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 130,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 192,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.0,
    "rms_norm_eps": 1e-6,
    "n_group": 1,
    "max_position_embeddings": 64,
    "topk_group": 1,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 1,
}
MODEL = dataclasses.replace(from_published(CONFIG), mtp_layers=0)
LEAVES = specs(Kimi(MODEL))
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT4_CONFIG = {"quant_method": "compressed-tensors", "format": "pack-quantized", "extra": 1}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def tensors(dtype=ml_dtypes.bfloat16):
    """A model, an MTP layer, and junk."""
    params = initial(LEAVES, 0, 0.05)
    found = dict(to_published({n: np.asarray(p) for n, p in params.items()}, LEAVES, dtype))
    rng = np.random.default_rng(0)
    for name in (BIAS, BIAS.replace("s.1", "s.2")):
        found[name] = np.float32(8) + rng.random(4, np.float32) * np.float32(1e-5)
    last = {n: t for n, t in found.items() if n.startswith("model.layers.2.")}
    found |= {n.replace("layers.2.", "layers.3."): t.copy() for n, t in last.items()}
    shapes = {"eh_proj": (160, 320), "embed_tokens": (48, 160), "shared_head.head": (48, 160)}
    shapes |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (160,))
    for name, shape in shapes.items():
        found[f"model.layers.3.{name}.weight"] = rng.random(shape, np.float32).astype(dtype)
    junk = rng.random(7, np.float32).astype(dtype)
    return found | {"model.layers.0.self_attn.rotary_emb.inv_freq": junk}


def quantised(plain, form):
    out = {}
    for name, tensor in plain.items():
        projection = "_proj" in name and "eh_proj" not in name
        if form == "fp8" and projection:
            out[name], out[f"{name}_scale_inv"] = quant.encode_fp8(tensor)
        elif form == "int4" and ".mlp.experts." in name:
            out[f"{name}_packed"], out[f"{name}_scale"] = quant.encode_int4(tensor)
            out[f"{name}_shape"] = np.array(tensor.shape, np.int64)
        else:
            out[name] = tensor
    return out


def save(folder, content, fields=CONFIG, prefix=""):
    """A published folder of three files with whimsical names."""
    folder.mkdir()
    where = {prefix + name: f"part-{len(name) % 3}.safetensors" for name in content}
    for file in set(where.values()):
        held = {prefix + n: t for n, t in content.items() if where[prefix + n] == file}
        write(folder / file, held, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in content.values())}}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "LICENSE").write_text("as is")
    (folder / "README.md").write_text("a card")
    (folder / "weights.bin").write_text("a pickle")
    return folder


FORMS = {
    "bf16": ({}, tensors),
    "f32": ({}, lambda: tensors(np.float32)),
    "fp8": ({"quantization_config": FP8_CONFIG}, lambda: quantised(tensors(), "fp8")),
    "int4": ({"quantization_config": INT4_CONFIG}, lambda: quantised(tensors(), "int4")),
}


def read(folder):
    found = Folder(folder)
    found.inspect()
    return {name: np.array(found.read(name)) for name in found}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].tobytes() == tensor.tobytes(), name


def content(folder):
    return {p: (folder / p).read_bytes() for p in manifest.files(folder)}
