"""What the compilers say of kernels for Hopper GPUs: shared memory, registers and spills."""

import re

from k2jax.ops import mosaic

# What a program may take [CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"]: bytes of shared memory, and registers of all its threads.
SHARED_MEMORY, REGISTERS = 227 << 10, 64 << 10


def dump_code(monkeypatch, folder):
    """Let the compilers write what they say to a folder."""
    for what in ("PTXAS", "MLIR_PASSES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))


def assert_code_fits(folder, kernels):
    """Whether so many kernels were compiled to the folder, and each fits and spills nothing."""
    passes = "".join(path.read_text() for path in folder.glob("*.mlir-passes.log"))
    taken = {int(n) for n in re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)}
    assert taken and max(taken) <= SHARED_MEMORY
    logs = [path.read_text() for path in folder.glob("*.ptxas")]
    assert len(logs) == kernels
    for log in logs:
        assert re.findall(r"(\d+) bytes spill", log) == ["0", "0"]
        threads = (mosaic.WORKERS + 1) * 128
        assert int(re.search(r"Used (\d+) registers", log)[1]) * threads <= REGISTERS
