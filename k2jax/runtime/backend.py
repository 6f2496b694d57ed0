"""What has to be set before jax starts its backends."""

import contextlib
import os

import jax

from k2jax.runtime import hardware, memory, versions
from k2jax.runtime.files import default_cache

# Both are jax's; it refuses to start with the two of them set.
MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def prepare(devices: int = 1, processes: int = 1) -> None:
    """Emulate `devices` devices where there is only a CPU, keep compiled programs and memory flat.

    Call it before anything is computed. Where a GPU or TPU is found, only the program cache is
    set. `JAX_COMPILATION_CACHE_DIR` overrides the place of the cache, `JAX_PLATFORMS` what jax
    looks for; without it, on a machine that can have no accelerator, it looks for none.

    Args:
        devices: of all processes.
        processes: that emulate an equal share each.
    """
    versions.warn_if_untested()
    if not any(name in os.environ for name in MEMORY_SHARE):
        os.environ[MEMORY_SHARE[0]] = "0.95"  # of a GPU, as plans count; jax's default is 0.75
    if not os.environ.get("JAX_PLATFORMS") and not hardware.may_have_accelerator():
        # The compilers that `plan` uses are plugins: jax tries them all, and logs a traceback each.
        jax.config.update("jax_platforms", "cpu")
    memory.limit_malloc_arenas()  # heaps that threads have made already would stay
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # jax has started already, with its devices
            jax.config.update("jax_num_cpu_devices", -(-devices // processes))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(default_cache() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's notes on layouts are for its authors
