"""Two processes save one checkpoint: each sums up its own files, and both hear of a damage."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

BODY = """
    import json, os, sys
    number, port, folder, harm = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax, jax.experimental.multihost_utils, jax.numpy as jnp
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    from k2jax.checkpoint import Checkpoints
    mesh = jax.make_mesh((4,), ("a",))
    place = jax.NamedSharding(mesh, jax.P("a"))
    make = jax.jit(lambda step: jnp.full((4, 50_000), step, "float32"), out_shardings=place)
    said = []
    with Checkpoints(folder, 2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, {"params": {"w": make(step)}}, {})
        checkpoints.wait()
        if number == 0 and harm:
            parts = os.path.join(folder, "checkpoints/8/params", f"ocdbt.process_{harm}")
            files = [os.path.join(at, name) for at, _, names in os.walk(parts) for name in names]
            with open(max(files, key=os.path.getsize), "r+b") as file:
                file.seek(1000)
                file.write(b"damage")
        jax.experimental.multihost_utils.sync_global_devices("harmed")
        newest = checkpoints.recover(said.append)
        wanted = {"params": {"w": jax.ShapeDtypeStruct((4, 50_000), "float32", sharding=place)}}
        got = checkpoints.restore(newest, wanted)["params"]["w"]
        right = all(bool((shard.data == newest).all()) for shard in got.addressable_shards)
    print(json.dumps([newest, said, right]))
"""


def outcome(folder: Path, harm: str) -> list:
    """What both processes found; they must agree."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    code = textwrap.dedent(BODY)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), port, str(folder), harm],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    found = []
    for job in jobs:
        out, error = job.communicate(timeout=240)
        assert job.returncode == 0, error[-2000:]
        found.append(json.loads(out.splitlines()[-1]))
    assert found[0] == found[1]
    return found[0]


def test_a_damage_in_the_files_of_either_process_is_found_by_both(tmp_path):
    newest, said, right = outcome(tmp_path, "1")
    assert (newest, right) == (4, True)
    (line,) = said
    assert "step 8" in line and "(params/ocdbt.process_1/d/" in line
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4", "8.damaged"}
    record = json.loads((tmp_path / "checkpoints/4/files.json").read_text())
    folder = tmp_path / "checkpoints/4"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {
        path.name for path in folder.iterdir()
    }
    assert set(record) == files, "those of both processes, and what joins them"
    assert any("process_0/d/" in name for name in files)
