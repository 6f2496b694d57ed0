"""Formulas against the declarations, hand-made sums and the specification's counts."""

import itertools
import math

import pytest

from k2jax import configs
from k2jax.config import MeshConfig, override
from k2jax.ops.limits import ATTENTION_BLOCK
from k2jax.params.counts import count_flops
from k2jax.params.declare import Declare
from k2jax.params.kimi import Attention, declare_kimi
from k2jax.params.route import newton_schulz_flops
from k2jax.planner import cost, network, newton, targets, traffic
from k2jax.planner import hbm as memory
from k2jax.planner import step_flops as work
from k2jax.planner.estimate import estimate
from k2jax.planner.partition import count_shards
from k2jax.planner.step_flops import Case
from k2jax.runtime import hardware
from k2jax.sharding import torus
from k2jax.training.step import build

K2 = configs.load("kimi_k2")
V5P = targets.parse("v5p:8x8x16")
ONE_ROW = override(K2, {"data.rows": "1024", "train.accumulate": "1"})


def test_a_weight_that_the_model_declares_is_planned(monkeypatch):
    declare_attention = Attention.__init__

    def declare_odd(self, cfg, stack):
        declare_attention(self, cfg, stack)
        self.odd = Declare(cfg, stack)("embed latent", 1, "odd")

    monkeypatch.setattr(Attention, "__init__", declare_odd)
    declare_kimi.cache_clear()
    try:
        odd = memory.arguments(Case(K2, K2.mesh, 1))["weights"]
    finally:
        declare_kimi.cache_clear()
    monkeypatch.undo()
    usual = memory.arguments(Case(K2, K2.mesh, 1))["weights"]
    assert odd - usual == 4 * 61 * 7168 * 576 / K2.mesh.expert  # `embed` is split over `expert`


@pytest.mark.parametrize("name", ["kimi_k2", "moonlight_16b_a3b", "deepseek_v3"])
def test_arguments_are_the_bytes_of_the_traced_state(name):
    from k2jax import sharding

    run = configs.load(name)
    with sharding.use_abstract_mesh(run.mesh):
        state, batch = build(run).abstract_state(), build(run).abstract_batch()
    import jax

    def held(tree):
        arrays = jax.tree.leaves(tree)
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)

    case = Case(run, run.mesh, run.train.accumulate)
    found = memory.arguments(case)
    assert found["weights"] == held(state.params)
    assert found["optimizer"] == pytest.approx(held(state.opt), rel=1e-6)  # two counts of steps
    assert found["batch"] == held(batch)


def test_newton_schulz_of_k2_is_the_known_share_and_the_busiest_chip_near_it():
    muon = [leaf for leaf in declare_kimi(K2.model).values() if leaf.group == "muon"]
    work = sum(math.prod(leaf.stack) * newton_schulz_flops(*leaf.matrix) for leaf in muon)
    share = work / 1024
    assert share == pytest.approx(47e12, rel=0.02)
    case = Case(ONE_ROW, MeshConfig(data=16, expert=32, model=2), 1)
    assert share <= newton.optimizer_flops(case) < 1.2 * share


def test_work_of_a_step_with_nothing_repeated_is_what_counts_as_useful():
    run = override(ONE_ROW, {"train.remat": "none"})
    case = Case(run, MeshConfig(data=1024), 1)
    # Half of the blocks on the diagonal is hidden; the backward pass makes scores and logits anew.
    hidden = 3 * 2 * 61 * 64 * 320 * (ATTENTION_BLOCK - 1) / 2
    again = 2 * 61 * 64 * 192 * (4096 + ATTENTION_BLOCK) / 2 + 2 * 163_840 * 7168
    assert work.step_flops(case) == pytest.approx(
        (count_flops(run.model, 4096)["train_flops_per_token"] + hidden + again) * 4096
    )


def test_a_gathered_weight_travels_as_rings_do():
    wire: network.Wire = {}
    mesh = MeshConfig(data=4, expert=2)
    network.add(wire, "all-gather", ["data", "expert"], mesh, 800.0)
    network.add(wire, "all-reduce", ["data"], mesh, 400.0)
    network.add(wire, "all-reduce", ["model"], mesh, 400.0)
    assert wire == {"all-gather": {"data+expert": 700.0}, "all-reduce": {"data": 600.0}}


def test_one_device_sends_nothing_and_holds_everything():
    found = estimate(ONE_ROW, MeshConfig(), 1, V5P)
    assert found.wire == {}
    assert found.arguments["weights"] == 4 * 1_026_408_232_448
    assert not found.fits


def test_expert_traffic_by_gathering_and_by_exchange():
    mesh = MeshConfig(data=32, expert=32)
    rows = 60 * 2 * 4096 * 7168  # bf16 rows of a device's tokens, all layers

    def sent(way):
        return traffic.step_wire(Case(override(ONE_ROW, {"train.dispatch": way}), mesh, 1))

    gather, exchange = sent("allgather"), sent("alltoall")

    # Forward, again, backward; and back twice.
    def more(kind):
        return gather[kind]["expert"] - exchange[kind]["expert"]

    assert more("all-gather") == pytest.approx(3 * 31 * rows)
    assert more("reduce-scatter") == pytest.approx(2 * 31 * rows)
    looked_up = 2 * rows / 60  # in the table of embeddings, and their gradients
    sent_to = exchange["all-to-all"]["expert"]
    assert sent_to == pytest.approx((5 * 8 * rows + looked_up) * 31 / 32)


def test_offloading_moves_the_inputs_of_layers_to_the_host():
    mesh = MeshConfig(data=8, expert=128)
    full, away = (
        Case(override(ONE_ROW, {"train.remat": remat}), mesh, 1) for remat in ("full", "offload")
    )
    inputs = 61 * 2 * 4096 * 7168  # bf16, a device
    moved = memory.activations(full) - memory.activations(away)
    assert moved == pytest.approx(inputs * 59 / 61)  # one on its way, one in use
    assert (memory.offloaded(full, 4), memory.offloaded(away, 4)) == (0, 4 * inputs)
    assert work.step_flops(away) == work.step_flops(full)
    assert traffic.step_wire(away) == traffic.step_wire(full)


def test_more_micro_batches_need_less_memory_and_send_more():
    mesh = MeshConfig(data=16, expert=32, model=2)
    few, many = (estimate(K2, mesh, n, V5P) for n in (8, 32))
    assert many.peak < few.peak
    assert traffic.total(many.wire) > traffic.total(few.wire)
    assert many.flops == pytest.approx(few.flops)


def test_what_is_stored_over_an_axis_is_used_whole():
    leaf = declare_kimi(K2.model)["layers.attention.q_down"]
    assert count_shards(leaf, K2.mesh) == 128
    assert count_shards(leaf, K2.mesh, gathered=True) == 1


def test_money_hours_and_energy_of_a_known_stay():
    target = targets.parse("h100:2x8", dollars=2.0, watts=1000.0)
    assert cost.cost(target, 7200) == {
        "hours": 2.0,
        "chip_hours": 32.0,
        "dollars": 64.0,
        "kwh": 32.0,
    }
    assert cost.training(target, 3600, 100, 250)["hours"] == 3.0  # whole steps
    assert cost.generating(target, 0.036, 10)["hours"] == pytest.approx(1.0)


def test_axes_in_a_node_are_fast_and_those_between_are_not():
    target = targets.parse("h200:4x8")
    mesh = MeshConfig(data=4, model=8)
    assert network.bandwidth(["model"], mesh, target, "all-gather") == 450e9
    assert network.bandwidth(["data"], mesh, target, "all-gather") == 50e9
    both = network.bandwidth(["data", "model"], mesh, target, "all-gather")
    assert both == 400e9  # eight cards at once
    assert network.bandwidth(["data", "model"], mesh, target, "all-to-all") < 100e9


def test_a_torus_gives_its_links_and_slices_their_own_network():
    mesh = MeshConfig(data=8, expert=128)
    assert network.bandwidth(["data"], mesh, V5P, "all-gather") == 100e9  # a ring of every other
    assert network.bandwidth(["expert"], mesh, V5P, "all-gather") == 500e9
    # 1 link of 100 GB/s for 128 parts, of which 127 are sent.
    assert network.bandwidth(["expert"], mesh, V5P, "all-to-all") == 100e9 * 127 / 128
    slices = targets.parse("2*v5p:8x8x8")
    wide = MeshConfig(replica=2, data=8, expert=8, model=8)
    assert network.bandwidth(["replica"], wide, slices, "all-reduce") == 6.25e9


def test_devices_of_a_chip_are_nearer_than_any_link():
    mesh = MeshConfig(data=256, model=2)
    target = targets.parse("tpu7x:4x8x8")
    assert network.bandwidth(["model"], mesh, target, "all-reduce") == target.chip.bandwidth / 2


@pytest.mark.parametrize("target", ["v5p:8x8x16", "v5p:4x8x16", "tpu7x:4x8x8", "v6e:8x16"])
@pytest.mark.parametrize(
    "sizes",
    [{"expert": 128}, {"expert": 32}, {"expert": 16, "context": 4}, {"expert": 8, "model": 8}],
)
def test_no_other_way_to_lay_the_mesh_makes_k2_a_sixth_faster(target, sizes, monkeypatch):
    found = targets.parse(target)
    mesh = MeshConfig(data=found.devices // math.prod(sizes.values()), **sizes)
    run = override(ONE_ROW, {"data.rows": str(found.devices)})
    wire = estimate(run, mesh, 1, found).wire
    ours = network.seconds(wire, mesh, found)
    for dims in itertools.permutations(range(len(found.shape))):
        monkeypatch.setattr(torus, "order", lambda *_, dims=dims: dims)
        assert ours < network.seconds(wire, mesh, found) * 7 / 6


def test_one_matrix_a_head_is_routed_as_such():
    per_head = override(ONE_ROW, {"optim.matrix_view": "per_head"})
    mesh = MeshConfig(data=8, expert=128)

    def of(run):
        return sum(g.busiest for g in newton.groups(Case(run, mesh, 1)))

    assert of(per_head) > of(ONE_ROW)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_the_peak_of_a_device_is_found_by_what_it_calls_itself(kind, chip):
    entry = hardware.CHIPS[chip]
    assert hardware.peak_of(kind) == entry.flops / entry.devices


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 lite", "NVIDIA A100-SXM4-40GB"])
def test_a_device_that_is_not_in_the_table_has_no_peak(kind):
    assert hardware.peak_of(kind) == 0
