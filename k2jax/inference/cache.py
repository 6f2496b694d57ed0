"""The latents of all sequences: pages of tokens in one pool.

A token has `kv_rank + rope` numbers in each layer: the normed latent, then the rotated shared key.
A page holds a few consecutive tokens of one sequence, in all layers. Which pages a sequence has, in
their order, is its row of a table; several sequences may have the same first pages. Page 0 is
scratch: padding is written to it, and nobody reads it. On a mesh each device has a part of the pool
with a scratch page of its own, and all pages of the sequences whose rows it has; tables have the
numbers of pages in that part.
"""

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.sharding import meshless, storage_spec

# For each stack of layers [layers, pages, page, latent], or [pages, page, latent] of each layer.
Pool = tuple[jax.Array | tuple[jax.Array, ...], ...]


def make_pool(
    cfg: ModelConfig, depths: list[int], pages: int, page: int, dtype: str, drafts: bool = False
) -> Pool:
    """Make an empty pool on the mesh in use.

    Args:
        cfg: sizes.
        depths: of each stack; 0 and below: a stack that is taken apart, of so many layers.
        pages: of the pool, scratch included.
        page: tokens of a page.
        dtype: of the latents, the one that is computed in or a wider one.
        drafts: whether to add what `draft` needs: outputs of the network, and latents.
    """

    def make(*layers: int, width: int = cfg.size("latent")) -> jax.Array:
        shape = (*layers, pages, page, width)
        if meshless():
            return jnp.zeros(shape, dtype)
        layout = jax.NamedSharding(jax.sharding.get_mesh(), pool_spec(bool(layers)))
        return jnp.zeros(shape, dtype, device=layout)

    stacks = [make(n) if n > 0 else tuple(make() for _ in range(-n)) for n in depths]
    return (*stacks, *([(make(width=cfg.embed), make())] if drafts else []))


def pool_spec(stacked: bool) -> jax.P:
    """Layout of a stack of layers' pages, or of one layer's."""
    return storage_spec((*((None,) if stacked else ()), "cache", None, None))


def write_latents(
    layer: jax.Array,
    new_BTM: jax.Array,
    table: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    index: jax.Array | None = None,
) -> jax.Array:
    """Write chunks of new latents into their pages; tokens from `count_B` on go to page 0.

    Args:
        layer: [pages, page, latent], or a stack of such with an `index`.
        new_BTM: latents of each chunk's tokens.
        table: int32 [chunks, pages of a sequence], pages in the order of tokens.
        start_B: position of each chunk's first token.
        count_B: tokens of each chunk.
        index: layer of a stack.
    """
    page = layer.shape[-2]
    order_T = jnp.arange(new_BTM.shape[1])
    position_BT = start_B[:, None] + order_T
    page_BT = jnp.take_along_axis(table, position_BT // page, axis=1, mode="clip")
    page_BT = jnp.where(order_T < count_B[:, None], page_BT, 0)
    at = (page_BT, position_BT % page) if index is None else (index, page_BT, position_BT % page)
    return layer.at[at].set(new_BTM.astype(layer.dtype), mode="promise_in_bounds")


def read_pages(layer: jax.Array, pages: jax.Array, index: jax.Array | None = None) -> jax.Array:
    """Read pages [chunks, n] of a layer: latents `latent_BSM` of their tokens in order."""
    at = pages if index is None else (index, pages)
    latent = layer.at[at].get(mode="promise_in_bounds")
    return latent.reshape(pages.shape[0], -1, layer.shape[-1])
