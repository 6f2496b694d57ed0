"""Runs on 2 and 4 hosts with addresses of their own: slow and cut cables, a host that never comes.

The hosts are network namespaces (`hosts.py`): a test needs root and iproute2, or is skipped.
"""

import json
import sys
from pathlib import Path

import pytest
from hosts import Hosts, why_not
from jobs import Job, end, losses, make_environment, write_text

from k2jax.checkpoint import Checkpoints
from k2jax.cluster import EXIT_RETRY

pytestmark = pytest.mark.slow
RESUME = "all others end here, and the same command on all hosts resumes from the newest checkpoint"
HASTY = (
    "import sys; from k2jax.cluster import rendezvous; rendezvous.ARRIVAL = 30.0;"
    "from k2jax import cli; sys.exit(cli.main())"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text, and the caches that all hosts and runs of this file share."""
    if why := why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("hosts")
    write_text(folder)
    return folder


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("K2JAX_CLUSTER_KEY", "a secret of these hosts")


def evaluate(place: Path, run: Path, hosts: Hosts) -> dict:
    """The score that host 0 prints."""
    (place / "score.txt").write_text("def f(x): return x + 1\n" * 60)
    words = ["evaluate", str(run), "--data", str(place / "score.txt"), "--rows", "4", "--json"]
    address = ["--coordinator", f"{hosts.addresses[0]}:29401", "--processes", str(hosts.count)]
    words += ["--mesh.data", str(hosts.count), *address]
    processes = []
    for number in range(hosts.count):
        command = [sys.executable, "-m", "k2jax.cli", *words, "--process", str(number)]
        processes.append(hosts.start(number, command, make_environment(place)))
    ended = end(processes, 300)
    assert [code for code, _, _ in ended] == [0] * hosts.count, ended
    return json.loads(ended[0][1])


def test_two_hosts_train_and_evaluate_over_a_slow_cable(place, tmp_path, key):
    with Hosts(2, tmp_path) as hosts:
        slow, fast = tmp_path / "slow", tmp_path / "fast"
        assert hosts.slow(1)
        ended = Job(place, slow, 2, 6, hosts=hosts).end()
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert "2 processes on 2 hosts, 2 x cpu: same settings and code" in ended[0][1]
        assert [lines for _, _, lines in ended] == [[], []]  # with a key nothing is open
        score = evaluate(place, slow, hosts)
    # The network's speed changes no number.
    assert [code for code, _, _ in Job(place, fast, 2, 6).end()] == [0, 0]
    assert losses(slow) == losses(fast)
    assert score["nats_per_token"] > 0


def test_a_cut_cable_ends_all_hosts_with_one_line_and_the_run_resumes(place, tmp_path):
    mesh, out = {"mesh__data": 2, "mesh__expert": 2}, tmp_path / "out"
    with Hosts(4, tmp_path) as hosts:
        job = Job(place, out, 4, 1_000_000, hosts=hosts, **mesh)
        job.until(8)
        hosts.cut(2)
        ended = job.end(200)
        silent = "has not been heard of for 60 s"
        lost = f"k2jax: process 2 (host-2) {silent}; {RESUME}"
        alone = f"k2jax: process 0 (host-0) {silent}; {RESUME}"
        opened = (
            "k2jax: port 29400 is open to the network: whoever reaches it may take a process's"
            " place; set K2JAX_CLUSTER_KEY or K2JAX_CLUSTER_KEY_FILE to the same secret on all"
            " hosts"
        )
        assert [code for code, _, _ in ended] == [EXIT_RETRY] * 4, ended
        assert [lines for _, _, lines in ended] == [[opened, lost], [lost], [alone], [lost]]

        before, newest = losses(out), Checkpoints(out).latest()
        hosts.plug(2)
        steps = max(newest + 3, len(before))
        ended = Job(place, out, 4, steps, hosts=hosts, **mesh).end()
        assert [code for code, _, _ in ended] == [0] * 4, ended
        assert f"resuming from step {newest}" in ended[0][1]
        assert losses(out)[: len(before)] == before


def test_a_host_that_never_comes_is_named_and_the_same_command_works_with_it(place, tmp_path):
    with Hosts(2, tmp_path) as hosts:
        hosts.cut(1)
        job = Job(place, tmp_path / "out", 2, 3, hosts=hosts, start_by=("-c", HASTY))
        (first, _, lines), (second, _, others) = job.end(200)
        assert (first, second) == (EXIT_RETRY, EXIT_RETRY)
        came = "process 1 of 2 did not come to 10.83.0.1:29400 within 30 s; see whether they run"
        reached = "process 1 (host-1) cannot reach process 0 at 10.83.0.1:29400 within 30 s ("
        assert len(lines) == 2 and lines[1].startswith(f"k2jax: {came}")
        assert len(others) == 1 and others[0].startswith(f"k2jax: {reached}")
        hosts.plug(1)
        job = Job(place, tmp_path / "out", 2, 3, hosts=hosts)
        assert [code for code, _, _ in job.end()] == [0, 0]
