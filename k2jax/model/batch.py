"""Rows of tokens for the network, and how those of a host become arrays on the mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.sharding import reshard


class Batch(NamedTuple):
    """Rows of tokens; all int32 [batch, length] but `weight`, float32, and the scalar `total`."""

    token: jax.Array
    target: jax.Array  # next token
    weight: jax.Array  # 1 where the target counts, else 0
    segment: jax.Array  # document within the row from 1; 0 is padding
    position: jax.Array  # within the document
    total: jax.Array | None = None  # sum of the weights of all micro-batches; None: of these rows


def plain(token_BT: jax.Array) -> Batch:
    """Make rows that are one document each, without padding; the targets are left out."""
    length = token_BT.shape[1]
    ones = reshard(jnp.ones_like(token_BT), "batch", "length")
    position = reshard(jnp.broadcast_to(jnp.arange(length), token_BT.shape), "batch", "length")
    return Batch(token_BT, token_BT, jnp.zeros(token_BT.shape), ones, position)


def micro_spec() -> P:
    """Return the layout of a step's batch arrays, [micro-batches, rows, length]."""
    return P(None, *sharding.storage_spec(("batch", "length")))


def own_parts(accumulate: int = 1) -> dict[str, Any]:
    """Return which parts of a batch this host makes: arguments of `k2jax.data.Batches.batch`."""
    parts, of, _ = sharding.batch_share()
    micro = range(accumulate)
    return {"parts": [k * of + part for k in micro for part in parts], "of": of * accumulate}


def to_devices(rows: Mapping[str, np.ndarray], accumulate: int = 0) -> Batch:
    """Make a global batch of this host's rows, on the mesh in use.

    Args:
        rows: arrays of `k2jax.data`, [rows of this host, length]: `own_parts` of the batch.
        accumulate: micro-batches to cut them into as a leading dim; 0: no such dim.
    """
    spec = micro_spec() if accumulate else sharding.storage_spec(("batch", "length"))
    share = sharding.batch_share()

    def put(array: np.ndarray) -> jax.Array:
        if accumulate:
            array = array.reshape(accumulate, -1, array.shape[-1])
        if sharding.meshless():
            return jnp.asarray(array)
        part = array.shape[-2] // len(share.parts)  # rows of one

        def local(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            *lead, rows, length = index
            at = share.parts.index((rows.start or 0) // part) * part
            return array[*lead, at : at + part, length]

        shape = (*array.shape[:-2], part * share.of, array.shape[-1])
        layout = jax.NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.make_array_from_callback(shape, layout, local)

    fields = ("tokens", "targets", "weights", "segments", "positions")
    return Batch(*(put(rows[field]) for field in fields))
