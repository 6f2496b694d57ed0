"""Weights with adapters: the network equals the one with `W + scale A B`, and so do gradients."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import SIZES

from k2jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig
from k2jax.evals.perplexity import total_loss
from k2jax.model import plain
from k2jax.model.lora import attach_adapters, merge_adapters
from k2jax.params.adapters import declare_adapters, is_adapter
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.sharding import make_mesh

CFG = ModelConfig(**SIZES)
SPECS = declare_kimi(CFG)
LORA = LoraConfig(rank=2, alpha=3.0, targets="attention,dense,shared,experts")
PAIRS = declare_adapters(SPECS, LORA)


def loss_and_gradients(put_together):
    """Of all adapters' matrices, on the mesh in use."""
    base = initial(SPECS, 1, 0.2)
    adapters = {n: v for n, v in initial(PAIRS, 2, 0.3).items()}
    noise = np.random.default_rng(3)
    for name, b in adapters.items():
        if name.endswith("lora_b"):
            drawn = noise.standard_normal(b.shape, np.float32) * np.float32(0.3)
            adapters[name] = jax.device_put(drawn, b.sharding)
    token = np.random.default_rng(0).integers(0, CFG.vocab, (8, 16)).astype(np.int32)

    def loss(adapters):
        batch = plain(jnp.asarray(token))
        weight = jnp.ones_like(batch.token, jnp.float32)
        batch = batch._replace(target=batch.token, weight=weight)
        return total_loss(put_together(base | adapters), batch, CFG, "float32")[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(adapters)
    return float(value), {name: np.asarray(g) for name, g in grads.items()}


@pytest.fixture(scope="module")
def merged():
    return loss_and_gradients(lambda params: merge_adapters(params, SPECS, LORA.scale))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=2, model=2)])
def test_narrow_products_equal_those_with_the_merged_weight(merged, mesh):
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        loss, grads = loss_and_gradients(lambda params: attach_adapters(params, LORA.scale))
    assert loss == pytest.approx(merged[0], rel=1e-5)
    assert grads.keys() == PAIRS.keys()
    for name, grad in grads.items():
        size = np.abs(merged[1][name]).max()
        assert size > 0, name
        np.testing.assert_allclose(grad, merged[1][name], atol=2e-5 * size, rtol=0, err_msg=name)


def test_targets_name_the_published_modules():
    def modules(targets):
        lora = LoraConfig(rank=1, targets=targets)
        return {leaf.published.split(".", 3)[3] for leaf in declare_adapters(SPECS, lora).values()}

    assert modules("kv_a") == {f"self_attn.kv_a_proj_with_mqa.lora_{x}.weight" for x in "AB"}
    assert len(modules("attention")) == 2 * 5 and modules("attention") == modules(
        "q_a,q_b,kv_a,kv_b,o"
    )
    assert modules("experts") > {"mlp.experts.{e}.up_proj.lora_A.weight"}
    assert not any("norm" in name or "router" in name for name in PAIRS)
    assert all(is_adapter(name) for name in PAIRS)
    with pytest.raises(ConfigError, match="'q', which this model does not have"):
        modules("o,q")
