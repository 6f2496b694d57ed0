"""The door to the weights: every reader goes through it, and every gradient comes back through it.

A gradient is communicated once, in the dtype that was asked for, to where the weight is stored.
"""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.read import golden

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.inference.cache import pool_spec
from k2jax.inference.forward import forward, list_depths, split_weights
from k2jax.inference.paged_attention import Chunks
from k2jax.model import Dispatch, Kimi, Policy, hidden, logits, losses, mtp, plain, projection
from k2jax.params.arrays import bind, initial
from k2jax.params.declare import specs

GOLD = golden("kimi")
LEAVES = specs(Kimi(GOLD.cfg))
TOKENS = np.random.default_rng(0).integers(0, GOLD.cfg.vocab, (8, 16)).astype(np.int32)
MESH = MeshConfig(data=2, expert=2, context=2)
HEADS = ("batch", "heads", "length", None)


def loss(params, token, policy):
    """Through a table, and weights whose first, last and only dims are stored split."""
    w = bind(Kimi(GOLD.cfg), params)
    x = projection.look_up(w.embed, token, policy)
    layer = jax.tree.map(lambda a: a[0], w.layers.attention)
    q = projection.project("btd,dq->btq", x, layer.q_down, ("batch", "length", None), policy)
    heads = projection.project("btq,qhc->bhtc", q, layer.q_up, HEADS, policy)
    value = heads[..., : GOLD.cfg.value]
    y = projection.project("bhtv,hvd->btd", value, layer.out, ("batch", "length", None), policy)
    return (y.astype(jnp.float32) ** 2).mean()


def with_gradient(grad_dtype, mesh):
    """The jitted gradient, and its arguments on the mesh in use."""
    names = ("embed", *(f"layers.attention.{n}" for n in ("q_down", "q_up", "out")))
    params = {name: jnp.asarray(value) for name, value in GOLD.params().items()}
    own = {name: params.pop(name) for name in names}
    token = TOKENS
    if mesh:

        def put(a, axes):
            return jax.device_put(a, jax.NamedSharding(mesh, sharding.storage_spec(axes)))

        own = {name: put(a, LEAVES[name].axes) for name, a in own.items()}
        token = put(token, ("batch", "length"))
    policy = Policy("bfloat16", grad_dtype)
    return jax.jit(jax.grad(lambda own, token: loss(params | own, token, policy))), own, token


# In bfloat16 (8 bits) each device's sum is rounded before they are added up, and their total again.
COMMUNICATED = [(None, "bf16", 2**-7), ("float32", "f32", 1e-5)]


@pytest.mark.parametrize(("grad_dtype", "name", "tolerance"), COMMUNICATED)
def test_gradients_are_scattered_as_they_are_summed_and_in_that_dtype(grad_dtype, name, tolerance):
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        gradient, *args = with_gradient(grad_dtype, mesh)
        text = gradient.lower(*args).as_text()
        found = gradient(*args)
    scattered = re.findall(
        r'"stablehlo.reduce_scatter"[\s\S]*?\}\) : \(tensor<[\dx]*x(\w+)>\)', text
    )
    assert scattered == [name] * 3  # all but the table
    right_gradient, *args = with_gradient(grad_dtype, None)
    right = right_gradient(*args)
    for leaf in found:
        a, b = np.asarray(found[leaf]), np.asarray(right[leaf])
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), leaf


# Without q_rank there is a projection `q` in the place of three weights.
LATENT = dataclasses.replace(golden("kimi").cfg, mtp_layers=1)
DIRECT = dataclasses.replace(LATENT, q_rank=0, dense_layers=0, mtp_layers=0)
TOKEN = np.random.default_rng(0).integers(1, LATENT.vocab, (8, 16)).astype(np.int32)


def train(params, cfg, policy):
    """Losses of every token, of the main model and of the MTP layers."""
    w = bind(Kimi(cfg), params)
    batch = plain(jnp.asarray(TOKEN))
    batch = batch._replace(weight=jnp.ones(TOKEN.shape))
    x, aux = hidden(w, batch, cfg, policy)
    outputs, aux = mtp.mtp_forward(w, x, batch, aux, cfg, policy) if cfg.mtp_layers else ([], aux)
    pairs = [(x, batch.target), *((out.x_BTD, out.target) for out in outputs)]
    return [losses(w.head, x, target, policy) for x, target in pairs], aux.aux_loss


def decode_two(params, cfg, policy):
    """Logits after a prompt and after each of two more tokens."""
    layer = jnp.zeros((20, 16, cfg.size("latent")))
    layer = layer if sharding.meshless() else jax.reshard(layer, pool_spec(False))
    pool = tuple((layer,) * -depth for depth in list_depths(cfg))
    logits_of = []
    for begin, end in ((0, 9), (9, 10), (10, 11)):
        token, table = TOKEN[:4, begin:end], np.arange(1, 5, dtype=np.int32)[:, None]
        start, count = (np.full(4, n, np.int32) for n in (begin, end - begin))
        wanted = np.arange(1, 5, dtype=np.int32) * (end - begin) - 1
        chunks = Chunks(*map(jnp.asarray, (token, start, count, table, wanted)))
        y, pool, _ = forward(split_weights(params, cfg), pool, chunks, cfg, policy)
        logits_of.append(y)
    return logits_of


def draw(cfg):
    """Weights that all matter: biases that change choices, no gain of exactly 1."""
    params = initial(specs(Kimi(cfg)), seed=3, std=0.2)
    rng = np.random.default_rng(4)
    for name, leaf in specs(Kimi(cfg)).items():
        if leaf.init != "normal":
            noise = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            params[name] = jax.device_put(noise, params[name].sharding)
    return params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A parameter with factors along its last dim, for each matrix of its stack."""

    array: jax.Array
    factor: jax.Array


def read_scaled(stored, _):
    between = (1,) * (stored.array.ndim - stored.factor.ndim)
    *stack, last = stored.factor.shape
    return stored.array * stored.factor.reshape(*stack, *between, last)


def scaled_reader(cfg, run, policy):
    """`run`, with factors along each weight's last dim that `read_weight` applies."""
    leaves = specs(Kimi(cfg))

    @jax.jit
    def reader(params, factors):
        scaled = {}
        for name, array in params.items():
            factor = jnp.broadcast_to(factors[name], (*leaves[name].stack, array.shape[-1]))
            scaled[name] = Scaled(array, factor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(projection.WEIGHT_FORMATS, Scaled, read_scaled)
            return run(scaled, cfg, policy)

    return reader


ALLTOALL = Policy("float32", remat="full", dispatch=Dispatch("alltoall"))
CASES = {
    "training": (LATENT, train, Policy("float32"), None),
    "training without q_rank": (DIRECT, train, Policy("float32"), None),
    "training on a mesh": (LATENT, train, ALLTOALL, MeshConfig(data=2, expert=2, model=2)),
    "decoding": (LATENT, decode_two, Policy("float32"), None),
    "decoding on a mesh": (LATENT, decode_two, Policy("float32"), MeshConfig(expert=2, model=2)),
}
HEAD_IN_PARTS = ("training", "training on a mesh")


@pytest.mark.parametrize(
    ("case", "in_parts"),
    [*((case, False) for case in CASES), *((case, True) for case in HEAD_IN_PARTS)],
)
def test_a_weight_scaled_where_it_is_read_is_scaled_for_every_reader(case, in_parts, monkeypatch):
    cfg, run, policy, mesh = CASES[case]
    if in_parts:
        monkeypatch.setattr(logits, "LOGITS_BYTES", 4 * TOKEN.size * 8)
    devices = sharding.make_mesh(mesh) if mesh else None
    if devices is not None and run is decode_two:
        devices = sharding.inference_mesh(devices, specs(Kimi(cfg)))
    with jax.set_mesh(devices) if devices is not None else contextlib.nullcontext():
        params, reader = draw(cfg), scaled_reader(cfg, run, policy)
        # Not one factor: norms would undo it.
        factors = {name: jnp.linspace(1, 2, a.shape[-1]) for name, a in params.items()}
        ones = jax.tree.map(jnp.ones_like, factors)

        def compute(*args):
            return jax.tree.leaves(jax.device_get(reader(*args)))

        unscaled = compute(params, ones)
        for name in params:
            if name.startswith("mtp.") and run is decode_two:
                continue
            read = compute(params, ones | {name: factors[name]})
            stored = compute(params | {name: params[name] * factors[name]}, ones)
            for a, b in zip(read, stored, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)
            changes = [np.abs(a - b).max() for a, b in zip(read, unscaled, strict=True)]
            assert max(changes) > 1e-4, f"{name} changes nothing"


def test_a_parameter_carries_no_setting_of_a_run():
    w = bind(Kimi(LATENT), draw(LATENT))
    own = w.embed.get_metadata()
    assert "grad_dtype" not in own and own["spec"] == specs(Kimi(LATENT))["embed"]
