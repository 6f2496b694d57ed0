"""Multi-token prediction (MTP): each additional layer predicts one token further ahead.

The k-th layer reads, at position i, the output of the layer before (for the first, the main model's
normed output) and the embedding of token i + k, and predicts token i + k + 1 through the main
model's head [DSV3-TR 2.2, eq. 21-23]. They are outside of the scan: each needs its own tokens.

Engines and trainers agree on two points that the report leaves open. `eh_proj` reads
[embedding, output]: vLLM (deepseek_mtp.py), SGLang (deepseek_nextn.py), Megatron-LM
(multi_token_prediction.py); the report writes the output first. The output is the one after the
main model's last norm, and a second layer reads the first one's after `shared_head.norm`:
Megatron-LM, ROCm/ATOM 1764, vLLM 47448.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import ModelConfig
from k2jax.model.batch import Batch, plain
from k2jax.model.kimi import Aux, apply_moe_layer, embed_tokens, hidden, wrap_remat
from k2jax.model.logits import head
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, project
from k2jax.model.rope import rotation
from k2jax.params.arrays import Params, bind
from k2jax.params.kimi import Kimi, Mtp
from k2jax.sharding import reshard


class MtpOutput(NamedTuple):
    """Output of one MTP layer."""

    x_BTD: jax.Array  # normed activations before the head
    target: jax.Array  # int32 [batch, length], the token to predict
    weight: jax.Array  # float32 [batch, length], 1 where the document has one, else 0


def mtp_forward(
    w: Kimi, x_BTD: jax.Array, batch: Batch, aux: Aux, cfg: ModelConfig, policy: Policy
) -> tuple[list[MtpOutput], Aux]:
    """Apply the MTP layers; return their outputs, and `aux` with their statistics added.

    Args:
        w: weights.
        x_BTD: normed activations before the head, from `hidden`.
        batch: as for `hidden`. Positions with weight 0 have no next token, and count nowhere.
        aux: from `hidden`.
        cfg: sizes.
        policy: as for `hidden`.
    """
    turn = rotation(batch.position, cfg)

    def apply_layer(x_BTD: jax.Array, e_BTD: jax.Array, layer: Mtp, segment_BT: jax.Array):
        e_BTD = rms_norm(e_BTD, layer.embed_norm, cfg.norm_eps, policy)
        x_BTD = rms_norm(x_BTD, layer.hidden_norm, cfg.norm_eps, policy)
        both_BTJ = jnp.concatenate([e_BTD, x_BTD], axis=-1)
        x_BTD = project("btj,jd->btd", both_BTJ, layer.join, ("batch", "length", None), policy)
        return apply_moe_layer(layer, x_BTD, turn, segment_BT, cfg, policy)

    apply_layer = wrap_remat(apply_layer, policy)
    outputs, tops, stats = [], [], []
    token_BT, weight_BT = batch.target, batch.weight
    same_BT = (batch.segment == shift_left(batch.segment)) & (batch.segment > 0)
    for k in range(cfg.mtp_layers):
        layer = jax.tree.map(operator.itemgetter(k), w.mtp)
        seen_BT = jnp.where(weight_BT > 0, batch.segment, 0)
        x_BTD, (top_H, layer_stats) = apply_layer(
            x_BTD, embed_tokens(w, token_BT, policy), layer, seen_BT
        )
        x_BTD = rms_norm(x_BTD, layer.norm, cfg.norm_eps, policy)
        token_BT = shift_left(token_BT)
        weight_BT = jnp.where(same_BT, weight_BT * shift_left(weight_BT), 0)
        outputs.append(MtpOutput(x_BTD, token_BT, weight_BT))
        tops.append(top_H)
        stats.append(layer_stats)
    total = aux.aux_loss * cfg.moe_layers + sum(layer.aux for layer in stats)
    return outputs, aux._replace(
        logit_max=jnp.concatenate([aux.logit_max, jnp.stack(tops)]),
        load=jnp.concatenate([aux.load, jnp.stack([layer.load_E for layer in stats])]),
        aux_loss=total / (cfg.moe_layers + cfg.mtp_layers),
    )


def shift_left(a_BT: jax.Array) -> jax.Array:
    """Move every row one place to the front; the last place becomes 0."""
    whole_BT = reshard(a_BT, "batch", None)  # small; a device needs its neighbour's first token
    return reshard(jnp.pad(whole_BT[:, 1:], ((0, 0), (0, 1))), "batch", "length")


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def logits(params: Params, token_BT: jax.Array, *, cfg: ModelConfig, dtype: str) -> list[jax.Array]:
    """Compute every MTP layer's logits, float32 [batch, length - k, vocab] for the k-th from 1.

    Position i of the k-th predicts token i + k + 1 from the tokens up to i + k.

    Args:
        params: weights.
        token_BT: int32, at least `mtp_layers` + 1 a row; each row is one document.
        cfg: sizes.
        dtype: to compute in.
    """
    w = bind(Kimi(cfg), params)
    ones = plain(token_BT)
    batch = ones._replace(
        target=shift_left(token_BT), weight=shift_left(ones.segment).astype("float32")
    )
    policy = Policy(dtype)
    x_BTD, aux = hidden(w, batch, cfg, policy)
    outputs, _ = mtp_forward(w, x_BTD, batch, aux, cfg, policy)
    return [head(w.head, out.x_BTD, policy)[:, :-k] for k, out in enumerate(outputs, 1)]
