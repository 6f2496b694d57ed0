"""The network, and its public face: `Model` and `forward`.

Letters of shape suffixes (capital: whole; small: this device's share):
B batch rows (in experts: rows of a block), T length, S length of keys, D embed, H heads, C query
width of a head, U its content part, P its rotary part, V value width, W key and value width,
Q q_rank, R kv_rank, M latent (in experts: pairs of token and choice), F hidden width, N tokens,
E experts, K choices, G groups, I blocks, X vocabulary, L layers, J joined width of two inputs.
"""

import dataclasses
import functools
from typing import Any

import jax

from k2jax.config import ModelConfig
from k2jax.model.batch import Batch, plain
from k2jax.model.kimi import Aux, hidden
from k2jax.model.logits import head, losses
from k2jax.model.projection import Policy
from k2jax.model.router import Choices
from k2jax.ops.moe import Dispatch
from k2jax.params.arrays import bind
from k2jax.params.kimi import Kimi
from k2jax.sharding import use_mesh_of

__all__ = [
    "Aux",
    "Batch",
    "Choices",
    "Dispatch",
    "Kimi",
    "Model",
    "Policy",
    "forward",
    "head",
    "hidden",
    "losses",
    "plain",
]


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and what they mean.

    Attributes:
        config: sizes.
        params: flat dict of arrays with dotted names.
        tokenizer: a `k2jax.text.interface.TokenizerLike`, or None where the source had none.
    """

    config: ModelConfig
    params: dict[str, jax.Array]
    tokenizer: Any = None

    @property
    def dtype(self) -> str:
        """Dtype of the matrices; the forward pass computes in it."""
        return str(self.params["head"].dtype)


def forward(model: Model, tokens: jax.Array) -> jax.Array:
    """Next-token logits, float32 [batch, length, vocab].

    Args:
        model: from `k2jax.load`.
        tokens: int32 [batch, length]; each row is one document. Rows no longer than the model's
            context; longer ones are computed all the same, without promise.
    """
    token_BT = jax.numpy.asarray(tokens, "int32")
    with use_mesh_of(token_BT, *model.params.values()):
        return _forward(model.params, token_BT, model.config, model.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _forward(params, token_BT, cfg, dtype):
    w = bind(Kimi(cfg), params)
    policy = Policy(dtype)
    x_BTD, _ = hidden(w, plain(token_BT), cfg, policy)
    return head(w.head, x_BTD, policy)
