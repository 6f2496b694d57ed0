"""In someone else's training loop, with nothing of ours loaded but the transforms."""

import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import k2jax.optim
from k2jax.optim import (
    Matrices,
    ParamSpec,
    muon,
    muonclip,
    qk_clip,
    warmup_stable_decay,
)

OURS = {"k2jax", "k2jax.optim", "k2jax.config", "k2jax.params"}
OURS |= {f"k2jax.params.{name}" for name in ("spec", "matrices", "route")}


def shown(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_it_loads_jax_and_optax_only():
    code = """
    import sys
    import jax, optax
    before = set(sys.modules)
    import k2jax.optim
    new = {name for name in set(sys.modules) - before}
    print(sorted(n for n in new if n.split('.')[0] not in sys.stdlib_module_names))
    """
    new = set(re.findall(r"'([^']+)'", shown(textwrap.dedent(code))))
    assert {name for name in new if not name.startswith(("k2jax.optim.", "k2jax.config."))} <= OURS


def test_the_loop_of_the_docstring_learns():
    lines = textwrap.dedent(k2jax.optim.__doc__.split("seen):\n")[1])
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    code = f"""
import jax.numpy as jnp
params = {{"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}}
batch = (jnp.eye(4), jnp.arange(32.0).reshape(4, 8) / 32)
def loss_of(p, batch):
    return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)
{lines}
for _ in range(60):
    params, state, loss = step(params, state, batch)
first = loss_of({{"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}}, batch)
print(float(loss) < 0.2 * float(first))
"""
    assert shown(code) == "True"


@pytest.mark.parametrize("make", [muon, muonclip])
def test_a_rate_can_be_set_between_steps(make):
    params = {"w": jnp.eye(4)}
    tx = optax.inject_hyperparams(make)(learning_rate=2e-2, steps=4)
    state = tx.init(params)
    update = jax.jit(tx.update)
    first, state = update(params, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(1e-2)
    again = tx.init(params)._replace(hyperparams=state.hyperparams)
    second, _ = update(params, again, params)
    np.testing.assert_allclose(first["w"], 2 * second["w"], rtol=1e-6)


def test_bfloat16_weights_get_bfloat16_updates():
    params = {"w": jnp.ones((4, 8), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    tx = optax.apply_if_finite(muonclip(1e-2), 3)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: muonclip(-1.0), "learning_rate is -1.0; it must be at least 0"),
        (lambda: muonclip(None), "learning_rate is None; it must be a number"),
        (lambda: muonclip(float("nan")), "learning_rate is nan"),
        (lambda: muonclip(1e-2, momentum=1.5), "momentum is 1.5; it must be in 0..1"),
        (lambda: muonclip(1e-2, weight_decay=-1), "weight_decay is -1"),
        (lambda: muonclip(1e-2, ns_dtype="int8"), "dtype is 'int8'; there are: float64"),
        (lambda: muonclip(1e-2, momentum_dtype="f8"), "momentum_dtype is 'f8'"),
        (lambda: muonclip(1e-2, adam={"b1": 2.0}), "adam b1 is 2.0"),
        (lambda: qk_clip(0.0, {}), "tau is 0.0; it must be at least"),
        (lambda: qk_clip(100.0, {}, alpha=2), "alpha is 2; it must be in 0..1"),
        (lambda: warmup_stable_decay(1.0, 9, warmup=-5, decay=0.1, final=0.1), "warmup is -5"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_when_the_optimizer_is_made(make, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


@pytest.mark.parametrize("specs", ["adam", {}])
def test_specs_that_name_nothing_are_refused(specs):
    with pytest.raises(ValueError, match="must be a tree with the parameters' names"):
        muonclip(1e-2, specs=specs).init({"w": jnp.ones((4, 8))})


def test_the_specs_of_the_docstring_clip_ones_own_attention():
    def head(kind):
        return ParamSpec(("embed", "heads", kind), (16, 2, 4), 1, "muon")

    specs = {"q": head("qk"), "k": head("k"), "v": Matrices((0,), (1, 2)), "norm": "adam"}
    params = {name: jnp.ones((16, 2, 4)) for name in "qkv"} | {"norm": jnp.ones(16)}
    tx = muonclip(0.0, specs=specs, tau=100.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, logit_max=jnp.array([[400.0, 50.0]]))
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["q"][0, :, 0], [0.5, 1.0], rtol=1e-6)  # sqrt(100 / 400)
    np.testing.assert_allclose(moved["k"][0, :, 0], [0.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(moved["v"], params["v"])


def test_a_matrix_without_numbers_stays():
    params = {"none": jnp.ones((0, 4)), "w": jnp.ones((4, 8))}
    tx = muonclip(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["none"].shape == (0, 4)
