"""On any mesh the model computes what it computes on one device; packing changes nothing either."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.read import golden

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.model import Batch, Dispatch, Kimi, Policy, hidden, losses
from k2jax.params.arrays import bind
from k2jax.params.declare import specs

GOLD = golden("kimi")
ROWS, LENGTH = 8, 16
# max abs difference over max abs of that array; sums in another order are all that differs
TOLERANCE = 1e-5

MESHES = [
    pytest.param(MeshConfig(data=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(replica=2), marks=pytest.mark.slow),
    MeshConfig(expert=2),
    MeshConfig(model=2),
    MeshConfig(context=2),
    MeshConfig(data=2, expert=2, model=2),
    MeshConfig(data=2, expert=2, context=2),
    MeshConfig(replica=2, data=2, context=2),
]


def packed() -> Batch:
    """Rows of two documents each; the second half of them ends in padding."""
    rng = np.random.default_rng(5)
    token = rng.integers(0, GOLD.cfg.vocab, (ROWS, LENGTH + 1))
    segment, position = np.zeros((2, ROWS, LENGTH), np.int32)
    weight = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        cut, end = 5 + row, LENGTH - (row - 3 if row >= ROWS // 2 else 0)
        for number, (first, last) in enumerate([(0, cut), (cut, end)], start=1):
            segment[row, first:last] = number
            position[row, first:last] = np.arange(last - first)
            weight[row, first : last - 1] = 1.0  # the next document's first token is no target
    return Batch(
        token[:, :-1].astype(np.int32), token[:, 1:].astype(np.int32), weight, segment, position
    )


def half(batch: Batch, apart: bool) -> Batch:
    """The documents of half of the rows: each in a row of its own, or packed and rows of padding.

    As many rows as before, so that nothing is compiled again.
    """
    if not apart:

        def blank(a):
            return np.concatenate([a[2:6], np.zeros_like(a[2:6])])

        return jax.tree.map(blank, batch)

    def rows(a: np.ndarray) -> np.ndarray:
        own = [a[row][batch.segment[row] == number] for row in range(2, 6) for number in (1, 2)]
        return np.stack([np.pad(tokens, (0, LENGTH - len(tokens))) for tokens in own])

    return jax.tree.map(rows, batch)._replace(segment=(rows(batch.segment) > 0).astype(np.int32))


GATHER = Dispatch()
LEAVES = specs(Kimi(GOLD.cfg))
BIAS = [name for name, leaf in LEAVES.items() if leaf.group == "bias"]


@functools.partial(jax.jit, static_argnums=4)
@functools.partial(jax.value_and_grad, has_aux=True)
def gradients(trained, fixed, batch, weight, dispatch):
    w = bind(Kimi(GOLD.cfg), trained | fixed)
    policy = Policy("float32", dispatch=dispatch)
    x, aux = hidden(w, batch, GOLD.cfg, policy)
    nll = (losses(w.head, x, batch.target, policy) * batch.weight).sum() / batch.weight.sum()
    return nll + weight * aux.aux_loss, (nll, aux)


def computed(
    batch: Batch, config: MeshConfig | None = None, weight: float = 0.1, dispatch=GATHER
) -> dict:
    """Loss, its parts and its gradients, of the whole batch; `weight` is the balance loss's."""

    def run(put):
        params = {name: put(value, LEAVES[name].axes) for name, value in GOLD.params().items()}
        fixed = {name: params.pop(name) for name in BIAS}
        arrays = jax.tree.map(lambda a: put(a, ("batch", "length")), batch)
        (_, (nll, aux)), grads = gradients(params, fixed, arrays, jnp.float32(weight), dispatch)
        fields = {"loss": nll} | aux._asdict()
        del fields["metrics"]  # an objective's, and here there is none
        return fields | {f"gradient of {n}": g for n, g in grads.items()}

    if config is None:
        result = run(lambda a, axes: jnp.asarray(a))
    else:
        mesh = sharding.make_mesh(config)

        def place(axes):
            return jax.NamedSharding(mesh, sharding.storage_spec(axes))

        with jax.set_mesh(mesh):
            result = run(lambda a, axes: jax.device_put(a, place(axes)))
    return jax.tree.map(np.asarray, result)


@functools.cache
def whole() -> dict:
    return computed(packed())


def assert_close(found: dict, right: dict, names=None) -> None:
    errors = {
        name: np.abs(found[name] - right[name]).max() / max(np.abs(right[name]).max(), 1e-30)
        for name in names or right
    }
    worst = max(errors, key=errors.get)
    sys.stdout.write(f"\n{errors[worst]:.1e} {worst}")  # shown with pytest -s
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


def test_the_batch_has_no_choice_on_the_edge_and_a_gradient_for_every_weight():
    assert all(np.abs(value).max() > 0 for name, value in whole().items() if name != "dropped")
    assert 1.0 < whole()["aux_loss"] < 3.0
    choices = packed().segment.astype(bool).sum() * GOLD.cfg.experts_per_token
    np.testing.assert_array_equal(whole()["load"].sum(axis=1), choices)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_statistics_and_gradients_are_those_of_one_device_on(mesh):
    assert_close(computed(packed(), mesh), whole())


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, expert=2, model=2), MeshConfig(expert=2, context=2)], ids=str
)
def test_an_exchange_in_rounds_gives_those_of_one_device_on(mesh):
    assert_close(computed(packed(), mesh, dispatch=Dispatch("alltoall", 0.75)), whole())


def test_packed_documents_are_computed_as_if_each_had_its_row():
    together = computed(half(packed(), apart=False), weight=0.0)
    apart = computed(half(packed(), apart=True), weight=0.0)
    np.testing.assert_array_equal(together["load"], apart["load"])
    # The balance loss is per row, so it is the one thing that packing may change.
    assert_close(together, apart, [name for name in apart if name != "aux_loss"])
