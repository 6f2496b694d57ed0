"""Causal attention on Hopper GPUs: Pallas kernels that Mosaic compiles (`ops/mosaic.py`).

As in `gpu.py` a program has a block of queries (or of keys), the held side, and goes through a
range of blocks of the other side, which are met. Each worker has half of the held block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from k2jax.ops.attention.gpu import LOG2E, NEG_INF, _block_ranges, _pad_side, _Side
from k2jax.ops.mosaic import WORKERS, is_chosen, make_kernel, plgpu, run_pipeline, worker

# Positions of the held block; of a block that is met, fewer where two sums fill the registers;
# blocks under way. At K2's widths 222 KiB of shared memory at most, and nothing spills.
HELD, MET, MET_BY_KEYS, STAGES = 128, 64, 32, 3
SHARE = HELD // WORKERS
UNIT, MAX_QUERY, MAX_VALUE = 64, 192, 128  # of widths


class _Place(NamedTuple):
    """Where a program is: row of the batch, head, held block, and the range of blocks to meet."""

    row: Any
    head: Any
    block: Any
    begin: Any
    end: Any


class _Refs(NamedTuple):
    """Arrays: of the held side and of the other one, documents first; results."""

    held: Sequence
    met: Sequence
    out: Sequence


class _Rooms(NamedTuple):
    """Shared memory, each with a part for each worker; a barrier for what is loaded at first."""

    held: Any
    weight: Any
    out: Any  # none for gradients, which take the room of what they are of
    barrier: Any


class _Kernel(NamedTuple):
    """What a worker does: sums that products are added to, or else what it starts with; a step."""

    sums: Sequence
    start: Callable
    meet: Callable
    finish: Callable


def is_supported(q_BHTC: jax.Array, v_BHSV: jax.Array) -> bool:
    """Whether the program is for Hopper, and the kernels take the dtype and widths."""
    query, value = q_BHTC.shape[3], v_BHSV.shape[3]
    fits = query <= MAX_QUERY and value <= MAX_VALUE and query % UNIT == value % UNIT == 0
    return fits and q_BHTC.dtype.itemsize == 2 and is_chosen()


def forward(q_BHTC, k_BHSC, v_BHSV, segment_BT, *, scale: float, interpret: Any = None):
    """Compute what `gpu.forward` does; `interpret` has the interpreter's parameters."""
    queries = _pad_side((q_BHTC,), segment_BT, HELD)
    keys = _pad_side((k_BHSC, v_BHSV), segment_BT, MET)
    rows = queries.arrays[0].shape[:3]
    row = jax.ShapeDtypeStruct(rows, jnp.float32)
    y = jax.ShapeDtypeStruct((*rows, v_BHSV.shape[3]), v_BHSV.dtype)
    kernel = functools.partial(_attention, scale)
    outputs = _launch(kernel, queries, keys, (y, row, row), True, interpret)
    y, top, logsum = (a[:, :, : q_BHTC.shape[2]] for a in outputs)
    return y, top, logsum


def backward(saved, dy_BHTV: jax.Array, *, scale: float, interpret: Any = None):
    """Compute what `gpu.backward` does; `interpret` has the interpreter's parameters."""
    q_BHTC, k_BHSC, v_BHSV, segment_BT, y_BHTV, logsum_BHT = saved
    mean_BHT = (dy_BHTV * y_BHTV).astype(jnp.float32).sum(axis=-1)
    queries, keys = (q_BHTC, dy_BHTV, logsum_BHT * LOG2E, mean_BHT), (k_BHSC, v_BHSV)

    def run(kernel, held, met, of_queries):
        held, met = _pad_side(held, segment_BT, HELD), _pad_side(met[0], segment_BT, met[1])
        likes = held.arrays[: 1 if of_queries else 2]
        out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in likes]
        return _launch(functools.partial(kernel, scale), held, met, out, of_queries, interpret)

    (dq,) = run(_attention_dq, queries, (keys, MET), True)
    dk, dv = run(_attention_dkv, keys, (queries, MET_BY_KEYS), False)
    return tuple(d[:, :, : a.shape[2]] for d, a in zip((dq, dk, dv), saved[:3], strict=True))


def _launch(kernel, held: _Side, met: _Side, out: Sequence, of_queries: bool, interpret: Any):
    """Run a kernel: a program for each block that is held, each head, each row of the batch."""
    table = _block_ranges(held, met, of_queries)
    batch, blocks, _ = table.shape
    heads, inputs = held.arrays[0].shape[1], (held.segment_BT, *held.arrays)

    def room(a) -> Any:
        return plgpu.SMEM((WORKERS, SHARE, *a.shape[3:]), a.dtype)

    barrier = plgpu.Barrier(num_arrivals=len(inputs), num_barriers=WORKERS)
    rooms = _Rooms(
        [room(a) for a in inputs],
        plgpu.SMEM((WORKERS, SHARE, met.block), held.arrays[0].dtype),
        [room(a) for a in out] if len(out) > len(held.arrays) else [],
        barrier,
    )

    @functools.wraps(kernel.func)
    def body(table_ref, *refs):
        program = jax.lax.axis_index("program")
        n, pair = jax.lax.rem(program, blocks), jax.lax.div(program, blocks)
        # The longest ranges first: those of the last queries, and of the first keys.
        block = blocks - 1 - n if of_queries else n
        row, head = jax.lax.div(pair, heads), jax.lax.rem(pair, heads)
        place = _Place(row, head, block, table_ref[row, block, 1], table_ref[row, block, 2])
        parts = refs[: len(inputs)], refs[len(inputs) : -len(out)], refs[-len(out) :]
        run = functools.partial(_go_through, kernel, place, _Refs(*parts))
        pl.run_scoped(run, rooms, collective_axes="worker")

    run = make_kernel(body, batch * heads * blocks, list(out), interpret)
    return run(table, *inputs, met.segment_BT, *met.arrays)


def _go_through(kernel, place: _Place, refs: _Refs, rooms: _Rooms) -> None:
    """Load a worker's part of the held block, meet the blocks of the other side, store results."""
    block = rooms.weight.shape[2]
    sums, start, meet, finish = kernel(place, block, [ref.shape[-1] for ref in refs.out])

    def work(run):
        _load(place, refs, rooms)

        def add_up(*sums):
            _store(place, refs, rooms, finish(run(sums or start())))

        if sums:
            pl.run_scoped(add_up, *sums)
        else:
            add_up()

    def step(indices, *blocks):
        *blocks, carry = blocks
        *mine, weight_ref = (room.at[worker()] for room in (*rooms.held, rooms.weight))
        return meet(place.begin + indices[0], mine, blocks, weight_ref, carry)

    inputs = [(_block_spec(ref, block, place), ref) for ref in refs.met]
    run_pipeline(step, work, place.end - place.begin, inputs, STAGES)


def _load(place: _Place, refs: _Refs, rooms: _Rooms) -> None:
    """Copy a worker's part of what is held, and wait for it."""
    for ref, room in zip(refs.held, rooms.held, strict=True):
        source, barrier = _part(ref, place), rooms.barrier.at[worker()]
        plgpu.copy_gmem_to_smem(source, room.at[worker()], barrier)
    plgpu.barrier_wait(rooms.barrier.at[worker()])


def _store(place: _Place, refs: _Refs, rooms: _Rooms, results) -> None:
    """Copy a worker's part of the results; gradients take the room of what they are of."""
    for ref, room, value in zip(refs.out, rooms.out or rooms.held[1:], results, strict=False):
        _put(room.at[worker()], value)
        plgpu.copy_smem_to_gmem(room.at[worker()], _part(ref, place))
    plgpu.wait_smem_to_gmem(0)


def _part(ref, place: _Place):
    """A worker's part of the held block, of an array."""
    return ref.at[*_outer(ref, place), pl.ds(place.block * HELD + worker() * SHARE, SHARE)]


def _block_spec(ref, block: int, place: _Place):
    """Blocks of an array that are met, in their order."""
    outer = _outer(ref, place)
    inner = ref.shape[len(outer) + 1 :]

    def index(j):
        return *outer, place.begin + j, *(0 for _ in inner)

    return plgpu.BlockSpec((*(None for _ in outer), block, *inner), index)


def _outer(ref, place: _Place) -> tuple:
    """Where a program is in the dims before T of [B, T], [B, H, T] or [B, H, T, C]."""
    return (place.row, place.head)[: min(len(ref.shape) - 1, 2)]


def _attention(scale, place: _Place, block: int, widths: Sequence[int]) -> _Kernel:
    """Attention of a block of queries: softmax sums are carried along the keys."""

    def start():
        row = _cast_rows(jnp.zeros(SHARE, jnp.float32))
        y = plgpu.layout_cast(jnp.zeros((SHARE, widths[0]), jnp.float32), plgpu.Layout.WGMMA)
        return y, row + NEG_INF, row

    def meet(j, held, met, weight_ref, carry):
        (segment_T_ref, q_ref), (segment_S_ref, k_ref, v_ref) = held, met
        y, top_T, sum_T = carry
        logit_TS = _product(q_ref, k_ref) * (scale * LOG2E)
        seen_TS = _is_seen(place, j * block, segment_T_ref, segment_S_ref, 1)
        logit_TS = jnp.where(seen_TS, logit_TS, -jnp.inf)
        new_T = jnp.maximum(top_T, logit_TS.max(axis=1))
        weight_TS, rescale_T = jnp.exp2(logit_TS - _rows(new_T, block)), jnp.exp2(top_T - new_T)
        _put(weight_ref, weight_TS)
        y = y * _rows(rescale_T, widths[0]) + _multiply(weight_ref, v_ref, widths[0])
        return y, new_T, sum_T * rescale_T + weight_TS.sum(axis=1)

    def finish(carry):
        y, top_T, sum_T = carry
        return y / _rows(sum_T, widths[0]), top_T / LOG2E, top_T / LOG2E + jnp.log(sum_T)

    return _Kernel((), start, meet, finish)


def _attention_dq(scale, place: _Place, block: int, widths: Sequence[int]) -> _Kernel:
    """Gradient of a block of queries; weights are recomputed from the logs of their sums."""

    def meet(j, held, met, weight_ref, sums):
        segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref = held
        segment_S_ref, k_ref, v_ref = met
        logsum, mean = (_rows(_cast_rows(ref[...]), block) for ref in (logsum_ref, mean_ref))
        logit_TS = _product(q_ref, k_ref) * (scale * LOG2E)
        seen_TS = _is_seen(place, j * block, segment_T_ref, segment_S_ref, 1)
        weight_TS = jnp.where(seen_TS, jnp.exp2(logit_TS - logsum), 0.0)
        _put(weight_ref, weight_TS * (_product(dy_ref, v_ref) - mean))
        _add_product(sums[0], weight_ref, k_ref)
        return sums

    def finish(sums):
        return [sums[0][...] * scale]

    return _Kernel(_make_sums(widths), tuple, meet, finish)


def _attention_dkv(scale, place: _Place, block: int, widths: Sequence[int]) -> _Kernel:
    """Gradients of a block of keys and values."""

    def meet(i, held, met, weight_ref, sums):
        segment_S_ref, k_ref, v_ref = held
        segment_T_ref, q_ref, dy_ref, logsum_ref, mean_ref = met
        logsum, mean = (_columns(ref[...]) for ref in (logsum_ref, mean_ref))
        logit_ST = _product(k_ref, q_ref) * (scale * LOG2E)
        seen_ST = _is_seen(place, i * block, segment_S_ref, segment_T_ref, -1)
        weight_ST = jnp.where(seen_ST, jnp.exp2(logit_ST - logsum), 0.0)
        _put(weight_ref, weight_ST)
        _add_product(sums[1], weight_ref, dy_ref)
        _put(weight_ref, weight_ST * (_product(v_ref, dy_ref) - mean))
        _add_product(sums[0], weight_ref, q_ref)
        return sums

    def finish(sums):
        return sums[0][...] * scale, sums[1][...]

    return _Kernel(_make_sums(widths), tuple, meet, finish)


def _is_seen(place: _Place, met_first, held_ref, met_ref, sign: int):
    """Which positions see each other: of a worker's part, and of a block whose first is given.

    Args:
        place: of the program.
        met_first: first position of the block that is met.
        held_ref: documents of the worker's part.
        met_ref: documents of the block.
        sign: 1 if queries are held, -1 if keys are.
    """
    shape = held_ref.shape[0], met_ref.shape[0]
    held_first = place.block * HELD + worker() * SHARE
    held, met = (
        plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, dim), plgpu.Layout.WGMMA)
        for dim in (0, 1)
    )
    same = _rows(_cast_rows(held_ref[...]), shape[1]) == _columns(met_ref[...])
    return same & ((held_first - met_first + held - met) * sign >= 0)


def _make_sums(widths: Sequence[int]) -> list:
    return [plgpu.ACC((SHARE, width), jnp.float32) for width in widths]


def _product(a_ref, b_ref):
    """`a b^T`."""
    return _multiply(a_ref, b_ref.transpose((1, 0)), b_ref.shape[0])


def _multiply(a_ref, b_ref, columns: int):
    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((SHARE, columns), jnp.float32))


def _add_product(sum_ref, a_ref, b_ref) -> None:
    plgpu.wgmma(sum_ref, a_ref, b_ref)
    plgpu.wgmma_wait(0)


def _put(ref, value) -> None:
    """Write to shared memory, so that copies and products see it."""
    ref[...] = value.astype(ref.dtype)
    plgpu.commit_smem()


def _cast_rows(a):
    return plgpu.layout_cast(a, plgpu.Layout.WGMMA.reduce(1))


def _rows(a, width: int):
    """A number for each row, along `width` columns."""
    return jax.lax.broadcast_in_dim(a, (SHARE, width), [0])


def _columns(a):
    """A number for each column, along the rows."""
    a = plgpu.layout_cast(a, plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(a, (SHARE, a.shape[0]), [1])
