import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.data.batches import Batches
from k2jax.data.mixture import PERIOD, Mixture, parse, quotas
from k2jax.data.rows import NAMES, row_count

CONTEXT = 16


@pytest.fixture
def mixed(make_store) -> Mixture:
    streams = (make_store(400, 30, 90), make_store(70, 65), make_store(2_000))
    return Mixture(streams, (0.7, 0.2, 0.1), ("a", "b", "c"))


def batches(mixed, rows=8, seed=3) -> Batches:
    return Batches(mixed, rows, CONTEXT, seed)


def test_shares_hold_exactly_over_a_period(mixed):
    source, _ = batches(mixed, rows=PERIOD).row_numbers(5)
    np.testing.assert_array_equal(np.bincount(source), quotas(mixed.weights))
    np.testing.assert_allclose(np.bincount(source) / PERIOD, mixed.weights, atol=1 / PERIOD)
    part, _ = batches(mixed, rows=1_000).row_numbers(2)
    # Drawn without replacement: five standard deviations of a share of 0.1 to 0.7.
    np.testing.assert_allclose(np.bincount(part) / 1_000, mixed.weights, atol=5 * 0.0145)


def test_each_source_is_read_in_epochs_of_its_own(mixed):
    """Every row of a source once before any a second time, in another order each time."""
    plan = batches(mixed)
    found = [plan.row_numbers(step) for step in range(60)]
    source, number = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    for s, stream in enumerate(mixed.streams):
        size, mine = row_count(stream, CONTEXT), number[source == s]
        whole = [mine[i : i + size].tolist() for i in range(0, len(mine) // size * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        assert s == 2 or (len(whole) > 2 and whole[0] != whole[1])
        assert plan.epochs(60)[s] == pytest.approx(len(mine) / size, abs=1e-12)


def test_epochs_go_on_from_period_to_period(mixed):
    plan = batches(mixed, rows=PERIOD // 2)
    ranks = [plan._ranks(np.arange(PERIOD) + start) for start in (0, PERIOD, 2 * PERIOD)]
    for s in range(3):
        mine = np.concatenate([rank[source == s] for source, rank in ranks])
        np.testing.assert_array_equal(mine, np.arange(len(mine)))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_sees_the_same_global_batches(mixed, hosts):
    one, many = batches(mixed), [batches(mixed) for _ in range(hosts)]
    for step in (700, 3, 2_049):  # a resumed run begins anywhere
        whole = one.batch(step)
        parts = [plan.batch(step, [host], hosts) for host, plan in enumerate(many)]
        for name in NAMES:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_a_mixture_of_one_source_is_that_source(mixed):
    alone = Batches(mixed.streams[0], 8, CONTEXT, 3)
    same = batches(Mixture(mixed.streams[:1], (0.4,), ("a",)))
    for name in NAMES:
        np.testing.assert_array_equal(alone.batch(9)[name], same.batch(9)[name])


def test_the_seed_changes_which_source_a_row_comes_from(mixed):
    first, second = (batches(mixed, 64, seed).row_numbers(0)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "weights", [(1.0,), (1, 1, 1), (0.7, 0.3), (1e-9, 1), (1e-9, 1e-9, 5, 1e-9), (3, 2, 2, 0.01)]
)
def test_quotas_fill_a_period_and_leave_nobody_out(weights):
    got = quotas(weights)
    assert got.sum() == PERIOD and got.min() >= 1
    exact = np.array(weights) / sum(weights) * PERIOD
    assert (np.abs(got - exact) < len(weights)).all()


def test_weights_are_read_from_the_path(tmp_path):
    assert parse("a:0.7,b:0.3") == [("a", 0.7), ("b", 0.3)]
    assert parse("dir/a:2, c:/x:1e-1") == [("dir/a", 2.0), ("c:/x", 0.1)]
    assert parse("") == parse("text.jsonl") == parse("a,b") == []
    (tmp_path / "run:3").mkdir()
    assert parse(str(tmp_path / "run:3")) == []


@pytest.mark.parametrize(
    ("path", "says"),
    [("a:0.5,b", "'b' needs a weight"), ("a:0,b:1", "it must be > 0"), ("a:1,b:e", "must be > 0")],
)
def test_wrong_weights_are_named(path, says):
    with pytest.raises(ConfigError, match=says):
        parse(path)
