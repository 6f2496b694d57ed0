import json

import ml_dtypes
import numpy as np
import pytest

from k2jax.config import ConfigError, ModelConfig
from k2jax.model import Kimi
from k2jax.params.declare import specs
from k2jax.weights import quant
from k2jax.weights.hf_folder import INDEX
from k2jax.weights.mapping import load_published, to_published
from k2jax.weights.safetensors import write

SIZES = {
    "vocab": 24,
    "embed": 8,
    "heads": 4,
    "q_rank": 6,
    "kv_rank": 10,
    "nope": 4,
    "rope": 2,
    "value": 3,
    "ffw": 12,
    "experts": 4,
    "expert_ffw": 6,
    "experts_per_token": 2,
    "dense_layers": 1,
    "moe_layers": 2,
    "context": 64,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def names(**sizes):
    return specs(Kimi(ModelConfig(**(SIZES | sizes))))


def published(leaves, dtype=np.float32):
    """Random tensors under the names and shapes of a published folder; biases are float32."""
    rng = np.random.default_rng(0)
    tensors = {}
    for leaf in leaves.values():
        for where in np.ndindex(*leaf.stack):
            layer, expert = (*where, 0, 0)[:2]
            name = leaf.published.format(l=leaf.first_layer + layer, e=expert)
            kind = np.float32 if leaf.group == "bias" else dtype
            tensors[name] = rng.standard_normal(leaf.published_shape, np.float32).astype(kind)
    return tensors


def save(folder, tensors, files=1):
    if files == 1:
        write(folder / "model.safetensors", tensors)
        return
    where = {name: f"part-{i % files}-of-{files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        write(folder / file, {n: t for n, t in tensors.items() if where[n] == file})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refuses(folder, leaves, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_published(folder, leaves)
    assert "\n" not in str(caught.value)


SHAPES = {
    "k2": {},
    "no_dense": {"dense_layers": 0},
    "three_dense": {"dense_layers": 3},
    "no_q_rank": {"q_rank": 0},
    "no_shared": {"shared_experts": 0},
    "two_shared": {"shared_experts": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_round_trip_gives_every_tensor_back_bit_for_bit(tmp_path, shape, dtype):
    leaves = names(**SHAPES[shape])
    tensors = published(leaves, dtype)
    save(tmp_path, tensors, files=2)
    params = load_published(tmp_path, leaves, dtype=None)
    assert {n: p.shape for n, p in params.items()} == {n: s.shape for n, s in leaves.items()}
    back = dict(to_published(params, leaves))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name


def test_tensors_land_where_the_published_code_reads_them(tmp_path):
    tensors = published(names())
    save(tmp_path, tensors)
    p = {n: np.asarray(leaf) for n, leaf in load_published(tmp_path, names()).items()}

    def layer(n, name):
        return tensors[f"model.layers.{n}.{name}.weight"]

    np.testing.assert_array_equal(p["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(p["head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(p["dense.mlp.down"][0], layer(0, "mlp.down_proj").T)
    # Layer 2 is the second mixture layer; head 3 has rows 3 * 6 to 4 * 6 of q_b_proj.
    head = layer(2, "self_attn.q_b_proj")[18:24]
    np.testing.assert_array_equal(p["layers.attention.q_up"][1, :, 3], head.T)
    out = layer(1, "self_attn.o_proj")[:, 3:6]
    np.testing.assert_array_equal(p["layers.attention.out"][0, 1], out.T)
    gate = layer(2, "mlp.experts.3.gate_proj")
    np.testing.assert_array_equal(p["layers.moe.experts.gate"][1, 3], gate.T)
    np.testing.assert_array_equal(p["layers.moe.bias"][0], tensors[BIAS])


def test_weights_land_on_the_mesh_in_use(tmp_path, mesh):
    leaves = names()
    save(tmp_path, published(leaves))
    whole = load_published(tmp_path, leaves)
    mesh(data=2, expert=2, model=2)
    spread = load_published(tmp_path, leaves)
    gate = spread["layers.moe.experts.gate"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 2, 4, 3)
    for name, leaf in whole.items():
        np.testing.assert_array_equal(np.asarray(spread[name]), np.asarray(leaf), err_msg=name)


def test_trap_6_router_bias_stays_float32(tmp_path):
    leaves = names()
    tensors = published(leaves, ml_dtypes.bfloat16)
    tensors[BIAS] = np.float32(8) + np.arange(4, dtype=np.float32) * 1e-6
    save(tmp_path, tensors)
    for dtype in (None, "bfloat16", "float32"):
        params = load_published(tmp_path, leaves, dtype)
        np.testing.assert_array_equal(np.asarray(params["layers.moe.bias"][0]), tensors[BIAS])
    assert params["layers.moe.bias"].dtype == "float32"


def test_the_dtype_is_the_files_unless_given(tmp_path):
    leaves = names()
    save(tmp_path, published(leaves, ml_dtypes.bfloat16))
    assert load_published(tmp_path, leaves, None)["head"].dtype == "bfloat16"
    assert load_published(tmp_path, leaves)["head"].dtype == "float32"
    mixed = published(leaves, ml_dtypes.bfloat16)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(np.float32)
    save(tmp_path, mixed)
    assert load_published(tmp_path, leaves, None)["head"].dtype == "float32"


def test_trap_13_what_is_no_weight_is_ignored(tmp_path):
    tensors = published(names())
    junk = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(56, ml_dtypes.bfloat16),
        "model.layers.3.eh_proj.weight": np.zeros((8, 16), np.float32),
        "model.layers.3.mlp.gate.weight": np.zeros((4, 8), np.float32),
        "vision_tower.patch_embed.weight": np.zeros(3, np.float32),
        "mm_projector.proj.0.bias": np.zeros(3, np.float32),
    }
    save(tmp_path, tensors | junk)
    back = dict(to_published(load_published(tmp_path, names()), names()))
    assert back.keys() == tensors.keys()


def test_the_text_part_of_a_multimodal_folder_is_read(tmp_path):
    tensors = published(names())
    save(tmp_path, {f"language_model.{name}": t for name, t in tensors.items()}, files=2)
    params = load_published(tmp_path, names())
    np.testing.assert_array_equal(np.asarray(params["head"]), tensors["lm_head.weight"].T)


def test_a_missing_tensor_is_named_with_what_it_is_for(tmp_path):
    tensors = published(names())
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save(tmp_path, tensors)
    refuses(
        tmp_path,
        names(),
        r"model.safetensors has no tensor 'model.layers.2.mlp.experts.3.up_proj.weight', a part of"
        " 'layers.moe.experts.up'",
    )


@pytest.mark.parametrize("name", ["model.layers.3.mlp.gate.weight", "model.norm.bias"])
def test_an_unknown_tensor_is_named(tmp_path, name):
    save(tmp_path, published(names()) | {name: np.zeros((4, 8), np.float32)}, files=2)
    refuses(tmp_path, names(), rf"part-\d-of-2.safetensors: the model has no tensor '{name}'")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    save(tmp_path, published(names(ffw=16)))
    refuses(
        tmp_path,
        names(),
        r"model.safetensors: 'model.layers.0.mlp.down_proj.weight' has shape \[8, 16\]; the model"
        r" needs \[8, 12\]",
    )


def test_a_tensor_of_integers_is_refused(tmp_path):
    tensors = published(names())
    save(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"].astype(np.int32)})
    refuses(
        tmp_path, names(), "'lm_head.weight' is int32; it is read as bfloat16 or float16 or float32"
    )


BIG = {"embed": 160, "expert_ffw": 64, "ffw": 192, "kv_rank": 30}


def quantised(tensors, form):
    """FP8 as in the K2 releases, INT4 as in K2-Thinking: only the routed experts."""
    out = {}
    for name, tensor in tensors.items():
        if form == "fp8" and name.endswith("_proj.weight"):
            out[name], out[f"{name}_scale_inv"] = quant.encode_fp8(tensor)
        elif form == "int4" and ".mlp.experts." in name:
            out[f"{name}_packed"], out[f"{name}_scale"] = quant.encode_int4(tensor)
            out[f"{name}_shape"] = np.array(tensor.shape, np.int32)
        else:
            out[name] = tensor
    return out


def formula(tensors):
    """Plain tensors of quantised ones, by the formulas of spec 4."""
    out = {}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            scale = tensors[f"{name}_scale_inv"].repeat(128, 0).repeat(128, 1)
            rows, columns = tensor.shape
            out[name] = tensor.astype(np.float32) * scale[:rows, :columns]
        elif name.endswith("_packed"):
            words = tensor.view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)
            q = (words & 15).astype(np.float32).reshape(len(tensor), -1) - 8
            stem = name.removesuffix("_packed")
            out[stem] = q * tensors[f"{stem}_scale"].astype(np.float32).repeat(32, 1)
        elif not name.endswith(("_scale_inv", "_scale", "_shape")):
            out[name] = tensor
    return out


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_quantised_folder_is_decoded_by_the_formulas(tmp_path, form, mesh):
    leaves = names(**BIG)
    tensors = quantised(published(leaves, ml_dtypes.bfloat16), form)
    save(tmp_path, tensors, files=2)
    mesh(data=2, expert=2, model=2)
    params = load_published(tmp_path, leaves, None)
    assert params["head"].dtype == "bfloat16" and params["layers.moe.bias"].dtype == "float32"
    back = dict(to_published(params, leaves))
    want = formula(tensors)
    assert back.keys() == want.keys()
    for name, tensor in want.items():
        assert back[name].tobytes() == tensor.astype(back[name].dtype).tobytes(), name


@pytest.mark.parametrize(
    ("form", "lost", "message"),
    [
        ("fp8", "layers.0.self_attn.o_proj.weight", "has no tensor|lacks its tensor"),
        ("int4", "layers.1.mlp.experts.0.up_proj.weight_scale", "INT4 weight .* lacks its tensor"),
    ],
)
def test_a_quantised_weight_that_lacks_a_part_is_named(tmp_path, form, lost, message):
    leaves = names(**BIG)
    tensors = quantised(published(leaves), form)
    del tensors[f"model.{lost}"]
    save(tmp_path, tensors)
    refuses(tmp_path, leaves, f"({message}).*{lost}")


def test_a_scale_of_another_shape_or_dtype_is_named(tmp_path):
    leaves = names(**BIG)
    tensors = quantised(published(leaves), "fp8")
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    save(tmp_path, tensors | {name: tensors[name][:, :1]})
    refuses(tmp_path, leaves, r"up_proj.weight_scale_inv' has shape \[1, 1\].*needs \[1, 2\]")
    save(tmp_path, tensors | {name: tensors[name].astype(np.float64)})
    refuses(tmp_path, leaves, "up_proj.weight_scale_inv' is float64; it is read as float32")


def test_an_int4_shape_that_lies_is_named(tmp_path):
    leaves = names(**BIG)
    tensors = quantised(published(leaves), "int4")
    name = "model.layers.1.mlp.experts.0.up_proj.weight_shape"
    save(tmp_path, tensors | {name: np.array([64, 96])})
    refuses(tmp_path, leaves, rf"'{name}' says \[64, 96\]; the weight is \[64, 160\]")


def test_damage_to_a_folder_is_told_in_one_line(tmp_path):
    refuses(tmp_path, names(), "has neither model.safetensors.index.json nor model.safetensors")
    save(tmp_path, published(names()), files=2)
    file = tmp_path / "part-1-of-2.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refuses(tmp_path, names(), "part-1-of-2.safetensors is cut short: tensor 'model")
    file.unlink()
    refuses(tmp_path, names(), "cannot read .*part-1-of-2.safetensors: No such file")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a readable index"),
        ("[]", "not a readable index"),
        ("{}", "not a readable index"),
        ('{"weight_map": {"a": "../x"}}', "file names in this folder"),
        ('{"weight_map": {"a": 1}}', "file names in this folder"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, index, message):
    (tmp_path / INDEX).write_text(index)
    refuses(tmp_path, names(), rf"{INDEX}.*{message}")


def test_an_index_that_points_into_the_wrong_file_names_it(tmp_path):
    save(tmp_path, published(names()), files=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "part-0-of-2.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "part-0-of-2.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuses(tmp_path, names(), "part-0-of-2.safetensors has no tensor '(lm_head|model.embed)")


def test_to_published_casts_weights_only():
    leaves = names()
    params = {n: np.ones(leaf.shape, np.float32) for n, leaf in leaves.items()}
    for name, tensor in to_published(params, leaves, "bfloat16"):
        assert str(tensor.dtype) == ("float32" if name.endswith("_bias") else "bfloat16")
