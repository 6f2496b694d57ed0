"""Runs in 2 and 4 real processes over loopback: train, save, lose one, go on, restore elsewhere."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import Job, losses, write_text
from small_model import SIZES

from k2jax.checkpoint import Checkpoints
from k2jax.cluster import EXIT_RETRY
from k2jax.training.metrics import read_metrics

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text, and the caches that all processes and runs of this file share."""
    folder = tmp_path_factory.mktemp("cluster")
    write_text(folder)
    return folder


@pytest.mark.slow
def test_a_run_in_two_processes_loses_one_and_goes_on_as_if_nothing_had_happened(place, tmp_path):
    out = tmp_path / "out"
    job = Job(place, out, 2, steps=1_000_000)
    job.until(8)  # the save of step 6 waited for that of step 3
    job.processes[1].kill()
    began = time.monotonic()
    (code, _, said), (victim, _, _) = job.end(60)
    assert time.monotonic() - began < 30
    assert (code, victim) == (EXIT_RETRY, -signal.SIGKILL)
    assert said == [
        f"k2jax: process 1 ({HOST}) is gone; all others end here, and the same command on all hosts"
        " resumes from the newest checkpoint"
    ]
    before, newest = losses(out), Checkpoints(out).latest()
    assert newest % 3 == 0 and newest < len(before)
    steps = max(newest + 3, len(before))
    (first, heard, _), (second, silent, _) = Job(place, out, 2, steps=steps).end()
    assert (first, second, silent) == (0, 0, "")
    for part in (
        "2 processes on 1 host, 2 x cpu: same settings and code; an all-reduce of 4 MiB",
        f"resuming from step {newest}",
        "held out:",
        "sample:\ndef ",
    ):
        assert part in heard
    assert [line["step"] for line in read_metrics(out)] == list(range(1, steps + 1))
    assert losses(out)[: len(before)] == before  # steps after the checkpoint, done twice


def test_processes_with_unlike_settings_are_told_which_and_end_at_once(place, tmp_path):
    job = Job(place, tmp_path / "out", 2, steps=3)
    words = job.processes[1].args
    job.processes[1].kill()
    job.processes[1].communicate()
    other = [*words, "--optim.b2", "0.99"]
    job.processes[1] = subprocess.Popen(
        other, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    began = time.monotonic()
    line = f"process 1 ({HOST}) differs from process 0 ({HOST}) in optim.b2: 0.99, not 0.95"
    for code, _, said in job.end(60):
        assert code == 2
        assert len(said) == 1 and said[0].endswith(line)
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out" / "config.json").exists()


CHILD = """
import sys
out, port, count, number, what, *mesh = sys.argv[1:]
count, number = int(count), int(number)
import jax, numpy as np
from k2jax import sharding
from k2jax.checkpoint import Checkpoints
from k2jax.config import MeshConfig, ModelConfig
from k2jax.model import Kimi
from k2jax.params.arrays import abstract, initial
from k2jax.params.declare import specs
from k2jax.runtime import backend
backend.prepare(8, count)
if count > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{{port}}", count, number, cluster_detection_method="deactivate"
    )
leaves = specs(Kimi(ModelConfig(**{sizes})))
mesh = MeshConfig(**{{m[0]: int(m[1]) for m in map(str.split, mesh)}})
with jax.set_mesh(sharding.make_mesh(mesh)):
    right = initial(leaves, 0, 1.0)  # the same on any mesh and any number of hosts
    with Checkpoints(out) as saved:
        if what == "save":
            saved.save(1, {{"params": right}}, {{}})
        else:
            found = saved.restore_params(1, abstract(leaves))
            for name, whole in right.items():
                assert found[name].sharding == whole.sharding
                for a, b in zip(found[name].addressable_shards, whole.addressable_shards):
                    np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
"""
WIDE, DEEP = ("data 2", "expert 2", "model 2"), ("data 4", "expert 1", "model 2")


@pytest.mark.slow
@pytest.mark.parametrize(("savers", "readers"), [(4, 1), (1, 4), (4, 2)])
def test_any_number_of_processes_restores_bit_for_bit_what_another_saved(
    savers, readers, place, tmp_path
):
    flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)
    script = CHILD.format(sizes=SIZES)
    for what, count, mesh in (("save", savers, WIDE), ("restore", readers, DEEP)):
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = str(found.getsockname()[1])
        words = [sys.executable, "-c", script, str(tmp_path), port, str(count)]
        jobs = [
            subprocess.Popen(
                [*words, str(number), what, *mesh],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_FLAGS": flags, "K2JAX_CACHE": str(place)},
            )
            for number in range(count)
        ]
        for job in jobs:
            _, errors = job.communicate(timeout=300)
            assert job.returncode == 0, errors


@pytest.mark.slow
def test_four_processes_train_as_one_does_bit_for_bit(place, tmp_path):
    exact, sums = ("logit_max_layers", "expert_load"), ("loss", "grad_norm", "update_norm")
    told = {}
    for count in (1, 4):
        mesh = {"mesh__data": 2, "mesh__expert": 2, "mesh__model": 2}
        job = Job(place, tmp_path / str(count), count, 6, optim__name="muonclip", **mesh)
        assert [code for code, _, _ in job.end()] == [0] * count
        told[count] = list(read_metrics(tmp_path / str(count)))
    for one, four in zip(told[1], told[4], strict=True):
        assert [one[name] for name in exact] == [four[name] for name in exact]
        # Of more than two devices, and only told: the order of their sum shows in the last digit.
        assert [one[name] for name in sums] == pytest.approx([four[name] for name in sums], 1e-6)


@pytest.mark.slow
def test_strangers_who_flood_the_port_disturb_neither_the_start_nor_the_steps(
    place, tmp_path, monkeypatch
):
    monkeypatch.setenv("K2JAX_CLUSTER_KEY", "a secret of these four processes")
    # Beyond the ports that clients get, one of which could be this one while nobody listens.
    for port in range(23_000, 32_000, 7):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            break
    flood = [sys.executable, str(Path(__file__).with_name("flood.py")), "127.0.0.1", str(port)]
    strangers = subprocess.Popen(flood)
    try:
        mesh = {"mesh__data": 2, "mesh__expert": 2}
        # Its own processes, were they started with it, might all come before the first stranger.
        refusal = "k2jax: refused 127.0.0.1, which says that it is process "
        job = Job(place, tmp_path / "out", 4, 6, port=port, first_says=refusal, **mesh)
        ended = job.end()
        assert strangers.poll() is None
    finally:
        strangers.kill()
        strangers.wait()
    assert [code for code, _, _ in ended] == [0] * 4, ended
    counted = rf"connections that were refused at {job.address}: (\d+)"
    count = int(re.search(counted, ended[0][1])[1])
    assert count > 0
    assert [ours for _, _, ours in ended] == [[]] * 4  # said once, by process 0, as it started
    assert len(losses(tmp_path / "out")) == 6


@pytest.mark.slow
def test_a_preemption_notice_to_one_process_saves_the_same_step_on_all(place, tmp_path):
    job = Job(place, tmp_path / "out", 2, steps=1_000_000)
    job.until(3)
    job.processes[1].send_signal(signal.SIGTERM)
    (code, said, _), (other, _, _) = job.end(60)
    assert (code, other) == (EXIT_RETRY, EXIT_RETRY)
    step = Checkpoints(tmp_path / "out").latest()
    assert f"stopped and saved at step {step}; rerun the same command to resume" in said
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])["step"] == step


@pytest.mark.slow
def test_the_local_template_starts_processes_that_train(place, tmp_path):
    job = Job(place, tmp_path / "out", 1, steps=2)
    settings = job.processes[0].args[4:]
    job.processes[0].kill()
    job.processes[0].communicate()
    script = Path(__file__).parents[2] / "docs/launch/local.sh"
    environment = os.environ | {
        "XLA_FLAGS": "",
        "K2JAX": f"{sys.executable} -m k2jax.cli",
        "K2JAX_CACHE": str(place),
        "PORT": job.address.partition(":")[2],
    }
    done = subprocess.run(
        ["bash", str(script), "2", *settings],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
        timeout=600,
    )
    assert "2 processes on 1 host" in done.stdout
    assert Checkpoints(tmp_path / "out").latest() == 2
