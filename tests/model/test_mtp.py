"""Multi-token prediction against the report's formulas, in the loss, and on meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcribed
from golden.cases import CASES
from golden.read import golden

import k2jax
from k2jax import sharding
from k2jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Yarn,
    validate,
)
from k2jax.model import Batch, Kimi, Policy, hidden, mtp, plain
from k2jax.model.rope import frequencies
from k2jax.optim.qk_clip import qk_clip
from k2jax.params.arrays import bind, initial
from k2jax.params.declare import specs
from k2jax.training.step import build
from k2jax.weights.hf_config import from_published
from k2jax.weights.mapping import to_published
from k2jax.weights.safetensors import write

CFG = ModelConfig(
    vocab=48,
    embed=16,
    dense_layers=1,
    moe_layers=1,
    mtp_layers=2,
    heads=4,
    q_rank=8,
    kv_rank=8,
    nope=4,
    rope=4,
    value=4,
    ffw=16,
    experts=8,
    expert_ffw=8,
    experts_per_token=2,
    groups=4,
    groups_per_token=2,
    context=64,
    yarn=Yarn(factor=4.0, context=8),
    init_std=0.3,
)
LENGTH = 12


@functools.cache
def params():
    drawn = initial(specs(Kimi(CFG)), seed=1, std=CFG.init_std)
    rng = np.random.default_rng(0)

    def noisy(name, a):
        return jnp.asarray(np.asarray(a) + rng.uniform(0, 0.3, a.shape), "float32")

    return {n: noisy(n, a) if "norm" in n or n.endswith("bias") else a for n, a in drawn.items()}


@functools.cache
def tensors():
    """Under their published names, in double precision."""
    named = to_published(params(), specs(Kimi(CFG)))
    return {name: np.asarray(tensor, np.float64) for name, tensor in named}


def tokens(rows=2, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, CFG.vocab, (rows, length)).astype(np.int32)


@functools.cache
def main_output(length=LENGTH):
    f = jax.jit(lambda p, t: hidden(bind(Kimi(CFG), p), plain(t), CFG, Policy("float32"))[0])
    return np.asarray(f(params(), tokens(length=length)), np.float64)


def expected():
    """For each row, what the formulas give for each MTP layer."""
    rows = zip(main_output(), tokens(), strict=True)
    return [transcribed.mtp(x, t, tensors(), CFG, frequencies(CFG)) for x, t in rows]


def test_a_layer_of_the_transcription_is_transformers_layer():
    """So that what the MTP layers are held to is itself held to something."""
    gold = golden("deepseek")
    t = {n.removeprefix("weight/"): np.float64(a) for n, a in gold.arrays.items() if "/" in n}
    for number in range(gold.cfg.dense_layers, gold.cfg.layers):
        x, y = gold["residual"][2 * number], gold["residual"][2 * number + 2]
        for row in range(len(x)):
            found, _, _ = transcribed.layer(
                x[row].astype(np.float64), t, number, gold.cfg, frequencies(gold.cfg)
            )
            np.testing.assert_allclose(found, y[row], atol=1e-5)


def test_logits_are_those_of_the_reports_formulas():
    found = mtp.logits(params(), tokens(), cfg=CFG, dtype="float32")
    assert [y.shape for y in found] == [(2, LENGTH - k, CFG.vocab) for k in (1, 2)]
    for row, layers in enumerate(expected()):
        for y_BTX, (logits, _, _) in zip(found, layers, strict=True):
            np.testing.assert_allclose(y_BTX[row], logits, atol=1e-5)


def test_names_are_those_of_deepseeks_layer_61():
    leaves = specs(Kimi(dataclasses.replace(CFG, dense_layers=3, moe_layers=58, mtp_layers=1)))
    names = {leaf.published.format(l=61, e=0) for n, leaf in leaves.items() if n[:4] == "mtp."}
    stem = "model.layers.61."
    assert {stem + f"{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")} < names
    assert stem + "mlp.gate.e_score_correction_bias" in names
    assert all(leaf.first_layer == 61 for n, leaf in leaves.items() if n[:4] == "mtp.")
    assert leaves["mtp.join"].published_shape == (16, 32)
    assert leaves["embed"].copies == (stem + "embed_tokens.weight",)
    assert leaves["head"].copies == (stem + "shared_head.head.weight",)


RUN = RunConfig(
    model=CFG,
    data=DataConfig(rows=4, context=LENGTH),
    optim=OptimConfig(name="adamw", aux_loss=0.1, mtp_loss=0.5, warmup=0),
    train=TrainConfig(steps=2, dtype="float32", remat="full"),
)


def documents():
    """Rows of two documents and some padding, as `k2jax.data` makes them; the first 7 long."""
    token = tokens(rows=4)
    segment = np.repeat([[1] * 7 + [2] * 4 + [0]], 4, axis=0).astype(np.int32)
    follows = np.pad(segment[:, 1:] == segment[:, :-1], ((0, 0), (0, 1))) & (segment > 0)
    target = np.where(follows, np.pad(token[:, 1:], ((0, 0), (0, 1))), 0).astype(np.int32)
    position = np.repeat([[*range(7), *range(4), 0]], 4, axis=0).astype(np.int32)
    return Batch(token, target, follows.astype(np.float32), segment, position)


def in_parts(micro):
    """A program that takes its batch in micro-batches, and that batch."""
    program = build(
        dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, accumulate=micro))
    )
    return program, jax.tree.map(lambda a: jnp.asarray(a.reshape(micro, -1, LENGTH)), documents())


@functools.cache
def trained():
    """State and metrics after a step."""
    program, batch = in_parts(1)
    return jax.jit(program.step)(program.init(params()), batch)


def test_the_loss_is_the_mean_over_layers_of_what_is_scored_inside_documents():
    _, metrics = trained()
    batch = documents()
    forward = jax.jit(lambda p, t: hidden(bind(Kimi(CFG), p), plain(t), CFG, Policy("float32"))[0])
    nll, load = 0.0, np.zeros((CFG.mtp_layers, CFG.experts))
    tops = []
    for first, last in ((0, 7), (7, 11)):
        rows = batch.token[:, first:last]
        for x, token in zip(np.asarray(forward(params(), rows), np.float64), rows, strict=True):
            layers = transcribed.mtp(x, token, tensors(), CFG, frequencies(CFG))
            for k, (logits, top, counts) in enumerate(layers, 1):
                scored = logits[: len(token) - k - 1]
                log = scored - np.log(np.exp(scored).sum(axis=-1, keepdims=True))
                nll -= log[np.arange(len(scored)), token[k + 1 :]].sum()
                load[k - 1] += counts
                tops.append(top.max())
    expected_loss = nll / batch.weight.sum() / CFG.mtp_layers
    np.testing.assert_allclose(metrics["mtp_loss"], expected_loss, rtol=1e-5)
    np.testing.assert_array_equal(metrics["expert_load"][CFG.moe_layers :], load)
    assert metrics["logit_max"] >= max(tops) - 1e-5


def test_micro_batches_add_up_to_the_whole_batch():
    program, batch = in_parts(2)
    total = batch.weight.sum()
    loss = jax.jit(lambda p, micro: program.objective(p, micro._replace(total=total))[1])
    first, second = (loss(params(), jax.tree.map(lambda a, i=i: a[i], batch)) for i in (0, 1))
    _, metrics = trained()
    added = first.metrics["mtp_loss"] + second.metrics["mtp_loss"]
    np.testing.assert_allclose(added, metrics["mtp_loss"], rtol=1e-5)
    np.testing.assert_array_equal(first.load + second.load, metrics["expert_load"])
    _, shapes = jax.eval_shape(program.step, program.init(params()), batch)
    assert shapes["mtp_loss"].shape == ()
    assert shapes["expert_load"].shape == metrics["expert_load"].shape


def test_qk_clip_takes_an_mtp_layers_own_logits():
    leaves = {n: leaf for n, leaf in specs(Kimi(CFG)).items() if n.endswith((".q_up", ".kv_up"))}
    weights = {n: params()[n] for n in leaves}
    top = jnp.ones((4, CFG.heads)).at[3, 1].set(4.0)  # the second MTP layer, one head
    zero = jax.tree.map(jnp.zeros_like, weights)
    clip = qk_clip(2.0, leaves, nope=CFG.nope)
    moved, _ = clip.update(zero, clip.init(weights), weights, logit_max=top)
    assert {n for n, u in moved.items() if np.any(u)} == {
        "mtp.attention.q_up",
        "mtp.attention.kv_up",
    }
    q = moved["mtp.attention.q_up"]
    assert not np.any(q[0]) and not np.any(q[1][:, [0, 2, 3]])
    kept = 1 + q[1, :, 1] / weights["mtp.attention.q_up"][1, :, 1]
    np.testing.assert_allclose(kept, np.broadcast_to([0.5**0.5] * 4 + [0.5] * 4, kept.shape), 1e-5)


def test_a_step_moves_every_weight_and_each_bias_by_its_own_load():
    state, metrics = trained()
    before = params()
    moved = {name: float(np.abs(state.params[name] - before[name]).max()) for name in before}
    assert all(moved.values()), moved
    for name, rows in (("layers", slice(0, 1)), ("mtp", slice(1, 3))):
        load = np.asarray(metrics["expert_load"])[rows]
        sign = np.sign(load.mean(axis=1, keepdims=True) - load)
        step = RUN.optim.bias_rate * (sign - sign.mean(axis=1, keepdims=True))
        bias = f"{name}.moe.bias"
        np.testing.assert_allclose(state.params[bias] - before[bias], step, atol=1e-6)


def test_one_documents_predictions_do_not_depend_on_another():
    batch = documents()
    other = batch._replace(token=np.where(batch.segment == 2, 5, batch.token))
    other = other._replace(target=np.where(batch.segment == 2, 5, batch.target))

    @jax.jit
    def run(p, batch):
        w = bind(Kimi(CFG), p)
        x, aux = hidden(w, batch, CFG, Policy("float32"))
        return [f.x_BTD for f in mtp.mtp_forward(w, x, batch, aux, CFG, Policy("float32"))[0]]

    for k, (a, b) in enumerate(zip(run(params(), batch), run(params(), other), strict=True), 1):
        np.testing.assert_array_equal(a[:, : 7 - k], b[:, : 7 - k])  # the rest sees no token i + k
        assert np.abs(np.asarray(a[:, 7:10] - b[:, 7:10])).max() > 1e-3


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, expert=2, model=2), MeshConfig(expert=2, context=2, model=2)]
)
def test_a_mesh_gives_the_same_losses(mesh):
    program = build(dataclasses.replace(RUN, mesh=mesh))
    _, right = trained()
    with jax.set_mesh(sharding.make_mesh(mesh)):
        sharding.check_divisible(program.specs, mesh.sizes, LENGTH)

        def place(a, spec):
            return jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), spec))

        on_mesh = {
            n: place(a, sharding.storage_spec(program.specs[n].axes)) for n, a in params().items()
        }
        rows = sharding.storage_spec(("batch", "length"))
        batch = jax.tree.map(lambda a: place(a, rows), documents())
        _, aux = jax.jit(program.objective)(on_mesh, batch)
    np.testing.assert_allclose(aux.metrics["loss"], right["loss"], rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["mtp_loss"], right["mtp_loss"], rtol=1e-5)
    np.testing.assert_array_equal(aux.load, right["expert_load"])
    np.testing.assert_allclose(aux.logit_max.max(), right["logit_max"], rtol=1e-5)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match=r"optim.mtp_loss has no effect with model.mtp_layers 0"):
        run = dataclasses.replace(RUN, model=dataclasses.replace(CFG, mtp_layers=0))
        validate(run, ["optim.mtp_loss"])
    with pytest.raises(ConfigError, match=r"optim.mtp_loss is 0; it must be above 0"):
        validate(dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, mtp_loss=0)))


def test_published_configs_name_the_layers():
    fields = CASES["deepseek"]
    assert from_published(fields).mtp_layers == 0
    assert from_published(fields | {"num_nextn_predict_layers": 1}).mtp_layers == 1


def test_a_published_folder_loads_with_its_mtp_layer_or_without(tmp_path):
    fields = CASES["deepseek"] | {"num_nextn_predict_layers": 1}
    leaves = specs(Kimi(from_published(fields)))
    drawn = initial(leaves, seed=0, std=0.1)
    named = dict(to_published(drawn, leaves))
    stem = f"model.layers.{fields['num_hidden_layers']}."
    for name, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        np.testing.assert_array_equal(named[f"{stem}{name}.weight"], named[f"{main}.weight"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write(tmp_path / "model.safetensors", named)
    model = k2jax.load(tmp_path)
    assert model.config.mtp_layers == 1 and model.params.keys() == drawn.keys()
    for name, value in drawn.items():
        np.testing.assert_array_equal(model.params[name], value)
    write(tmp_path / "model.safetensors", named | {f"{stem}extra.weight": named["lm_head.weight"]})
    with pytest.raises(ConfigError, match=r"the model has no tensor 'model.layers.4.extra.weight'"):
        k2jax.load(tmp_path)
    # transformers leaves the layer out and keeps the config's word for it.
    kept = {name: tensor for name, tensor in named.items() if not name.startswith(stem)}
    write(tmp_path / "model.safetensors", kept)
    model = k2jax.load(tmp_path)
    assert model.config.mtp_layers == 0
    assert model.params.keys() == {name for name in drawn if not name.startswith("mtp.")}
