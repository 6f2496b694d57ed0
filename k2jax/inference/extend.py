"""The loop over new tokens: pick one in every row, step, until all rows have stopped.

It runs as one program on the device. Everything that differs from call to call is an array, so that
only a new size, or another kind of choice, is compiled again.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ModelConfig
from k2jax.inference.decode import prefill, step, unstack_layers
from k2jax.model.projection import Policy
from k2jax.ops.moe.dispatch import Dispatch
from k2jax.params.arrays import Params, bind
from k2jax.params.kimi import Kimi, declare_kimi
from k2jax.params.low_bit_parts import map_parts
from k2jax.params.spec import ParamSpec
from k2jax.sharding import (
    axes_of,
    inference_mesh,
    meshless,
    reshard,
    storage_spec,
)

GREEDY, PLAIN, NUCLEUS = "greedy", "plain", "nucleus"
STOPPED = -1  # in the place of a row's stop token and of all that follow


class Request(NamedTuple):
    """Prompts of one call, and how to extend them."""

    token_BT: jax.Array | np.ndarray  # int32 prompts, each from the start of its row
    length_B: jax.Array | np.ndarray  # int32 tokens of each prompt
    limit: int  # new tokens a row, at most `room`
    stop: np.ndarray  # int32 ids that end a row
    allowed: int  # ids below it may be chosen
    temperature: float = 1.0
    top_p: float = 1.0
    seed: np.uint32 = np.uint32(0)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "room", "kind", "dispatch"))
def extend(
    params: Params,
    request: Request,
    *,
    cfg: ModelConfig,
    dtype: str,
    room: int,
    kind: str,
    dispatch: Dispatch = Dispatch(),  # noqa: B008, a constant
) -> jax.Array:
    """Extend every prompt: new tokens, int32 [batch, room]; STOPPED from where a row ended.

    Args:
        params: weights.
        request: what to extend and how.
        cfg: sizes.
        dtype: to compute in.
        room: new tokens that the cache has room for.
        kind: GREEDY, PLAIN (temperature) or NUCLEUS (temperature and top-p).
        dispatch: how the prompts' tokens reach their experts. New ones, one a row, are gathered.
    """
    w, policy = bind(Kimi(cfg), params), Policy(dtype)
    token_BT = reshard(jnp.asarray(request.token_BT), "batch", "length")
    length_B = reshard(jnp.asarray(request.length_B), "batch")
    rows, length = token_BT.shape
    layers = unstack_layers(w, cfg)

    def choose(y_BX: jax.Array, i: jax.Array, done_B: jax.Array, new_BN: jax.Array):
        token_B = pick(reshard(y_BX, None, None), i, request, kind)
        done_B |= (token_B[:, None] == request.stop).any(axis=1)
        note_B1 = jnp.where(done_B, STOPPED, token_B)[:, None]
        return i + 1, token_B, done_B, jax.lax.dynamic_update_slice(new_BN, note_B1, (0, i))

    def is_running(state) -> jax.Array:
        (i, _, done_B, _), _ = state
        return (i < request.limit) & ~done_B.all()

    def extend_once(state):
        (i, token_B, done_B, new_BN), cache = state
        y_BX, cache = step(w, layers, cache, reshard(token_B, "batch"), cfg, policy)
        return choose(y_BX, i, done_B, new_BN), cache

    y_BX, cache = prefill(
        w, token_BT, length_B, cfg, length + room, dataclasses.replace(policy, dispatch=dispatch)
    )
    new_BN = jnp.full((rows, room), STOPPED, jnp.int32)
    first = choose(y_BX, jnp.int32(0), jnp.zeros(rows, bool), new_BN)
    return jax.lax.while_loop(is_running, extend_once, (first, cache))[0][3]


def pick(y_BX: jax.Array, i: jax.Array, request: Request, kind: str) -> jax.Array:
    """Choose the next token of each row, int32 [batch], from its logits.

    A row's draws depend on the seed, its place in the batch and `i`, the number of new tokens.
    """
    y_BX = jnp.where(jnp.arange(y_BX.shape[1]) < request.allowed, y_BX, -jnp.inf)
    if kind == GREEDY:
        return y_BX.argmax(axis=-1).astype(jnp.int32)
    y_BX /= request.temperature
    if kind == NUCLEUS:
        y_BX = nucleus(y_BX, request.top_p)
    key = jax.random.fold_in(jax.random.key(request.seed), i)

    def draw(y_X: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, row), y_X)

    return jax.vmap(draw)(y_BX, jnp.arange(y_BX.shape[0])).astype(jnp.int32)


def nucleus(y_BX: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Mask the logits outside of the smallest set of most likely tokens that reaches `top_p`.

    The most likely token always stays; ties with the last one kept stay too.
    """
    sorted_BX = jnp.sort(y_BX, axis=-1, descending=True)
    share_BX = jax.nn.softmax(sorted_BX, axis=-1)
    before_BX = jnp.cumsum(share_BX, axis=-1) - share_BX
    kept_BX = (before_BX < top_p).at[:, 0].set(True)
    least_B1 = jnp.where(kept_BX, sorted_BX, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(y_BX >= least_B1, y_BX, -jnp.inf)


def batch_ways() -> int:
    """Count the parts in which the mesh in use splits a batch; they divide its rows."""
    shape = jax.sharding.get_abstract_mesh().shape
    return 1 if meshless() else math.prod(shape[axis] for axis in axes_of("cache"))


@contextlib.contextmanager
def decoding(params: Params, cfg: ModelConfig) -> Iterator[Params]:
    """Put the weights on a mesh for inference, of the devices on which they are."""
    mesh = None if meshless() else jax.sharding.get_mesh()
    if mesh is None or "data" not in mesh.shape:
        yield params
        return
    specs = declare_kimi(cfg)
    with jax.set_mesh(inference_mesh(mesh, specs)):
        yield {name: map_parts(a, specs[name], _lay) for name, a in params.items()}


def _lay(leaf: jax.Array, spec: ParamSpec) -> jax.Array:
    """Lay an array on the mesh in use; nothing is copied where each device has its part."""
    layout = jax.NamedSharding(jax.sharding.get_mesh(), storage_spec(spec.axes))
    here = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    if here != layout.addressable_devices_indices_map(leaf.shape):
        return jax.device_put(leaf, layout)
    parts = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, layout, parts)
