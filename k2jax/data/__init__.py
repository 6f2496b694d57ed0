"""Text in, batches out: documents, tokenised once, cut into rows, shuffled by (seed, step)."""

from k2jax.data.batches import Batches, eval_batches, prefetch
from k2jax.data.dataset import Data, check, compressors, open_data
from k2jax.data.mixture import Mixture
from k2jax.data.store import Store

__all__ = [
    "Batches",
    "Data",
    "Mixture",
    "Store",
    "check",
    "compressors",
    "eval_batches",
    "open_data",
    "prefetch",
]
