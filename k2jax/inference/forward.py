"""The network over chunks of sequences whose earlier tokens lie in pages of latents.

A chunk is some consecutive tokens of one sequence: one new token where it decodes, a block of the
prompt where it is read. In each layer the latents of all chunks are written to their pages first;
then every token attends to its sequence's pages, so that chunks of one sequence may be in the same
call, in any number.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.inference import draft
from k2jax.inference.cache import Pool
from k2jax.inference.layer import apply_layer, describe
from k2jax.inference.paged_attention import Chunks, lay_out_up
from k2jax.inference.placement import batch_ways
from k2jax.model.logits import head, pick_tokens
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, look_up
from k2jax.params.arrays import Params, bind
from k2jax.params.kimi import Kimi
from k2jax.sharding import meshless, reshard

# Stacks of at most this many layers are split into layers before anything is computed, experts
# excepted; XLA would otherwise copy each layer's weights out of the stack in every call. Deeper
# stacks would compile too long, and layers that are split off are in memory twice.
MAX_UNSTACKED_LAYERS = 16
EXPERTS, MOE, KV_UP = "moe.experts.", "moe.router", "attention.kv_up"


class Weights(NamedTuple):
    """Arrays of the network by the names of their declarations."""

    whole: Params  # neither embedding, head nor experts belong to one layer
    # For each stack its arrays, or those of each of its layers, without the stack's name.
    stacks: tuple[Params | tuple[Params, ...], ...]


def split_weights(params: Params, cfg: ModelConfig) -> Weights:
    """Take the stacks apart that are not too deep; experts stay in theirs.

    On one device the layers' weights are laid out as their products read them.
    """
    whole, stacks = dict(params), []
    for prefix, depth in _list_stacks(cfg):
        names = [name for name in params if name.startswith(prefix) and EXPERTS not in name]
        stack = {name.removeprefix(prefix): whole.pop(name) for name in names}
        stacks.append(
            stack
            if depth > MAX_UNSTACKED_LAYERS
            else tuple(_lay_out(_take_layer(stack, i), cfg) for i in range(depth))
        )
    return Weights(whole, tuple(stacks))


def _take_layer(stack: Params, index: int) -> Params:
    return jax.tree.map(operator.itemgetter(index), stack)


def _lay_out(layer: Params, cfg: ModelConfig) -> Params:
    up = layer[KV_UP]
    if not meshless() or not isinstance(up, jax.Array):  # whatever else it is, `read_weight` reads
        return layer
    return layer | {KV_UP: lay_out_up(up, cfg)}


def list_depths(cfg: ModelConfig) -> list[int]:
    """Layers of each stack, negative where it is taken apart: `cache.make_pool` takes it."""
    depths = [depth for _, depth in _list_stacks(cfg)]
    return [depth if depth > MAX_UNSTACKED_LAYERS else -depth for depth in depths]


def _list_stacks(cfg: ModelConfig) -> list[tuple[str, int]]:
    """Prefix of the names and depth of each stack."""
    dense = [("dense.", cfg.dense_layers)] if cfg.dense_layers else []
    return [*dense, ("layers.", cfg.moe_layers)]


def forward(
    weights: Weights,
    pool: Pool,
    chunks: Chunks,
    cfg: ModelConfig,
    policy: Policy,
    head_rows: int = 0,
    experts: bool = False,
) -> tuple[jax.Array, Pool, jax.Array | None]:
    """Read the chunks: float32 logits of the wanted tokens, and the pool with their latents.

    Args:
        weights: from `split_weights`.
        pool: latents of earlier tokens.
        chunks: what to read.
        cfg: sizes.
        policy: dtypes, and how weights are read.
        head_rows: rows of each product with the head, on each device; 0: all that are wanted.
        experts: whether to return the experts of each token too, int16 [chunks, tokens, layers,
            experts a token], on every device.
    """
    declared, reading = Kimi(cfg), describe(chunks, cfg)

    def apply_bound(
        x_BTD: jax.Array, params: Params, latents: jax.Array, index: jax.Array, stacked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        w = bind(declared.layers if MOE in params else declared.dense, params)
        x_BTD, latents, expert_BTK = apply_layer(
            w, (index, stacked), x_BTD, latents, reading, cfg, policy
        )
        return x_BTD, latents, expert_BTK if experts else None

    # Traced once for all layers of a kind that were taken apart.
    apply_one = jax.jit(functools.partial(apply_bound, stacked=False))
    w = bind(Ends(declared), weights.whole)
    x_BTD, written, chosen = look_up(w.embed, chunks.token_BT, policy), [], []
    stacks = _list_stacks(cfg)
    for (prefix, _), stack, old in zip(stacks, weights.stacks, pool, strict=False):
        routed = {
            name.removeprefix(prefix): a
            for name, a in weights.whole.items()
            if name.startswith(prefix + EXPERTS)
        }
        if isinstance(stack, tuple):
            new = []
            for i, (params, latents) in enumerate(zip(stack, old, strict=True)):
                x_BTD, after, expert_BTK = apply_one(x_BTD, params | routed, latents, jnp.int32(i))
                new.append(after)
                chosen += [] if expert_BTK is None else [expert_BTK[None]]
            written.append(tuple(new))
        else:

            def apply_next(carry, at, routed=routed):
                index, params = at
                *carry, expert_BTK = apply_bound(carry[0], params | routed, carry[1], index, True)
                return tuple(carry), expert_BTK

            assert not isinstance(old, tuple)
            depth = jnp.arange(old.shape[0])
            (x_BTD, latents), expert_LBTK = jax.lax.scan(apply_next, (x_BTD, old), (depth, stack))
            written.append(latents)
            chosen += [] if expert_LBTK is None else [expert_LBTK]
    if len(pool) > len(stacks):
        mtp = draft.bind_first(weights.whole, cfg)
        normed_BTD = rms_norm(x_BTD, w.norm, cfg.norm_eps, policy)
        written.append(draft.note_outputs(w, mtp, normed_BTD, pool[-1], reading, cfg, policy))
    y_NX = _read_head(w.head, w.norm, x_BTD, chunks.wanted_N, cfg, policy, head_rows)
    return y_NX, tuple(written), _join_choices(chosen)


def guess(
    weights: Weights,
    pool: Pool,
    chunks: Chunks,
    cfg: ModelConfig,
    policy: Policy,
    head_rows: int = 0,
    experts: bool = False,
) -> tuple[jax.Array, Pool, None]:
    """Guess what follows each chunk's token by the first MTP layer: logits, as `forward` does.

    The main network has read everything before that token, not yet the token itself. Nobody asks
    which experts guessed.
    """
    del experts
    w, mtp = bind(Ends(Kimi(cfg)), weights.whole), draft.bind_first(weights.whole, cfg)
    x_BTD, new = draft.apply_first(w, mtp, pool[-1], describe(chunks, cfg), cfg, policy)
    y_NX = _read_head(w.head, mtp.norm, x_BTD, chunks.wanted_N, cfg, policy, head_rows)
    return y_NX, (*pool[:-1], new), None


def _read_head(
    weight: nnx.Variable,
    norm: nnx.Variable,
    x_BTD: jax.Array,
    wanted_N: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
    rows: int,
) -> jax.Array:
    """Compute the logits of tokens, in products of `rows` rows on each device; 0: in one."""

    def read(x_N1D: jax.Array) -> jax.Array:
        return head(weight, rms_norm(x_N1D, norm, cfg.norm_eps, policy), policy)[:, 0]

    if not rows:
        return read(pick_tokens(x_BTD, wanted_N))
    count = len(wanted_N)
    padding = -count % (rows * batch_ways())
    x_N1D = pick_tokens(x_BTD, jnp.pad(wanted_N, (0, padding), constant_values=-1))
    if not meshless():
        return reshard(read(x_N1D), None, None)[:count]
    if count <= rows:
        return read(x_N1D)[:count]

    def read_next(i: jax.Array, y_NX: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x_N1D, i * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(y_NX, read(part), i * rows, 0)

    # Scores of a few tokens of each chunk want few of the logits that there is room for.
    parts = -(-(wanted_N >= 0).sum() // rows)
    y_NX = jnp.zeros((len(x_N1D), cfg.vocab), jnp.float32)
    return jax.lax.fori_loop(0, parts, read_next, y_NX)[:count]


def _join_choices(chosen: list[jax.Array]) -> jax.Array | None:
    """Join the experts of stacks, each [layers, chunks, tokens, experts a token]."""
    if not chosen:
        return None
    expert_BTLK = jnp.moveaxis(jnp.concatenate(chosen), 0, 2).astype(jnp.int16)
    return reshard(expert_BTLK, None, None, None, None)


class Ends:
    """What comes before and after the layers."""

    def __init__(self, declared: Kimi):
        self.embed, self.norm, self.head = declared.embed, declared.norm, declared.head
