"""Whole matrices over all devices: the same updates, and nothing exchanged while iterating."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.optim import Matrices, scale_by_muon
from k2jax.params.route import newton_schulz_flops
from k2jax.planner.hlo import account

BOTH = ("data", "expert")
MESH = MeshConfig(data=2, expert=2, model=2)
STACK = Matrices((1,), (2,), (0,))
# Layout at rest, shape, matrices: of every kind that the plans have.
LEAVES = {
    "experts": (P(None, "expert", "data", "model"), (3, 4, 16, 8), Matrices((2,), (3,), (0, 1))),
    "wide": (P(None, "expert", "model", "data"), (3, 4, 8, 16), Matrices((2,), (3,), (0, 1))),
    "queries": (P(None, None, "model", None), (5, 6, 4, 8), Matrices((1,), (2, 3), (0,))),
    "out": (
        P(None, "model", None, BOTH),
        (5, 4, 8, 32),
        Matrices((1, 2), (3,), (0,)),
    ),
    "gate": (P(None, BOTH, "model"), (1, 16, 24), STACK),
    "down": (P(None, "model", BOTH), (1, 24, 16), STACK),
    "head": (P(None, None, "model"), (5, 8, 16), STACK),
    "plain": (P(None, None), (8, 8), Matrices()),
}
SPECS = {name: view for name, (_, _, view) in LEAVES.items()}


def gradients(names=LEAVES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(LEAVES[name][1], np.float32) for name in names}


def placed(grads):
    mesh = jax.sharding.get_mesh()
    return {n: jax.device_put(g, jax.NamedSharding(mesh, LEAVES[n][0])) for n, g in grads.items()}


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (MESH, {}),
        (MESH, {"shard_above_flops": 0}),  # every matrix is shared by several devices
        (MESH, {"slice_bytes": 700}),  # one or two matrices at a time
        (MeshConfig(replica=2, data=4), {}),
        (MeshConfig(), {}),
    ],
    ids=["whole", "shared", "slices", "replicas", "one device"],
)
def test_updates_are_those_without_a_mesh(mesh, settings):
    tx, grads = scale_by_muon(SPECS, dtype="float32", **settings), gradients()
    plain = scale_by_muon(SPECS, dtype="float32")
    right, _ = jax.jit(plain.update)(grads, plain.init(grads))
    with jax.set_mesh(sharding.make_mesh(mesh)):
        here = placed(grads)
        found, state = jax.jit(tx.update)(here, tx.init(here))
    for name, u in found.items():
        assert u.sharding.spec == here[name].sharding.spec == state.momentum[name].sharding.spec
        np.testing.assert_allclose(u, right[name], atol=2e-5, err_msg=name)


def compiled(names, settings=None) -> tuple[dict[str, list[str]], float]:
    """Kinds of collectives with the computation they are in, and FLOPs of products a device."""
    tx = scale_by_muon({n: SPECS[n] for n in names}, dtype="float32", **(settings or {}))
    with jax.set_mesh(sharding.make_mesh(MESH)):
        here = placed(gradients(names))
        text = jax.jit(tx.update).lower(here, tx.init(here)).compile().as_text()
    return collectives(text), account(text).flops


KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def collectives(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        kind = re.search(rf" ({KINDS})(?:-start)?\(", line)
        if kind:
            name = re.search(r'op_name="([^"]*)"', line)
            found.setdefault(kind[1], []).append(name[1] if name else "")
    return found


def test_whole_matrices_need_one_exchange_each_way_and_none_while_iterating():
    found, work = compiled(["experts"])
    assert {kind: len(where) for kind, where in found.items()} == {"all-to-all": 2}
    assert not any("while" in where for places in found.values() for where in places)
    count = 3 * 4 / 8
    assert work == pytest.approx(
        newton_schulz_flops(16, 8) * 2
    )  # 12 matrices on 8 devices: two at most
    assert work < 1.4 * newton_schulz_flops(16, 8) * count


def test_leaves_of_one_shape_share_devices_that_a_single_one_would_leave_idle():
    _, work = compiled(["gate", "down"])
    assert work == pytest.approx(newton_schulz_flops(16, 24))  # each on a device of its own


def test_a_replicated_leaf_is_picked_from_and_gathered():
    found, work = compiled(["queries"])
    assert set(found) == {"all-to-all", "all-gather"}
    assert not any("while" in where for places in found.values() for where in places)
    assert work == pytest.approx(
        newton_schulz_flops(6, 32)
    )  # one of five matrices on each of eight devices


def test_a_large_matrix_is_divided_over_all_devices():
    found, work = compiled(["gate"], {"shard_above_flops": 0})
    inside = {k: sum("while" in where for where in w) for k, w in found.items()}
    # The Gram matrix is summed (exchanged and gathered), the polynomial gathered.
    assert {kind: n for kind, n in inside.items() if n} == {"all-to-all": 1, "all-gather": 2}
    assert work == pytest.approx(newton_schulz_flops(16, 24) / 8)


def test_bfloat16_is_exchanged_as_such():
    tx = scale_by_muon({"experts": SPECS["experts"]})
    with jax.set_mesh(sharding.make_mesh(MESH)):
        here = placed(gradients(["experts"]))
        text = str(jax.jit(tx.update).trace(here, tx.init(here)).jaxpr)
    moved = re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = all_to_all", text)
    assert set(moved) == {"bf16"} and len(moved) == 2
