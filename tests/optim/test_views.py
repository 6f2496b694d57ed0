"""Which leaves are matrices, whose they are, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.optim import Matrices, muon, muonclip, newton_schulz, scale_by_muon
from k2jax.optim.views import assign
from k2jax.params.spec import ParamSpec

AXES = ("moe_layers", "q_rank", "heads", "qk")
QUERY = ParamSpec(AXES, (2, 6, 4, 3), 1, "muon", "q_b_proj")


def test_without_specs_two_dims_are_a_matrix_and_tables_are_adams():
    shapes = {"w": (3, 4), "token_embed": (9, 4), "head": (4, 9), "norm": (4,), "bias": (1, 3)}
    found = assign({name: jnp.zeros(shape) for name, shape in shapes.items()})
    assert found == {"w": Matrices()} | dict.fromkeys(list(shapes)[1:], "adam")


def test_a_name_that_only_holds_the_letters_of_a_table_is_a_matrix():
    names = ("MultiHeadAttention_0.query.kernel", "multihead_q", "upscale.w", "mlp.overhead")
    assert set(assign(dict.fromkeys(names, jnp.zeros((3, 4)))).values()) == {Matrices()}
    names = (
        "LMHead_0.kernel",
        "lm_head.kernel",
        "wte",
        "pos_emb",
        "unembed.w",
        "LayerNorm_0.scale",
    )
    assert set(assign(dict.fromkeys(names, jnp.zeros((3, 4)))).values()) == {"adam"}


@pytest.mark.parametrize(
    ("make", "leaf", "specs", "message"),
    [
        (muonclip, (2, 3, 4), None, r"'layer.w' has shape \(2, 3, 4\), which is no plain matrix"),
        (muonclip, (3, 4), {"layer": {"v": "adam"}}, "'layer.w' has no spec; did you mean"),
        (muonclip, (3, 4), {"layer": {"w": "adams"}}, "spec of 'layer.w' is 'adams'"),
        (muonclip, (3, 4, 5), {"layer": {"w": Matrices()}}, "must name each dim once"),
        (muon, (4,), None, "'layer.w' under Muon is no matrix"),
        (muon, (3, 4), {"layer": {"w": "adam"}}, "'layer.w' under Muon is no matrix"),
    ],
)
def test_a_leaf_that_is_not_clearly_assigned_is_named(make, leaf, specs, message):
    with pytest.raises(ConfigError, match=message):
        make(1e-2, specs=specs).init({"layer": {"w": jnp.zeros(leaf)}})


@pytest.mark.parametrize("name", ["embed", "lm_head", "final_norm", "bias"])
def test_tables_under_muon_are_refused_unless_asked_for(name):
    params = {name: jnp.ones((4, 6))}
    with pytest.raises(ConfigError, match=f"'{name}' under Muon"):
        muon(1e-2).init(params)
    muon(1e-2, {name: Matrices()}).init(params)


def test_a_bias_spec_under_muonclip_is_refused():
    spec = ParamSpec(("router",), (4,), 0, "bias", "bias")
    with pytest.raises(ConfigError, match="'b' is of group 'bias'"):
        muonclip(1e-2, specs={"b": spec}).init({"b": jnp.zeros(4)})


@pytest.mark.parametrize("per_head", [False, True])
def test_heads_are_one_matrix_or_one_each(per_head):
    grad = np.random.default_rng(0).standard_normal(QUERY.shape, np.float32)
    tx = scale_by_muon({"q": QUERY}, dtype="float32", per_head=per_head)
    found = tx.update({"q": grad}, tx.init({"q": grad}))[0]["q"]
    for layer in range(2):
        if per_head:
            for head in range(4):  # scaled by the dims of the block
                right = 0.2 * 6**0.5 * newton_schulz(grad[layer, :, head], dtype="float32")
                np.testing.assert_allclose(found[layer, :, head], right, atol=1e-5)
        else:
            right = 0.2 * 12**0.5 * newton_schulz(grad[layer].reshape(6, 12), dtype="float32")
            np.testing.assert_allclose(found[layer], right.reshape(6, 4, 3), atol=1e-5)


def test_nested_trees_keep_their_structure():
    params = {"a": {"w": jnp.ones((3, 4))}, "b": [jnp.ones((4, 4)), jnp.ones(4)]}
    tx = muonclip(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
