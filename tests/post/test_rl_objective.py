"""What a step of reinforcement learning minimises, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from small_model import SIZES

from k2jax import sharding
from k2jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from k2jax.inference.engine import Engine
from k2jax.inference.request import EngineSettings, Request
from k2jax.model import Batch, Model
from k2jax.params.arrays import initial
from k2jax.params.kimi import declare_kimi
from k2jax.post.rl_config import RlConfig
from k2jax.post.rl_objective import empty_rows, make_objective, put_rows, read_rows
from k2jax.post.samples import add_curated
from k2jax.training.objective import language_model
from k2jax.training.step import compute_gradients, split_trainable

MODEL = ModelConfig(**SIZES)
RUN = RunConfig(
    model=MODEL,
    data=DataConfig(rows=4, context=8),
    train=TrainConfig(dtype="float32", remat="none"),
)


def draw_rows(rows=4, length=8, seed=0):
    draw = np.random.default_rng(seed)
    fields = empty_rows(rows, length, MODEL)
    ids = draw.integers(0, MODEL.vocab, (rows, length + 1))
    fields["token"][:], fields["target"][:] = ids[:, :-1], ids[:, 1:]
    fields["segment"][:], fields["position"][:] = 1, np.arange(length)
    fields["weight"][:, length // 2 :] = 1
    fields["old"][:] = draw.normal(-6.0, 0.3, (rows, length))
    fields["advantage"][:], fields["share"][:] = draw.normal(size=rows), 1 / rows
    # Of every second token another pass's experts are known.
    known = fields["expert"][:, ::2]
    first = draw.integers(0, MODEL.experts, known.shape[:-1])
    known[..., 0], known[..., 1] = first, (first + 1) % MODEL.experts
    return fields


def draw_curated(rows=4, length=8):
    fields = draw_rows(rows, length, seed=1)
    names = {"tokens": "token", "targets": "target", "weights": "weight", "segments": "segment"}
    return {name: fields[ours] for name, ours in (names | {"positions": "position"}).items()}


def gradients(run, rl, rows, params):
    specs = declare_kimi(MODEL)
    trainable, fixed = split_trainable(params, specs)
    objective = make_objective(run, rl)
    batch = put_rows(rows, run.train.accumulate)
    grads, aux = jax.jit(lambda t, f, b: compute_gradients(objective, t, f, b))(
        trainable, fixed, batch
    )
    return jax.device_get(grads), jax.device_get(aux.metrics)


def params_of():
    return initial(declare_kimi(MODEL), 0, 0.3)


def test_micro_batches_add_up_and_ptx_is_the_loss_of_pretraining():
    rl, params = RlConfig(ptx=0.5, temperature=1.3, replay_routing=True), params_of()
    rows = draw_rows()
    rows["temperature"][:] = [1.3, 1.2, 1.1, 1.0]
    whole = gradients(RUN, rl, add_curated(rows, draw_curated(), RUN), params)
    halved = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, accumulate=2))
    parts = gradients(halved, rl, add_curated(rows, draw_curated(), halved), params)
    for name, grad in whole[0].items():
        np.testing.assert_allclose(parts[0][name], grad, atol=2e-5 * np.abs(grad).max())
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-4, err_msg=name)
    curated = draw_curated()
    batch = Batch(*(curated[k] for k in ("tokens", "targets", "weights", "segments", "positions")))
    expected = jax.jit(language_model(RUN))(params, batch)[0]
    np.testing.assert_allclose(whole[1]["ptx_loss"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared", "grpo", "token_clip"])
def test_a_mesh_gives_the_gradients_of_one_device(loss):
    rl = RlConfig(ptx=0.5, loss=loss, replay_routing=loss == "squared")
    rows = add_curated(draw_rows(), draw_curated(), RUN)
    one = gradients(RUN, rl, rows, params_of())
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2, context=2))):
        many = gradients(RUN, rl, rows, params_of())
    for name, grad in one[0].items():
        np.testing.assert_allclose(many[0][name], grad, atol=5e-5 * np.abs(grad).max())
    for name in ("loss", "experts_differ"):
        np.testing.assert_allclose(many[1][name], one[1][name], rtol=1e-4)


def test_experts_that_differ_are_counted_and_with_replay_none_do():
    params = params_of()
    prompt = tuple(range(5, 13))
    settings = EngineSettings(rows=2, cache_tokens=64, experts=True)
    (result,) = Engine(Model(MODEL, params), settings).run([Request(prompt, 1)])
    rows = draw_rows(rows=1)
    rows["token"][0], rows["expert"][0] = prompt, result.experts
    plain, replay = RlConfig(), RlConfig(replay_routing=True)

    def read(rl, rows):
        (logprob_BT, _), aux = jax.jit(lambda p, b: read_rows(p, b, RUN, rl, "none"))(
            params, jax.tree.map(lambda a: a[0], put_rows(rows, 1))
        )
        return np.asarray(logprob_BT), float(aux.metrics["experts_differ"])

    (own, differ), (replayed, none) = read(plain, rows), read(replay, rows)
    assert (differ, none) == (0.0, 0.0)
    np.testing.assert_array_equal(own, replayed)
    other = next(e for e in range(MODEL.experts) if e not in result.experts[3, 0])
    rows["expert"][0, 3, 0, 1] = other
    (same, differ), (replayed, none) = read(plain, rows), read(replay, rows)
    assert (differ, none) == (pytest.approx(1 / result.experts.size), 0.0)
    np.testing.assert_array_equal(own, same)
    assert abs(own - replayed)[0, :3].max() == 0 and abs(own - replayed)[0, 3] > 0
