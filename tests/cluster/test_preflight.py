"""What processes compare before they compile, as far as one process can test it."""

from collections import Counter

import pytest

from k2jax.cluster import preflight
from k2jax.cluster.group import Group
from k2jax.cluster.join import member
from k2jax.config import MeshConfig


def test_hosts_with_unlike_devices_are_named():
    alike = Counter({(0, "TPU v5"): 4, (1, "TPU v5"): 4})
    assert preflight.uneven(alike) == ""
    fewer = alike | {(2, "TPU v5"): 3}
    assert preflight.uneven(Counter(fewer)) == "process 2 has 3 x TPU v5, process 0 has 4 x TPU v5"
    other = Counter({(0, "H100"): 8, (1, "H100"): 4, (1, "H200"): 4})
    assert preflight.uneven(other) == "process 1 has 4 x H100 and 4 x H200, process 0 has 8 x H100"


def test_all_reduce_of_one_process_is_right_and_timed():
    line = preflight.network(Group())
    assert line.startswith("1 processes on 1 host, 8 x cpu: same settings and code; an all-reduce")
    assert line.endswith("GB/s a device)")


def test_a_deadline_ends_the_run_with_its_line():
    ended = []
    group = Group(end=lambda *words: ended.append(words))
    with preflight.deadline(group, 0.05, "nothing happens"):
        import time

        time.sleep(0.3)
    ((line, code),) = ended
    assert line.startswith("nothing happens within 0 s") and code == 75


def test_one_process_alone_does_nothing():
    said = []
    with member(None, {}, MeshConfig(), said.append) as group:
        group.require_equal("anything", {"x": 1})
        assert group.count == 1
    assert said == []


def test_a_mistake_passes_through_when_alone():
    with pytest.raises(ZeroDivisionError), member(None, {}, MeshConfig(), print):
        raise ZeroDivisionError
