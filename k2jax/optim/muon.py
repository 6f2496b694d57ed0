"""Muon: momentum, made orthogonal by a Newton-Schulz iteration, scaled to AdamW's step size."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from k2jax.optim.checks import floating, number
from k2jax.optim.distribute import orthogonalise
from k2jax.optim.newton_schulz import Polynomial, newton_schulz
from k2jax.optim.views import assign, matrices_only, names
from k2jax.params.matrices import Matrices
from k2jax.params.route import NS_STEPS, SHARD_ABOVE_FLOPS, SLICE_BYTES

UPDATE_RMS = 0.2  # of AdamW's usual update, so that both share one learning rate [ML 2.2]


class MuonState(NamedTuple):
    """One momentum a matrix."""

    momentum: optax.Updates


def scale_by_muon(  # noqa: PLR0913, each is a choice of the recipe
    specs: Any = None,
    momentum: float = 0.95,
    dtype: str = "bfloat16",
    *,
    momentum_dtype: str = "float32",
    per_head: bool = False,
    steps: int = NS_STEPS,
    polynomial: str | Sequence[Polynomial] = "moonlight",
    gram: Sequence[int] | None = None,
    shard_above_flops: float = SHARD_ABOVE_FLOPS,
    slice_bytes: int = SLICE_BYTES,
) -> optax.GradientTransformation:
    """Replace gradients by 0.2 sqrt(max(rows, columns)) times their orthogonalised momentum.

    M = momentum M + G, then Newton-Schulz of the Nesterov form G + momentum M. Every matrix is
    orthogonalised by itself, and scaled by its own dims.

    On an explicit mesh whole matrices are sent to the devices, in `dtype`, and back; updates stay
    in the layout of their weights. Elsewhere XLA decides.

    Args:
        specs: tree of the parameters' names: `ParamSpec`, `Matrices`, or "adam"; it may name more.
            None: every array must clearly be a matrix.
        momentum: decay of M.
        dtype: of the iteration and of the exchange.
        momentum_dtype: of M between steps.
        per_head: make each head of queries, and of keys and values, a matrix of its own.
        steps: of the iteration.
        polynomial: see `newton_schulz`.
        gram: see `newton_schulz`; matrices that several devices share take the standard iteration.
        shard_above_flops: operations on a matrix above which several devices share it.
        slice_bytes: of matrices that a device holds whole at a time.

    Raises:
        ConfigError: a leaf that is no matrix, or has no spec; it is named.

    Source: [ML] equations 1-4, toy_train.py; [K2-TR] algorithm 1.
    """
    number("momentum", momentum, high=1)
    floating("dtype", dtype)
    floating("momentum_dtype", momentum_dtype)

    def views(tree: Any) -> dict[str, Matrices]:
        return matrices_only(assign(tree, specs, per_head))

    def iterate(x: jax.Array, split: tuple[str, ...]) -> jax.Array:
        by = None if split else gram

        def run(x: jax.Array) -> jax.Array:
            return newton_schulz(x, steps, dtype, polynomial=polynomial, gram=by, split=split)

        # One matrix at a time stays in a CPU's cache; devices that share matrices go in step.
        one_by_one = run if split else lambda x: jax.lax.map(run, x)
        return jax.lax.platform_dependent(x, cpu=one_by_one, default=run)

    def init(params: optax.Params) -> MuonState:
        views(params)
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, momentum_dtype), params))

    def update(updates, state, params=None):
        del params

        def add(m: jax.Array, g: jax.Array) -> jax.Array:
            return momentum * m.astype(jnp.float32) + g.astype(jnp.float32)

        moved = jax.tree.map(add, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: add(m, g).astype(dtype), moved, updates)
        view = views(nesterov)

        # Leaves that another group owns are empty nodes here, and pass through.
        leaves = names(nesterov)
        ready = orthogonalise(leaves, view, iterate, shard_above_flops, slice_bytes)

        def scale(name: str, u: jax.Array) -> jax.Array:
            return UPDATE_RMS * max(view[name].sizes(u.shape)[1:]) ** 0.5 * u.astype(jnp.float32)

        scaled = [
            scale(name, u).astype(g.dtype)
            for (name, u), g in zip(ready.items(), jax.tree.leaves(updates), strict=True)
        ]
        kept = jax.tree.map(lambda m: m.astype(momentum_dtype), moved)
        return jax.tree.unflatten(jax.tree.structure(nesterov), scaled), MuonState(kept)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule, specs: Any = None, weight_decay: float = 0.1, **settings
) -> optax.GradientTransformation:
    """Muon for parameters that are all matrices: W = W - lr (O + weight_decay W).

    Args:
        learning_rate: number or schedule.
        specs: see `scale_by_muon`, as are `settings`.
        weight_decay: times the base learning rate.
        settings: of `scale_by_muon`.

    Source: [ML] equation 3.
    """
    settings |= settings.pop("settings", {})  # as `optax.inject_hyperparams` hands them on
    number("learning_rate", learning_rate)
    number("weight_decay", weight_decay)
    return optax.chain(
        scale_by_muon(specs, **settings),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
