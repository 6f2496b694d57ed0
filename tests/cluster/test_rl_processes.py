"""`k2jax rl` in two real processes over loopback: the weights of one, the same after a loss."""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jobs import CFG, end, make_environment, start, write_run
from small_model import end_often

from k2jax.checkpoint import Checkpoints
from k2jax.cluster import EXIT_RETRY
from k2jax.config import RunConfig, to_json
from k2jax.text.kimi_tokenizer import FILE
from k2jax.training.metrics import read_metrics
from k2jax.weights.source import load

pytestmark = pytest.mark.slow
ENV = """
from k2jax.post.environment import SingleTurn

def odd():
    reward = lambda prompt, reply: float(len(reply) % 2)
    return SingleTurn("odd", 6, lambda split: list("abcdefgh"), reward)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    write_run(folder / "drawn")
    model = load(folder / "drawn")
    config, params = RunConfig(model=CFG), end_often(model.params, model.tokenizer.stops)
    with Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(1, {"params": params}, {"config": to_json(config)})
    (folder / "run/config.json").write_text(json.dumps(to_json(config)))
    model.tokenizer.save(folder / "run" / FILE)
    (folder / "own.py").write_text(ENV)
    return folder


def launch(place: Path, out: Path, count: int, **settings):
    """Start the command in some processes, with two devices in all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    fields = {
        "data.rows": 8,
        "data.context": 12,
        "mesh.data": 2,
        "mesh.expert": 1,
        "mesh.model": 1,
        "optim.learning_rate": 1e-2,
        "optim.warmup": 0,
        "optim.ns_dtype": "float32",
        "train.dtype": "float32",
        "train.remat": "none",
        "train.steps": 6,
        "train.save_every": 2,
        "train.eval_every": 3,
        "train.keep": 9,
        "rl.group": 4,
        "rl.updates": 2,
        "rl.eval_prompts": 4,
        "rl.replay_routing": True,
    } | settings
    words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "k2jax.cli", "rl", str(place / "run")]
    command += ["--init", str(place / "run"), "--env", f"{place / 'own.py'}:odd"]
    command += ["--out", str(out), *words]
    processes = []
    for number in range(count):
        by_hand = ["--coordinator", address, "--processes", str(count), "--process", str(number)]
        more = by_hand if count > 1 else []
        processes.append(start([*command, *more], make_environment(place)))
    return processes


def test_two_processes_learn_the_weights_of_one_and_the_same_when_one_is_lost(place, tmp_path):
    ((code, _, lines),) = end(launch(place, tmp_path / "one", 1), 400)
    assert code == 0, lines
    assert [code for code, *_ in end(launch(place, tmp_path / "two", 2), 400)] == [0, 0]
    processes = launch(place, tmp_path / "lost", 2)
    deadline = time.monotonic() + 400
    while not (tmp_path / "lost/checkpoints/2").is_dir():
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].stderr.read()
        time.sleep(0.02)
    processes[1].kill()
    (code, _, _), (victim, _, _) = end(processes, 100)
    assert (code, victim) == (EXIT_RETRY, -signal.SIGKILL)
    (code, said, _), (second, silent, _) = end(launch(place, tmp_path / "lost", 2), 400)
    assert (code, second, silent) == (0, 0, "")
    assert "resuming from step" in said
    one, two, lost = (load(tmp_path / out).params for out in ("one", "two", "lost"))
    for name, array in one.items():
        np.testing.assert_array_equal(lost[name], two[name], err_msg=name)
        # Gradients of processes are added up in another order: last bits of a few weights.
        np.testing.assert_allclose(two[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    first, both, again = (list(read_metrics(tmp_path / out)) for out in ("one", "two", "lost"))
    assert max(line["groups_that_teach"] for line in first) > 0
    for name in ("reward", "loss", "log_ratio", "experts_differ", "sampler_max"):
        assert [line[name] for line in again] == [line[name] for line in both]
        near = pytest.approx([line[name] for line in first], rel=1e-5, abs=1e-6)
        assert [line[name] for line in both] == near
    assert both[-1]["heldout_sampled"] == first[-1]["heldout_sampled"]
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert config["model"]["vocab"] == CFG.vocab
