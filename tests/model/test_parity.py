"""The model against transformers' DeepseekV3ForCausalLM.

From golden files everywhere; with torch and transformers installed (extra `parity`), live with
other sizes and in bfloat16. `golden/make.py` says where transformers leaves the published code.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, varied
from golden.read import NAMES, Golden, golden, wrap

import k2jax
from k2jax.model import Kimi, Policy, head, hidden, kimi, moe, plain
from k2jax.params.arrays import bind
from k2jax.weights.safetensors import write

HIDDEN = 1e-5  # float32, max abs
GRADIENT = 1e-4  # max abs difference over max abs of that tensor
TIE = 1e-6  # choices nearer than this may go either way


@dataclasses.dataclass
class Ours:
    loss: float
    logits: np.ndarray
    hidden: np.ndarray
    residual: np.ndarray  # before every norm: twice a layer, and once at the end
    choice: np.ndarray
    grads: dict
    logit_max: np.ndarray
    load: np.ndarray


def loss_of(params, token, cfg, dtype):
    """Mean cross entropy of the next tokens."""
    w = bind(Kimi(cfg), params)
    policy = Policy(dtype)
    x, aux = hidden(w, plain(token), cfg, policy)
    logits = head(w.head, x, policy)
    log = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(log, token[:, 1:, None], axis=-1).mean()
    return loss, (logits, x, aux)


def say(line: str) -> None:
    """Shown with `pytest -s`."""
    sys.stdout.write(f"\n{line}")


def computed(gold: Golden, dtype: str = "float32") -> Ours:
    """Our side, in one compilation; what passes between layers is recorded on the way.

    Gradients in float32 only.
    """
    residual, choice = [], []
    norm, route = kimi.rms_norm, moe.route

    def recording_norm(x, *args):
        jax.debug.callback(lambda v: residual.append(np.array(v, np.float32)), x, ordered=True)
        return norm(x, *args)

    def recording_route(*args):
        routing = route(*args)
        jax.debug.callback(
            lambda v: choice.append(np.sort(v, axis=-1)), routing.expert_NK, ordered=True
        )
        return routing

    params = jax.tree.map(jnp.asarray, gold.params(dtype=dtype))
    trained = {name: leaf for name, leaf in params.items() if not name.endswith("bias")}
    fixed = {name: leaf for name, leaf in params.items() if name not in trained}
    token = jnp.asarray(gold["token"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kimi, "rms_norm", recording_norm)
        patch.setattr(moe, "route", recording_route)

        def f(p):
            return loss_of(p | fixed, token, gold.cfg, dtype)

        if dtype == "float32":
            f = jax.value_and_grad(f, has_aux=True)
            (loss, (logits, x, aux)), grads = jax.jit(f)(trained)
        else:
            (loss, (logits, x, aux)), grads = jax.jit(f)(trained), {}
        jax.effects_barrier()

    def wide(a):
        return np.asarray(a, np.float32)

    return Ours(
        float(loss),
        wide(logits),
        wide(x),
        np.stack(residual),
        np.stack(choice),
        jax.tree.map(wide, grads),
        wide(aux.logit_max),
        wide(aux.load),
    )


def assert_equal(ours: Ours, gold: Golden) -> None:
    """All of it, in float32."""
    far = gold["margin"] > TIE
    same = (ours.choice == gold["choice"]).all(axis=-1)
    assert same[far].all(), "another expert was chosen"
    say(f"choices {far.size}, near ties {(~far).sum()}, of them different {(~same).sum()}")

    def error(a, b):
        return float(np.abs(a - b).max())

    hidden_error = max(error(ours.residual, gold["residual"]), error(ours.hidden, gold["hidden"]))
    logits_error = error(ours.logits, gold["logits"])
    top_error = error(ours.logit_max, gold["logit_max"])
    theirs = gold.params("grad")
    relative = {
        name: error(grad, theirs[name]) / np.abs(theirs[name]).max()
        for name, grad in ours.grads.items()
    }
    worst = max(relative, key=relative.get)
    say(
        f"hidden {hidden_error:.1e}, logits {logits_error:.1e}, logit_max {top_error:.1e},"
        f" loss {abs(ours.loss - gold['loss']):.1e}, gradient {relative[worst]:.1e} ({worst})"
    )
    assert ours.residual.shape == gold["residual"].shape
    assert hidden_error <= HIDDEN
    assert logits_error <= HIDDEN
    assert top_error <= HIDDEN
    assert abs(ours.loss - gold["loss"]) <= HIDDEN
    assert relative[worst] <= GRADIENT, worst
    counts = [np.bincount(c.ravel(), minlength=gold.cfg.experts) for c in ours.choice]
    np.testing.assert_array_equal(ours.load, counts)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_logits_routing_and_gradients_equal_the_golden_files(name):
    assert_equal(computed(golden(name)), golden(name))


def bfloat16_errors(ours: np.ndarray, theirs: np.ndarray, agree: np.ndarray) -> tuple[float, float]:
    """Over the tokens that agree, in units of the logits' std: RMS, and the median token's worst.

    A token agrees where neither it nor an earlier one of its row was routed differently: another
    expert is no rounding error, and attention passes it on.
    """
    same = np.logical_and.accumulate(agree.all(axis=0).reshape(ours.shape[:2]), axis=1)
    gap = np.abs(ours - theirs)[same] / theirs.std()
    say(f"tokens compared {same.sum()} of {same.size}: RMS {np.sqrt((gap**2).mean()):.4f},")
    say(f"median of the tokens' worst {np.median(gap.max(axis=-1)):.3f}, worst {gap.max():.3f}")
    return float(np.sqrt((gap**2).mean())), float(np.median(gap.max(axis=-1)))


# bfloat16 keeps 8 bits: each of the 6 to 8 additions to the residual stream rounds it by up to
# 2^-9 of itself, and so do the products before. Measured over nine models: RMS 0.009-0.021 of the
# logits' std, median token's worst 0.028-0.068.
BFLOAT16_RMS, BFLOAT16_MEDIAN = 0.04, 0.1


@pytest.mark.parametrize("name", ["kimi"])
def test_bfloat16_logits_are_within_a_few_percent_of_the_golden_float32_ones(name):
    gold = golden(name)
    ours = computed(gold, "bfloat16")
    agree = (ours.choice == gold["choice"]).all(axis=-1)
    assert agree.mean() > 0.9
    rms, median = bfloat16_errors(ours.logits, gold["logits"], agree)
    assert rms < BFLOAT16_RMS
    assert median < BFLOAT16_MEDIAN


@functools.cache
def maker():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from golden import make

    return make


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_what_transformers_computes(name):
    again = maker().oracle(CASES[name], NAMES.index(name))
    for key, value in golden(name).arrays.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(again[key], value, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [11, 12])
def test_models_of_random_sizes_equal_transformers(name, seed):
    gold = wrap(maker().oracle(varied(name, seed), seed))
    assert_equal(computed(gold), gold)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_forward_equals_transformers_in_bfloat16_within_rounding(name):
    torch = pytest.importorskip("torch")
    fields, seed = varied(name, 11), 11
    exact = maker().oracle(fields, seed)
    theirs = maker().oracle(fields, seed, torch.bfloat16)
    ours = computed(wrap(exact), "bfloat16")
    agree = (ours.choice == theirs["choice"]).all(axis=-1)
    assert agree.mean() > 0.9
    rms, median = bfloat16_errors(ours.logits, theirs["logits"], agree)
    assert rms < BFLOAT16_RMS
    assert median < BFLOAT16_MEDIAN

    # And rounding takes us no farther from float32 than it takes transformers.
    def distance(logits):
        return np.sqrt(((logits - exact["logits"]) ** 2).mean())

    say(f"from float32: ours {distance(ours.logits):.4f}, theirs {distance(theirs['logits']):.4f}")
    assert distance(ours.logits) < 1.25 * distance(theirs["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_published_tensors_load_into_the_parameters_the_golden_tests_use(name, tmp_path):
    gold = golden(name)
    tensors = {
        key.removeprefix("weight/"): value
        for key, value in gold.arrays.items()
        if key.startswith("weight/")
    }
    write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(str(gold["config"]))
    assert_loaded(k2jax.load(tmp_path), gold)


def assert_loaded(model: k2jax.Model, gold: Golden) -> None:
    assert model.config == gold.cfg
    right = gold.params()
    assert model.params.keys() == right.keys()
    for key, value in right.items():
        np.testing.assert_array_equal(np.asarray(model.params[key], np.float32), value, key)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_that_transformers_saved_loads_and_computes_the_same(name, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    model = maker().build(CASES[name], NAMES.index(name))
    bias = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    kept = {n: b.clone() for n, b in bias.items()}
    model = model.to(getattr(torch, dtype))
    for n, b in model.named_buffers():
        b.data = kept.get(n, b.data)  # transformers keeps the router bias in float32
    model.save_pretrained(tmp_path)
    loaded, gold = k2jax.load(tmp_path), golden(name)
    assert_loaded(loaded, gold)
    assert loaded.dtype == dtype
    if dtype == "float32":
        logits = k2jax.forward(loaded, gold["token"])
        assert np.abs(logits - gold["logits"]).max() <= HIDDEN
