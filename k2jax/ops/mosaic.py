"""What kernels for Hopper GPUs share, which Mosaic compiles for Pallas.

Three warpgroups share a program: the last one, the copier, brings blocks of the operands to shared
memory some steps ahead (TMA); the others, the workers, multiply them there (WGMMA).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from k2jax.runtime import versions

plgpu: Any = versions.pallas_mosaic_gpu()

WORKERS = 2
COPIER_REGISTERS = 40  # of a thread; the workers get the others
SWITCH = "K2JAX_MOSAIC"  # 0: kernels that Triton compiles take the place of these


def is_chosen() -> bool:
    """Whether what is traced now is for a Hopper GPU and gets the kernels."""
    return plgpu is not None and os.environ.get(SWITCH) != "0" and versions.is_for_hopper()


def make_kernel(body: Callable, programs: int, out: Any, interpret: Any) -> Callable:
    """Make a kernel from what all warpgroups of a program run.

    Args:
        body: gets references to the inputs and the outputs; the axes are "program" and "worker".
        programs: how many run.
        out: shapes and dtypes of the outputs.
        interpret: parameters of the interpreter, to run without a GPU.
    """
    warpgroup = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=WORKERS + 1,
        thread_name="worker",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=warpgroup),
    )


def run_pipeline(step: Callable, work: Callable, count: Any, inputs: Sequence, stages: int) -> None:
    """Run steps on blocks of the inputs, which the copier brings.

    Args:
        step: of a worker; gets its number, references to the blocks, and what is carried.
        work: of a worker around all of its steps; gets a function that runs them, from what is
            carried at first to what is carried in the end.
        count: of the steps.
        inputs: pairs of the spec of a block and a reference to the array.
        stages: blocks of each input that are under way.
    """
    specs, refs = zip(*inputs, strict=True)
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(count,),
        memory_registers=COPIER_REGISTERS,
        in_specs=specs,
        max_concurrent_steps=stages,
        wg_axis="worker",
        num_compute_wgs=WORKERS,
        compute_context=work,
    )(*refs)


def worker() -> jax.Array:
    """Number of the warpgroup that runs."""
    return jax.lax.axis_index("worker")
