"""Ask the real compiler of a target, which needs no device of it.

TPUs: libtpu describes a topology and compiles for it. GPUs: the CUDA plugin does, given a text that
describes the GPU. Both come with the extra `plan`. Run as on a machine without accelerators
(`JAX_PLATFORMS=cpu`).
"""

import contextlib
import dataclasses
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

from k2jax.config import ConfigError, MeshConfig, RunConfig, one_line
from k2jax.planner.hlo import Account, account
from k2jax.planner.targets import Target
from k2jax.runtime import memory, versions

MISSING = "compiling for {0} needs {1}: pip install 'k2jax[plan]'"

# What XLA asks of a GPU: cores, compute capability, memory, its bandwidth, L2 cache, clock in GHz.
GPUS = {
    "h100": (132, (9, 0), 85_520_809_984, 3_350_000_000_000, 52_428_800, 1.98),
    "h200": (132, (9, 0), 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": (148, (10, 0), 192_265_846_784, 8_000_000_000_000, 132_120_576, 1.965),
}
# Tuning kernels would need the GPU.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}


class DoesNotFitError(ConfigError):
    """The compiler refuses a program: a device has too little memory for it."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, per device."""

    memory: dict[str, float]
    account: Account
    seconds: float
    host_peak: float
    limit: float

    def as_json(self) -> dict[str, Any]:
        """The keys that `docs/scaling.md` lists."""
        return {
            "source": "compiler",
            "fits": self.memory["peak"] <= self.limit,
            "bytes_per_device": self.memory,
            "flops_per_device": self.account.flops,
            "wire_bytes_per_device": self.account.wire,
            "uncounted_kernels": dict(self.account.kernels),
            "open_loops": self.account.open_loops,
            "compile_seconds": self.seconds,
            "host_peak_bytes": self.host_peak,
        }


def compile_step(run: RunConfig, target: Target) -> Compiled:
    """Compile a run's training step for a target, on the run's mesh.

    Raises:
        ConfigError: the compiler is not installed, or knows no such topology.
    """
    return compile_program("step", run, target)


def compile_evaluation(run: RunConfig, target: Target) -> Compiled:
    """Compile a run's held-out loss for a target, on the run's mesh.

    Raises:
        ConfigError: as `compile_step`.
    """
    return compile_program("evaluation", run, target)


def compile_program(name: str, run: RunConfig, target: Target) -> Compiled:
    """Compile one of the programs that a run lists, on the run's mesh.

    Raises:
        ConfigError: as `compile_step`.
    """

    def trace(mesh: Any) -> Any:
        from k2jax.training.compile import PROGRAMS
        from k2jax.training.step import build

        listed, program = PROGRAMS[name], build(run)
        return listed.jit(program).trace(*place_on(mesh, listed.arguments(program)))

    # The rounds of an exchange: as many as balanced experts need.
    rounds = max(1.0, 1 / run.train.buffer)
    return compile_on(target, run.mesh, trace, open_trips=rounds)


def place_on(mesh: Any, tree: Any) -> Any:
    """Lay abstract arrays on the devices of a mesh; those without a layout are replicated."""
    import jax

    def place(a: Any) -> Any:
        spec = a.sharding.spec if a.sharding else jax.P()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def compile_on(
    target: Target,
    config: MeshConfig,
    trace: Callable[[Any], Any],
    *,
    open_trips: float = 1.0,
    inference: bool = False,
) -> Compiled:
    """Compile for a target's devices.

    Args:
        target: the machines.
        config: sizes of their mesh.
        trace: from the mesh, which is set, to the traced program.
        open_trips: how often a loop runs whose count only the data knows.
        inference: the mesh is one for inference.

    Raises:
        ConfigError: the compiler is not installed, knows no such topology, or has too little memory
            on a device.
    """
    versions.warn_if_untested()
    memory.limit_malloc_arenas()  # before jax starts its threads
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from k2jax import sharding
    from k2jax.runtime import backend as startup

    if target.chip.kind == "cpu":
        startup.prepare(target.devices)
    mesh = sharding.mesh_over(devices_of(target)[: config.devices], config)
    mesh = sharding.inference_mesh(mesh, {}) if inference else mesh
    platform = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}[target.chip.kind]
    with jax.set_mesh(mesh), _never_cached():
        lowered = trace(mesh).lower(lowering_platforms=(platform,))
        began = time.perf_counter()
        try:
            compiled = lowered.compile(GPU_OPTIONS if platform == "cuda" else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            why = one_line(error).removeprefix("RESOURCE_EXHAUSTED: ")
            raise DoesNotFitError(
                f"it does not fit {target.name}, says its compiler: {why}"
            ) from None
        seconds = time.perf_counter() - began
    return Compiled(
        memory=_memory(compiled.memory_analysis()),
        account=account(compiled.as_text(), config.shape, open_trips),
        seconds=seconds,
        host_peak=1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        limit=target.hbm,
    )


@contextlib.contextmanager
def _never_cached() -> Iterator[None]:
    """Keep programs out of jax's cache: one for devices that are not here cannot be read again."""
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _memory(analysis: Any) -> dict[str, float]:
    arguments = analysis.argument_size_in_bytes
    outputs, aliased = analysis.output_size_in_bytes, analysis.alias_size_in_bytes
    # What is live at once; the sum also has what the allocator leaves between.
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    return {
        "arguments": arguments,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": outputs,
        "aliased": aliased,
        "peak": peak or arguments + analysis.temp_size_in_bytes + outputs - aliased,
    }


def devices_of(target: Target) -> list[Any]:
    """Devices that can be compiled for, without one of them here.

    Raises:
        ConfigError: the compiler is not installed, or knows no such topology.
    """
    if target.chip.kind == "tpu":
        return _tpus(target)
    if target.chip.kind == "gpu":
        return _gpus(target)
    import jax

    here = jax.devices("cpu")
    if len(here) < target.devices:
        raise ConfigError(
            f"{target.name} takes {target.devices} emulated devices, there are {len(here)}: set"
            f" JAX_NUM_CPU_DEVICES={target.devices}"
        )
    return list(here)


def _tpus(target: Target) -> list[Any]:
    # Without these libtpu asks the cloud's metadata server, which is not here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.generation}-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # no chip is touched, so none has to be guarded
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{target.generation}:{'x'.join(map(str, target.shape))}"
    try:
        return versions.tpu_topology(name, target.slices)
    except Exception as error:  # libtpu is missing, or refuses the shape in its own words
        text = one_line(error)
        if "not installed" in text:
            raise ConfigError(MISSING.format("TPUs", "libtpu")) from None
        raise ConfigError(f"libtpu has no topology {name!r}: {text}") from None


def _gpus(target: Target) -> list[Any]:
    try:
        import jax_plugins.xla_cuda13 as plugin  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError(MISSING.format("GPUs", "jax-cuda13-pjrt and jax-cuda13-plugin")) from None
    topology = "x".join(map(str, (target.slices, *target.shape)))
    library = str(plugin._get_library_path())
    return versions.gpu_topology(library, topology, gpu_config(target.generation))


def gpu_config(generation: str) -> str:
    """XLA's description of a GPU, as text: what its compiler would otherwise ask the device."""
    cores, (major, minor), memory, bandwidth, cache, clock = GPUS[generation]
    shared = 233_472
    name = f"NVIDIA {generation.upper()}"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{name}"
  platform_version: "Compute Capability {major}.{minor}a"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
