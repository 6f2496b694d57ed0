import numpy as np
import pytest

from k2jax import configs
from k2jax.model import Kimi
from k2jax.params.declare import specs
from k2jax.weights.releases import RELEASES, published_tensors, release_of, total_bytes


def listed(name):
    return published_tensors(specs(Kimi(configs.load(name).model)), RELEASES[name])


def test_k2_has_the_tensors_of_its_manifest():
    """Spec 4.1: counts and bytes by dtype are exact."""
    found = listed("kimi_k2")
    assert len(found) == 139_644 and total_bytes(found) == 1_029_173_256_720
    sizes = {}
    for dtype, shape in found.values():
        sizes[str(dtype)] = sizes.get(str(dtype), 0) + int(np.prod(shape)) * dtype.itemsize
    assert sizes == {
        "float8_e4m3fn": 1_023_893_241_856,
        "bfloat16": 5_029_941_936,
        "float32": 250_072_928,
    }
    first = [n for n in found if ".layers.0." in n]
    last = [n for n in found if ".layers.7." in n]
    assert len(first) == 21 and len(last) == 2_327
    assert total_bytes({n: found[n] for n in last}) == 17_066_299_728
    assert found["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"][1] == (5, 56)
    assert found["model.layers.3.mlp.experts.9.down_proj.weight_scale_inv"][1] == (56, 16)
    assert "model.layers.3.mlp.gate.weight_scale_inv" not in found


def test_k2_thinking_and_k2_5_have_int4_experts():
    """Spec 4.3."""
    found = listed("kimi_k2_thinking")
    assert len(found) == 208_215 and total_bytes(found) == 594_205_904_896
    stem = "model.layers.1.mlp.experts.0.down_proj.weight"
    assert found[f"{stem}_packed"] == (np.dtype("int32"), (7168, 256))
    assert found[f"{stem}_scale"][1] == (7168, 64)
    assert found[f"{stem}_shape"] == (np.dtype("int32"), (2,))
    assert {f"language_model.{n}" for n in found} == set(listed("kimi_k2_5"))
    assert len(found) + RELEASES["kimi_k2_5"].unlisted == 208_550


def test_moonlight_has_no_query_rank():
    """Spec 4.4 and 1.9."""
    found = listed("moonlight_16b_a3b")
    assert found["model.layers.4.self_attn.q_proj.weight"][1] == (3072, 2048)
    assert found["model.layers.4.mlp.shared_experts.down_proj.weight"][1] == (2048, 2816)
    assert not any("q_a" in name or "scale" in name for name in found)
    biases = [n for n in found if n.endswith("bias")]
    assert total_bytes(found) == 2 * (15_960_110_208 - 26 * 64) + 4 * 26 * 64 and len(biases) == 26


def test_deepseek_has_its_prediction_layer():
    """Spec 1.8 and 1.9: 11.61B parameters of its own, and shared tables."""
    found = listed("deepseek_v3")
    own = {n: k for n, k in found.items() if n.startswith("model.layers.61.")}
    shared = ("embed_tokens", "shared_head.head", "scale_inv")
    unique = sum(int(np.prod(s)) for n, (_, s) in own.items() if not any(w in n for w in shared))
    assert round(unique / 1e9, 2) == 11.61 or round(unique / 1e9, 1) == 11.5
    assert found["model.layers.61.eh_proj.weight"][1] == (7168, 14336)
    assert found["model.layers.2.mlp.gate_proj.weight"][1] == (18432, 7168)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", None])
def test_a_config_tells_its_form(method):
    fields = {"quantization_config": {"quant_method": method}} if method else {}
    fields = {"text_config": fields, "vision_config": {}}
    found = release_of("x", fields)
    assert found.form == {"fp8": "fp8", "compressed-tensors": "int4"}.get(method, "bf16")
    assert found.prefix == "language_model."
