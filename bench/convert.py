"""Converting one full-size K2 layer: `python bench/convert.py [folder]`; needs 52 GB of disk.

Makes a folder whose one MoE layer has the exact tensors of a published K2 layer file (17.07 GB of
random FP8 codes, plausible scales; the vocabulary is cut to 128 tokens), and measures, each in a
process of its own: the disk, `cp`, FP8 kept, FP8 to bfloat16, their audits, decoding alone, and a
dry run over sparse files with the headers of the whole release. Prints one JSON line each. Source
and target share a disk, which has to read while it writes: `cp` says what that leaves.
`--dry-run` does only the last.
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from k2jax.config import ModelConfig
from k2jax.configs import load
from k2jax.conversion.hf_files import FP8_CONFIG, LAYER
from k2jax.model import Kimi
from k2jax.params.declare import specs
from k2jax.weights import quant
from k2jax.weights.hf_config import to_published
from k2jax.weights.hf_folder import INDEX
from k2jax.weights.releases import RELEASES, published_tensors
from k2jax.weights.safetensors import NAMES, stream

GB = 10**9
POOL = 2**28
DISK = 8 * GB  # bytes written to measure the disk
FILES = 61
CODE = """
import json, sys
from k2jax.conversion import convert
print(json.dumps(convert(*sys.argv[1:3], **json.loads(sys.argv[3]))))
"""


def config(folder: Path, model: ModelConfig) -> None:
    """The `config.json` of an FP8 folder."""
    fields = to_published(model) | {"quantization_config": FP8_CONFIG}
    (folder / "config.json").write_text(json.dumps(fields))


def make_layer(folder: Path) -> int:
    """Write the folder; the bytes of the layer's file."""
    model = dataclasses.replace(load("kimi_k2").model, dense_layers=0, moe_layers=1, vocab=128)
    kinds = published_tensors(specs(Kimi(model)), dataclasses.replace(RELEASES["kimi_k2"]))
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, POOL, np.uint8)

    def pieces(name):
        dtype, shape = kinds[name]
        size = math.prod(shape)
        if dtype == quant.FP8:
            at = int(rng.integers(POOL - size)) if size < POOL else 0
            return [np.resize(pool[at:], size).view(dtype).reshape(shape)]
        return [(rng.standard_normal(shape, np.float32) * 1e-4).astype(dtype)]

    held = {n: "layer.safetensors" if LAYER.match(n) else "rest.safetensors" for n in kinds}
    for file in sorted(set(held.values())):
        stream(folder / file, {n: k for n, k in kinds.items() if held[n] == file}, pieces)
    (folder / INDEX).write_text(json.dumps({"weight_map": held}))
    config(folder, model)
    return (folder / "layer.safetensors").stat().st_size


def make_headers(folder: Path) -> int:
    """Index and headers of the complete release in sparse files; how many tensors."""
    model = load("kimi_k2").model
    kinds = published_tensors(specs(Kimi(model)), RELEASES["kimi_k2"])
    held = {}
    for name in kinds:
        layer = int(m[1]) if (m := LAYER.match(name)) else 0 if "embed" in name else FILES - 1
        held[name] = f"model-{layer + 1}-of-{FILES}.safetensors"
    for file in sorted(set(held.values())):
        header, at = {}, 0
        for name in (n for n in kinds if held[n] == file):
            dtype, shape = kinds[name]
            end = at + math.prod(shape) * dtype.itemsize
            kind = NAMES[dtype.newbyteorder("<")]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / INDEX).write_text(json.dumps({"weight_map": held}))
    config(folder, model)
    return len(kinds)


def disk_rate(folder: Path) -> float:
    """GB/s of one large file, until it is on the disk."""
    block = np.random.default_rng(1).integers(0, 256, POOL, np.uint8).data
    began = time.perf_counter()
    with (folder / "disk").open("wb", buffering=0) as out:
        for _ in range(DISK // POOL):
            out.write(block)
        os.fsync(out.fileno())
    rate = DISK // POOL * POOL / GB / (time.perf_counter() - began)
    (folder / "disk").unlink()
    return rate


def copied(folder: Path) -> float:
    """Seconds of `cp` of the folder, until it is on the disk."""
    began = time.perf_counter()
    shutil.copytree(folder, folder.parent / "copy", copy_function=shutil.copyfile)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(folder.parent / "copy")
    return seconds


def measured(source: Path, target: Path, **options) -> dict:
    """A conversion in a process of its own: its time, CPU time, peak of anonymous memory."""
    began, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", CODE, str(source), str(target), json.dumps(options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            found = [line for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in found)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = child.communicate()
    done.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_anonymous_gb": peak / GB,
        "report": json.loads(out),
    }


def decoding() -> dict[str, float]:
    """GB of FP8 codes decoded, out of memory and into it, on all cores: a second, a CPU-second."""
    q = np.random.default_rng(2).integers(0, 256, (2048, 7168), np.uint8).view(quant.FP8)
    scale = np.full((16, 56), 1e-4, np.float32)
    quant.decode_fp8(q, scale)
    count = 64

    def work() -> None:
        for _ in range(count):
            quant.decode_fp8(q, scale)

    workers = [threading.Thread(target=work) for _ in range(os.cpu_count() or 1)]
    began, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    size = len(workers) * count * q.nbytes / GB
    return {
        "gb_per_second": size / (time.perf_counter() - began),
        "gb_per_cpu_second": size / (time.process_time() - cpu),
    }


def say(**found) -> None:
    """One JSON line."""
    load_1 = os.getloadavg()[0]
    print(
        json.dumps(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
            | {"load": round(load_1, 1)}
        ),
        flush=True,
    )


def main(root: Path, only_dry_run: bool) -> None:
    """Measure, and leave nothing behind."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        (folder / "k2").mkdir()
        tensors = make_headers(folder / "k2")
        found = measured(folder / "k2", folder / "out", dry_run=True)
        say(
            what="dry run",
            tensors=tensors,
            bytes_in=found["report"]["bytes_in"],
            seconds=found["seconds"],
            peak_anonymous_gb=found["peak_anonymous_gb"],
        )
        if only_dry_run:
            return
        (folder / "layer").mkdir()
        size = make_layer(folder / "layer")
        os.sync()
        say(what="decoding", **decoding())
        for form in ("keep", "bfloat16"):
            disk, copy = disk_rate(folder), copied(folder / "layer")
            found = measured(folder / "layer", folder / form, format=form)
            taken = sum(p.stat().st_size for p in (folder / form).rglob("*") if p.is_file())
            say(
                what=f"fp8 to {form}",
                bytes_in=size,
                bytes_out=taken,
                seconds=found["seconds"],
                cpu_seconds=found["cpu_seconds"],
                gb_per_second_in=size / GB / found["seconds"],
                disk_gb_per_second=disk,
                copy_gb_per_second=size / GB / copy,
                peak_anonymous_gb=found["peak_anonymous_gb"],
                hours_for_61_files=61 * found["seconds"] / 3600,
            )
            found = measured(folder / "layer", folder / form, format=form, verify=True)
            say(
                what=f"audit of {form}",
                seconds=found["seconds"],
                cpu_seconds=found["cpu_seconds"],
                tensors=found["report"]["verified"]["tensors"],
                peak_anonymous_gb=found["peak_anonymous_gb"],
            )
            shutil.rmtree(folder / form)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    main(Path(words[0] if words else "."), "--dry-run" in sys.argv)
