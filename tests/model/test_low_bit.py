"""Weights that stay in few bits give the logits of weights that are decoded first."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import k2jax
from k2jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig
from k2jax.evals.perplexity import total_loss
from k2jax.model import plain
from k2jax.model.lora import attach_adapters, merge_adapters
from k2jax.ops.lowbit import Fp8, Int4
from k2jax.params.adapters import A, B, declare_adapters, declare_pair
from k2jax.params.arrays import abstract, initial
from k2jax.params.kimi import declare_kimi
from k2jax.params.low_bit_parts import is_released_in
from k2jax.sharding import make_mesh
from k2jax.weights import quant
from k2jax.weights.hf_config import to_published as to_config
from k2jax.weights.mapping import to_published
from k2jax.weights.safetensors import write

# Blocks of 128 that are ragged everywhere and meet neither heads nor a device's part.
CFG = ModelConfig(
    vocab=48,
    embed=192,
    dense_layers=1,
    moe_layers=2,
    heads=4,
    q_rank=136,
    kv_rank=32,
    nope=24,
    rope=8,
    value=40,
    ffw=160,
    experts=4,
    expert_ffw=128,
    experts_per_token=2,
    shared_experts=1,
    context=32,
)
SPECS = declare_kimi(CFG)
TOKEN = np.random.default_rng(0).integers(0, CFG.vocab, (8, 12))


def quantise(form):
    """Published tensors of a release of this form; scales of blocks that differ a hundredfold."""
    params = {n: np.array(a) for n, a in initial(SPECS, 1, 0.05).items()}
    out = {}
    for name, spec in SPECS.items():
        low = is_released_in(spec, form)
        for key, tensor in to_published({name: params[name]}, {name: spec}, ml_dtypes.bfloat16):
            if not low:
                out[key] = tensor
            elif form == "fp8":
                out[key], out[f"{key}_scale_inv"] = quant.encode_fp8(tensor)
            else:
                out[f"{key}_packed"], out[f"{key}_scale"] = quant.encode_int4(tensor)
                out[f"{key}_shape"] = np.array(tensor.shape, np.int32)
    return out


@pytest.fixture(scope="module", params=["fp8", "int4"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write(folder / "model.safetensors", quantise(request.param), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_config(CFG)))
    return folder


def form(folder):
    return "fp8" if folder.name.startswith("fp8") else "int4"


def low_bit(model):
    return {n for n, a in model.params.items() if isinstance(a, Fp8 | Int4)}


def resident(model):
    return sum(a.nbytes for a in jax.tree.leaves(model.params))


def test_what_the_release_has_in_few_bits_stays_so(folder):
    model = k2jax.load(folder)
    assert low_bit(model) == {n for n, s in SPECS.items() if is_released_in(s, form(folder))}
    assert resident(model) < 1.05 * (folder / "model.safetensors").stat().st_size
    assert model.dtype == "bfloat16"
    described = abstract(SPECS, "bfloat16", form(folder))
    bias = "layers.moe.bias"
    assert described.pop(bias).dtype == "bfloat16" and model.params.pop(bias).dtype == "float32"
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), described, model.params
    )
    assert all(jax.tree.leaves(same))
    decoded = k2jax.load(folder, weights="decoded")
    assert not low_bit(decoded)
    with pytest.raises(ConfigError, match="weights is 'store'; did you mean 'stored'"):
        k2jax.load(folder, weights="store")


@pytest.mark.parametrize("on_mesh", [False, True])
def test_logits_are_those_of_weights_decoded_first(folder, on_mesh, mesh):
    if on_mesh:
        mesh(data=2, expert=2, model=2)
    logits = [
        np.asarray(k2jax.forward(k2jax.load(folder, "float32", way), jnp.asarray(TOKEN)))
        for way in ("stored", "decoded")
    ]
    assert np.abs(logits[1]).max() > 0.1
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_tokens_are_those_of_weights_decoded_first(folder, on_mesh):
    devices = make_mesh(MeshConfig(data=2, expert=2, model=2))
    tokens = []
    for way in ("stored", "decoded"):
        with jax.set_mesh(devices) if on_mesh else contextlib.nullcontext():
            model = k2jax.load(folder, "float32", way)
        tokens.append(k2jax.generate(model, TOKEN.tolist(), 6, stop=()))
    assert tokens[0] == tokens[1]


def gradients_of_adapters(folder, way):
    """Gradients of attention's adapters, of a loss through low-bit experts and projections."""
    lora = LoraConfig(rank=2, targets="attention")
    pairs = declare_adapters(SPECS, lora)
    adapters = initial({n: dataclasses.replace(s, init="normal") for n, s in pairs.items()}, 2, 0.1)
    base = k2jax.load(folder, "float32", way).params

    def loss(adapters):
        batch = plain(jnp.asarray(TOKEN, jnp.int32))
        batch = batch._replace(target=batch.token, weight=jnp.ones_like(batch.token, jnp.float32))
        params = attach_adapters(base | adapters, lora.scale)
        return total_loss(params, batch, CFG, "float32")[0]

    return {name: np.asarray(g) for name, g in jax.jit(jax.grad(loss))(adapters).items()}


def test_adapters_learn_over_low_bit_weights_as_over_decoded_ones(folder, mesh):
    right = gradients_of_adapters(folder, "decoded")
    mesh(data=2, expert=2, model=2)
    for name, grad in gradients_of_adapters(folder, "stored").items():
        size = np.abs(right[name]).max()
        np.testing.assert_allclose(grad, right[name], atol=1e-4 * size, rtol=0, err_msg=name)


def test_a_low_bit_weight_with_an_adapter_is_their_sum(folder):
    name = "layers.moe.experts.down"
    stored, plain_ = (k2jax.load(folder, "float32", way).params for way in ("stored", "decoded"))
    a, b = (
        np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
        for leaf in declare_pair(SPECS[name], 2)
    )
    adapters = {name + A: jnp.asarray(a), name + B: jnp.asarray(b)}
    merged = merge_adapters(stored | adapters, SPECS, 0.5)[name]
    right = np.asarray(plain_[name]) + 0.5 * a @ b
    assert merged.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(merged, np.float32), right, rtol=2**-8, atol=1e-6)
