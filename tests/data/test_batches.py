import subprocess
import sys
import threading

import numpy as np
import pytest

from k2jax.data.batches import Batches, prefetch, shuffle
from k2jax.data.rows import NAMES

SIZES = (50, 3, 120, 77, 9, 300)
ORDER_0_0 = [6, 3, 8, 2, 1, 7, 5, 0, 9, 4]
ORDER_1_2 = [1, 3, 8, 7, 0, 2, 6, 5, 9, 4]


@pytest.fixture
def batches(make_store) -> Batches:
    return Batches(make_store(*SIZES), rows=8, context=16, seed=5)


def same(a, b) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in NAMES)


def test_batch_is_a_function_of_seed_and_step(batches, make_store):
    again = Batches(make_store(*SIZES), rows=8, context=16, seed=5)
    late = again.batch(23)  # asked for first, in another object
    for step in range(24):
        got = batches.batch(step)
    assert same(got, late) and not same(got, again.batch(22))
    other = Batches(make_store(*SIZES), rows=8, context=16, seed=6)
    assert not same(batches.batch(0), other.batch(0))


def test_order_does_not_change_between_versions():
    """A resumed run must see the rows that the uninterrupted one would have."""
    assert shuffle(np.arange(10), 10, seed=0, epoch=0).tolist() == ORDER_0_0
    assert shuffle(np.arange(10), 10, seed=1, epoch=2).tolist() == ORDER_1_2


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_sees_the_same_global_batch(batches, hosts):
    for step in (0, 7):
        whole = batches.batch(step)
        parts = [batches.batch(step, [host], hosts) for host in range(hosts)]
        assert all(part["tokens"].shape == (8 // hosts, 16) for part in parts)
        joined = {name: np.concatenate([part[name] for part in parts]) for name in NAMES}
        assert same(whole, joined)


def test_rows_that_do_not_divide_among_hosts_are_refused(batches):
    with pytest.raises(ValueError, match="8 rows have no 3 equal parts"):
        batches.batch(0, [0], 3)
    with pytest.raises(ValueError, match=r"the numbers \[2\]"):
        batches.batch(0, [2], 2)


def test_epochs_cover_all_rows_and_follow_without_a_gap(batches):
    (n,) = batches.epoch_rows
    assert n % batches.rows, "some batch should straddle two epochs"
    order = np.concatenate([batches.row_numbers(step)[1] for step in range(3 * n // 8 + 1)])
    epochs = [order[k * n : (k + 1) * n] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_may_be_larger_than_an_epoch(make_store):
    small = Batches(make_store(3), rows=8, context=16, seed=0)
    assert small.epoch_rows == [1] and small.batch(3)["weights"].sum() == 8 * 4


def test_an_empty_store_is_refused(make_store):
    with pytest.raises(ValueError, match="no tokens"):
        Batches(make_store(), rows=1, context=16, seed=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1_000])
def test_shuffle_is_a_permutation(size):
    for seed, epoch in ((0, 0), (1, 0), (-3, 9)):
        got = shuffle(np.arange(size), size, seed, epoch)
        assert sorted(got.tolist()) == list(range(size))


def test_shuffle_needs_no_table():
    size = 3_800_000_000  # rows of 15.5T tokens
    index = np.array([0, 1, size - 1])
    got = shuffle(index, size, 0, 0)
    assert len(set(got.tolist())) == 3 and (got < size).all() and (got >= 0).all()


def test_shuffle_puts_every_row_everywhere_about_equally_often():
    size, epochs = 8, 1_200
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for epoch in range(epochs):
        order = shuffle(np.arange(size), size, seed=0, epoch=epoch)
        counts[np.arange(size), order] += 1
        pairs[order[0], order[1]] += 1
    # Chi-squared against the uniform expectation; 49 and 55 degrees of freedom, p about 1e-6.
    assert ((counts - epochs / size) ** 2 / (epochs / size)).sum() < 115
    wanted = epochs / (size * (size - 1))
    off = ~np.eye(size, dtype=bool)
    assert ((pairs[off] - wanted) ** 2 / wanted).sum() < 120


def test_prefetch_gives_the_steps_in_order(batches):
    got = list(prefetch(batches.batch, 3, 10))
    assert len(got) == 10
    assert all(same(batch, batches.batch(3 + i)) for i, batch in enumerate(got))


def test_prefetch_raises_in_its_turn_what_the_thread_raised():
    def fetch(step):
        if step == 2:
            raise OSError("gone")
        return step

    steps = prefetch(fetch, 0)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(steps)


def test_prefetch_stops_early_without_leaving_a_thread():
    made = []
    steps = prefetch(lambda step: made.append(step) or step, 0)
    assert next(steps) == 0
    steps.close()
    assert len(made) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("k2jax-data")]


def test_prefetch_left_open_does_not_keep_the_process():
    code = (
        "from k2jax.data.batches import prefetch\n"
        "steps = prefetch(lambda step: step, 0)\n"
        "print(next(steps), next(steps))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "1"] and not done.stderr
