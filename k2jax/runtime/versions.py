"""Which code this is, and what differs between versions of JAX.

Private names of JAX, and public ones that moved or will, are imported in this file only.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# All tests run on the first of these versions of Python and JAX; README, "Versions", says which run
# on the others. `setup.cfg` has the same bounds.
TESTED = (("3.11", "0.10.2"), ("3.12", "0.11.2"), ("3.13", "0.12.0.1"))
OLDEST, BEYOND = "0.10.2", "0.13"
HOPPERS = tuple(f"NVIDIA {name}" for name in ("H100", "H200", "H800", "H20", "GH200"))


def source_hash() -> str:
    """Of the package's Python files, in the order of their names; the same for every process."""
    files: dict[str, Path] = {}  # installed, configs lie within k2jax; in a checkout, beside it
    for package in ("k2jax", "k2jax.configs", "k2jax.sharding"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        name = package.replace(".", "/")
        files |= {f"{name}/{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*.py")}
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def warn_if_untested() -> None:
    """Write one line to stderr, once a process, where JAX is not one that was tested."""
    version = importlib.metadata.version("jax")
    if not _numbers(OLDEST) <= _numbers(version) < _numbers(BEYOND):
        tested = ", ".join(jax for _, jax in TESTED)
        sys.stderr.write(f"k2jax: jax {version} is untested; tested are {tested}\n")


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release: what follows them names a candidate or a build."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))  # type: ignore[index]


def fast_compile_flags() -> dict[str, str | bool]:
    """XLA's, for CPUs: a third of the time to compile, for steps that take three times as long."""
    flags: dict[str, str | bool] = {
        "xla_backend_optimization_level": "0",
        "xla_llvm_disable_expensive_passes": True,
    }
    if _numbers(importlib.metadata.version("jax")) < (0, 11):  # unknown flags end the process
        flags["xla_cpu_use_fusion_emitters"] = False
    return flags


def cpu_flags() -> dict[str, str | bool]:
    """XLA's, for inference on CPUs.

    Products are YNN's, but sums XLA's, whose order no other row decides. And nothing is moved out
    of loops: it would be the conversion of all experts to float32, in every call, where those that
    a row chose are converted one by one.
    """
    flags: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if _numbers(importlib.metadata.version("jax")) < (0, 11):
        flags["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    return flags


def pallas_triton() -> ModuleType | None:
    """Pallas' backend of Triton for GPUs: deprecated from JAX 0.11 on; None once it is removed."""
    try:
        return importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return None


def pallas_mosaic_gpu() -> ModuleType | None:
    """Pallas' backend of Mosaic for GPUs; None where it does not load."""
    try:
        return importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError:
        return None


def mosaic_gpu_interpreter(**settings: Any) -> Any:
    """Parameters that run a kernel of Mosaic for GPUs without a GPU: `plgpu.kernel(interpret=)`."""
    params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return params.InterpretGPUParams(**settings)


def is_for_hopper() -> bool:
    """Whether a Hopper GPU runs what is traced now: the mesh's in use, or this machine's."""
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind.startswith(HOPPERS)
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@contextlib.contextmanager
def abstract_gpu(name: str) -> Iterator[Any]:
    """Trace and lower for a GPU that is not here; yields the mesh of this context, with it.

    From JAX 0.11 on kernels are lowered for one GPU, which is that of the machine or of the mesh.

    Args:
        name: what the GPU's driver calls it, such as "NVIDIA H200".
    """
    import jax

    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform="gpu")
    mesh = jax.sharding.get_abstract_mesh().update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def tpu_topology(name: str, slices: int) -> list[Any]:
    """Devices that libtpu compiles for, without one of them here; errors are libtpu's own."""
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def gpu_topology(library: str, topology: str, description: str) -> list[Any]:
    """Devices that a CUDA plugin compiles for, without one of them here.

    Args:
        library: path of the plugin's shared library.
        topology: slices x hosts of each x GPUs of each.
        description: of a GPU, as XLA's text.
    """
    import jax
    from jax._src.lib import xla_client

    jax.devices("cpu")  # JAX loads the plugins that it finds, once; loading one before is an error
    if not xla_client.pjrt_plugin_loaded("cuda"):
        xla_client.load_pjrt_plugin_dynamically("cuda", library)
    if not xla_client.pjrt_plugin_initialized("cuda"):
        xla_client.initialize_pjrt_plugin("cuda")
    options = {"topology": topology, "target_config": description}
    found = xla_client._xla.get_default_c_api_topology("cuda", "", options)
    return list(found._make_compile_only_devices())


def detect_cluster(timeout: int) -> tuple[Any, ...]:
    """Coordinator, number of processes, this one's and its devices; None what is not known."""
    # JAX has no public name for this; `jax.distributed.initialize` begins with the same call.
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)


def set_gloo_address(address: str) -> None:
    """Let CPUs of several processes exchange numbers at an address of this host.

    By itself gloo takes what the host's name stands for, which is 127.0.1.1 on many Linux machines:
    no other host can reach that. Call it before JAX starts its backends.

    Args:
        address: as text, or a name.
    """
    from jax._src import config, distributed, xla_bridge
    from jax._src.lib import _jax

    if config.cpu_collectives_implementation.value != "gloo":
        return

    def make_client() -> Any:
        client = distributed.global_state.client
        collectives = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
        return xla_bridge.make_cpu_client(collectives=collectives)

    xla_bridge.register_backend_factory("cpu", make_client, priority=0, fail_quietly=False)
