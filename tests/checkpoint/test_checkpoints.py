import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from k2jax.checkpoint import Checkpoints, orbax_io, tree
from k2jax.checkpoint.tree import CHUNK_BYTES, flatten, split_axes, unflatten
from k2jax.config import ConfigError, RunConfig, from_json, to_json

META = {"config": to_json(RunConfig()), "position": 7}


def state(seed=0, rows=8, dtype=np.float32):
    """Weights and an optimizer state with empty nodes, counts and moments, random in each bit."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.standard_normal((rows, 8)), dtype),
        "layers.moe.bias": jnp.asarray(rng.standard_normal((2, 8)), dtype),
    }
    moments = {name: jnp.asarray(np.asarray(leaf) * 3) for name, leaf in params.items()}
    masked = {"embed": moments["embed"], "layers.moe.bias": optax.MaskedNode()}
    trace = optax.TraceState(trace=masked)
    count = optax.ScaleByScheduleState(count=jnp.int32(seed))
    return {"params": params, "opt": (trace, optax.EmptyState(), {"inner": (count,)})}


def like(values):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def saved(folder, *numbers, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for step in numbers:
            checkpoints.save(step, state(step), META)
    return Checkpoints(folder, keep)


def one_line(caught):
    return "\n" not in str(caught.value)


def test_a_state_comes_back_bit_for_bit_with_what_belongs_to_it(tmp_path):
    checkpoints = saved(tmp_path, 3)
    assert checkpoints.latest() == 3
    assert_same(checkpoints.restore(3, like(state())), state(3))
    meta = checkpoints.meta(3)
    assert (meta["step"], meta["position"], meta["format"]) == (3, 7, 1)
    assert meta["versions"]["jax"] == jax.__version__
    assert from_json(meta["config"]) == RunConfig()


def test_a_folder_without_checkpoints_has_no_latest_and_stays_untouched(tmp_path):
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = saved(tmp_path, 5, 9, 10, 100, keep=2)
    assert checkpoints.steps() == [10, 100]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"10", "100"}


def test_multiples_of_keep_every_stay(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in (2, 4, 6, 8, 10, 12, 14):
            checkpoints.save(step, {"params": {"w": jnp.zeros(4)}}, {})
    assert checkpoints.steps() == [4, 8, 12, 14]


def test_what_changes_after_save_returns_is_not_in_the_checkpoint(tmp_path):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    want = {"params": {"w": np.arange(1 << 20, dtype=np.float32)}}
    live = {"params": {"w": jnp.asarray(want["params"]["w"].copy())}}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, live, {})
        for _ in range(3):
            live = change(live)
        jax.block_until_ready(live)
    assert_same(Checkpoints(tmp_path).restore(1, like(want)), want)


def test_weights_are_read_without_the_optimizer_and_in_any_dtype(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for file in (tmp_path / "checkpoints/1/opt").rglob("*"):
        if file.is_file():
            file.unlink()
    params = state(1)["params"]
    assert_same(checkpoints.restore_params(1, like(params)), params)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    assert_same(checkpoints.restore_params(1, like(half)), half)


def spread(values, mesh, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), values)


def test_a_checkpoint_is_restored_onto_any_mesh(tmp_path):
    devices = np.array(jax.devices())
    want = state(1)["params"]
    wide = jax.sharding.Mesh(devices.reshape(2, 4), ("a", "b"))
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"params": spread(want, wide, jax.P("a", "b"))}, {})
    flat = jax.sharding.Mesh(devices[:4], ("c",))
    layout = jax.NamedSharding(flat, jax.P(None, "c"))
    target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for n, x in want.items()}
    got = Checkpoints(tmp_path).restore(1, {"params": target})["params"]
    assert_same(got, want)
    assert all(leaf.sharding == layout for leaf in got.values())
    assert_same(Checkpoints(tmp_path).restore(1, {"params": like(want)})["params"], want)


def test_what_a_killed_save_or_deletion_leaves_never_counts_and_is_swept(tmp_path):
    saved(tmp_path, 1, 2)
    root = tmp_path / "checkpoints"
    (root / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (root / "1.deleted").mkdir()
    (root / "4" / "params").mkdir(parents=True)  # without the commit mark
    (root / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest() == 2
    assert len(list(root.iterdir())) == 6, "reading deletes nothing"
    with checkpoints:
        checkpoints.save(3, state(3), META)
    assert {p.name for p in root.iterdir()} == {"2", "3", "4.damaged", "notes"}, "4 is no save's"


def test_a_step_that_is_not_there_names_those_that_are(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7 in .*: 1, 2$"):
        checkpoints.restore(7, like(state()))
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        checkpoints.meta(7)
    with checkpoints, pytest.raises(ValueError, match="step 2 is already in"):
        checkpoints.save(2, state(2), META)


def wrong(**changes):
    base = like(state())
    return base | {"params": {**base["params"], **changes}}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            wrong(embed=jax.ShapeDtypeStruct((8, 16), "float32")),
            r"of another model: parameter 'embed' is \[8, 8\] there and \[8, 16\] here",
        ),
        (
            wrong(head=jax.ShapeDtypeStruct((8, 16), "float32")),
            "of another model: it has no parameter 'head'",
        ),
        (
            {"params": {"embed": like(state()["params"]["embed"])}},
            "of another model: its parameter 'layers.moe.bias' is unknown here",
        ),
        (
            wrong(embed=jax.ShapeDtypeStruct((8, 8), "bfloat16")),
            "of another precision: parameter 'embed' is float32 there and bfloat16 here",
        ),
        (
            {"opt": optax.EmptyState()},
            "of another optimizer or model: its optimizer state '0.trace.embed' is unknown here",
        ),
        (
            {"opt": {"mu": jax.ShapeDtypeStruct((8, 8), "float32")}},
            "of another optimizer or model: it has no optimizer state 'mu'",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_names_the_first_difference(tmp_path, target, message):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoints.restore(1, target)
    assert one_line(caught)


def test_a_damaged_checkpoint_is_named_with_the_older_complete_steps(tmp_path):
    checkpoints = saved(tmp_path, 4, 8)
    for file in (tmp_path / "checkpoints/8/params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"step 8 in .* is damaged .*older complete steps: 4"
    ) as caught:
        checkpoints.restore(8, like(state()))
    assert one_line(caught)
    (tmp_path / "checkpoints/8/meta/metadata").write_text("{")
    with pytest.raises(ConfigError, match="checkpoints/8 has an unreadable description"):
        checkpoints.meta(8)


def run_child(folder, body, **options):
    """Runs `body` in a fresh process that has `folder`, `Checkpoints` and `state`."""
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n" + textwrap.dedent(
        """
        import resource
        from test_checkpoints import Checkpoints, ConfigError, META, state
        folder = sys.argv[1]
        """
    )
    command = [sys.executable, "-c", program + textwrap.dedent(body), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_as_it_was(tmp_path):
    body = """
        with Checkpoints(folder, 1) as checkpoints:
            checkpoints.save(1, state(1), META)
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            try:
                checkpoints.save(2, state(2, rows=20_000), META)
                checkpoints.wait()
            except ConfigError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            checkpoints.save(3, state(3), META)
        """
    out, err = run_child(tmp_path, body).communicate(timeout=120)
    assert out.decode().splitlines() == [
        f"checkpoint of step 2 could not be written to {tmp_path / 'checkpoints'}: the disk is"
        " full (File too large); step 1 is complete there"
    ]
    assert "Traceback" not in err.decode()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3"}
    assert_same(Checkpoints(tmp_path).restore(3, like(state())), state(3))


def test_what_threads_of_a_failed_save_wrote_late_goes_with_the_next_save(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, state(3), META)
        (tmp_path / "checkpoints/2.orbax-checkpoint-tmp/params").mkdir(parents=True)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3"}


def test_a_save_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state(1), META)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
            with pytest.raises(ConfigError, match=r"the disk is full \(.* 100 are free\); step 1"):
                checkpoints.save(2, state(2), META)
        checkpoints.save(2, state(2), META)
    assert Checkpoints(tmp_path).latest() == 2


def test_any_other_failure_is_one_line_too(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def broken(self, directory, *args, **kwargs):
        raise RuntimeError("the network\nis gone")

    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state(1), META)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.AsyncCheckpointer, "save", broken)
            with pytest.raises(
                ConfigError, match=r"\(?RuntimeError: the network is gone"
            ) as caught:
                checkpoints.save(2, state(2), META)
        assert one_line(caught) and "step 1 is complete there" in str(caught.value)


def kill_and_check(folder, rounds):
    """Kill a process that saves all the time, each round at another moment after its first save."""
    body = """
        with Checkpoints(folder, 2) as checkpoints:
            step = checkpoints.latest() or 0
            while True:
                step += 1
                checkpoints.save(step, state(step, rows=100_000), META)
                print("saving a second one" if checkpoints.steps() else "", flush=True)
        """
    rng = np.random.default_rng(0)
    best = 0
    for _ in range(rounds):
        with run_child(folder, body) as child:
            while not child.stdout.readline().strip():
                assert child.poll() is None, child.stderr.read()
            time.sleep(rng.random())
            child.send_signal(signal.SIGKILL)
        checkpoints = Checkpoints(folder, 2)
        latest = checkpoints.latest() or 0
        assert latest >= best, "a complete checkpoint was lost"
        for step in checkpoints.steps()[-2:]:
            want = state(step, rows=100_000)
            assert_same(checkpoints.restore(step, like(want)), want)
            assert checkpoints.meta(step)["step"] == step
        best = latest


def test_kill_9_at_any_moment_leaves_the_last_complete_checkpoint(tmp_path):
    kill_and_check(tmp_path, 3)


@pytest.mark.slow
def test_kill_9_forty_times(tmp_path):
    kill_and_check(tmp_path, 40)


def test_names_of_a_state_are_its_paths():
    opt = state()["opt"]
    flat = flatten(opt)
    assert list(flat) == ["0.trace.embed", "2.inner.0.count"]
    assert_same(unflatten(opt, flat), opt)


def test_chunks_of_a_stack_are_single_layers_and_experts():
    # [layers, experts, embed, expert_ffw] of K2: on one device, and the part of one of 1,024.
    assert split_axes((60, 384, 7168, 2048), 4) == (0, 1)
    assert split_axes((60, 12, 448, 2048), 4) == (0,), "a few small parts may share a chunk"
    assert split_axes((60, 1536, 64, 192), 4) == (0,), "heads of one layer stay together"
    assert split_axes((163_840, 7168), 4) == ()
    assert split_axes((5, 32, 256, 128), 4) == (), "a small leaf is one chunk"
    assert 7168 * 2048 * 4 <= CHUNK_BYTES


def test_a_stored_expert_leaf_is_chunked_by_matrix(tmp_path, monkeypatch):
    for module in (orbax_io, tree):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2**20)
    leaf = jnp.zeros((2, 3, 512, 512), "float32")  # 1 MiB a matrix
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"params": {"experts": leaf}}, {})
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/checkpoints/1/params"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": base, "path": "experts"}).result()
    assert stored.chunk_layout.read_chunk.shape == (1, 1, 512, 512)


def test_importing_checkpoints_leaves_orbax_for_later():
    program = "import sys, k2jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
