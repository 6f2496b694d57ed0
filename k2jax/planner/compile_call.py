"""Ask a target's real compiler about a call of inference: `decoding.Call` as a program."""

import dataclasses
from typing import Any

from k2jax.planner.compiler import Compiled, compile_on
from k2jax.planner.decoding import PAGE, Call

POLICY_DTYPE = "bfloat16"


def compile_call(call: Call, dtype: str = POLICY_DTYPE) -> Compiled:
    """Compile a decode step, a chunk of prompts or one that is scored, for the call's target.

    Args:
        call: to compile.
        dtype: of plain weights and of what is computed.

    Raises:
        ConfigError: the compiler is not installed, or knows no such topology.
    """
    call = dataclasses.replace(call, model=dataclasses.replace(call.model, mtp_layers=0))
    return compile_on(
        call.target, call.mesh, lambda mesh: _trace(call, mesh, dtype), inference=True
    )


def _trace(call: Call, mesh: Any, dtype: str) -> Any:
    """Trace the call with abstract arrays on the mesh in use."""
    import functools

    import jax

    from k2jax.inference import forward as network
    from k2jax.inference.cache import pool_spec
    from k2jax.inference.paged_attention import Chunks
    from k2jax.model.projection import Policy
    from k2jax.params.arrays import abstract
    from k2jax.params.kimi import declare_kimi

    cfg, policy = call.model, Policy(dtype)

    def make(shape: tuple[int, ...], dtype: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def place(a: Any) -> Any:
        return make(a.shape, a.dtype, a.sharding.spec)

    def pages(*layers: int) -> Any:
        shape = (*layers, call.mesh.devices * call.pages, PAGE, cfg.size("latent"))
        return make(shape, dtype, pool_spec(bool(layers)))

    params = jax.tree.map(place, abstract(declare_kimi(cfg), dtype, weights=call.form))
    split = functools.partial(network.split_weights, cfg=cfg)
    weights = jax.tree.map(place, jax.eval_shape(split, params))
    depths = network.list_depths(cfg)
    pool = tuple(pages(n) if n > 0 else tuple(pages() for _ in range(-n)) for n in depths)

    def whole(*shape: int) -> Any:
        return make(shape, "int32", jax.P())

    chunks = Chunks(
        whole(call.chunks, call.tokens),
        whole(call.chunks),
        whole(call.chunks),
        whole(call.chunks, -(-call.context // PAGE)),
        whole(call.wanted),
    )

    def run(weights: Any, pool: Any, chunks: Any) -> Any:
        return network.forward(weights, pool, chunks, cfg, policy)[:2]

    return jax.jit(run, donate_argnums=1).trace(weights, pool, chunks)
