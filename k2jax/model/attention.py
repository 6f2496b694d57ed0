"""Multi-head latent attention (MLA) for training: keys and values come from one small latent."""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.model.norm import rms_norm
from k2jax.model.projection import Policy, project
from k2jax.model.rope import Rotation, rotate
from k2jax.ops.attention import causal_attention
from k2jax.ops.collectives import all_to_all
from k2jax.params.kimi import Attention
from k2jax.sharding import axes_of, meshless, reshard, storage_spec

INNER_EPS = 1e-6  # of the two norms in here, whatever the config says [JLE modeling 665, 675]


def compress_queries(
    w: Attention, x_BTD: jax.Array, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, nnx.Variable]:
    """Compute what the last projection of the queries reads, `q_BTI`, and find its weight."""
    if not cfg.q_rank:
        return x_BTD, w.q
    q_BTQ = project("btd,dq->btq", x_BTD, w.q_down, ("batch", "length", None), policy)
    return rms_norm(q_BTQ, w.q_norm, INNER_EPS, policy), w.q_up


def project_queries(
    w: Attention, x_BTD: jax.Array, turn: Rotation, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, jax.Array]:
    """Project to every head's queries: content part `q_BHTU` and rotated part `q_BHTP`."""
    q_BTI, weight = compress_queries(w, x_BTD, cfg, policy)
    heads = ("batch", "heads", "length", None)
    q_BHTC = project("bti,ihc->bhtc", q_BTI, weight, heads, policy)
    return q_BHTC[..., : cfg.nope], rotate(q_BHTC[..., cfg.nope :], turn)


def project_latents(
    w: Attention, x_BTD: jax.Array, turn: Rotation, cfg: ModelConfig, policy: Policy
) -> tuple[jax.Array, jax.Array]:
    """Project to what later tokens read: normed latent `c_BTR` and rotated shared key `k_BTP`."""
    kv_BTM = project("btd,dm->btm", x_BTD, w.kv_down, ("batch", "length", None), policy)
    c_BTR = rms_norm(kv_BTM[..., : cfg.kv_rank], w.kv_norm, INNER_EPS, policy)
    return c_BTR, rotate(kv_BTM[:, None, :, cfg.kv_rank :], turn)[:, 0]


def attend(
    w: Attention,
    x_BTD: jax.Array,
    turn: Rotation,
    segment_BT: jax.Array,
    cfg: ModelConfig,
    policy: Policy,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention: output `y_BTD` and the largest logit of each head, `top_H` (float32).

    Args:
        w: weights of one layer.
        x_BTD: normed activations.
        turn: rotation of each position.
        segment_BT: document of each token in its row, from 1; 0 is padding. A token sees only
            earlier tokens of its own document.
        cfg: sizes.
        policy: how weights are read.

    The maximum is signed, includes the softmax scale and leaves out padding: QK-Clip's S_max
    [K2-TR 2.1]. Source: [JLE] modeling_deepseek.py 650-860.
    """
    heads = ("batch", "heads", "length", None)
    q_BHTC = jnp.concatenate(project_queries(w, x_BTD, turn, cfg, policy), axis=-1)
    c_BTR, k_BTP = project_latents(w, x_BTD, turn, cfg, policy)
    kv_BHTW = project("btr,rhw->bhtw", c_BTR, w.kv_up, heads, policy)
    shared_BHTP = reshard(jnp.broadcast_to(k_BTP[:, None], (*kv_BHTW.shape[:3], cfg.rope)), *heads)
    k_BHTC = jnp.concatenate([kv_BHTW[..., : cfg.nope], shared_BHTP], axis=-1)
    v_BHTV = kv_BHTW[..., cfg.nope :]
    y_BHTV, top_H = sharded_attention(q_BHTC, k_BHTC, v_BHTV, segment_BT, cfg.softmax_scale)
    return project("bhtv,hvd->btd", y_BHTV, w.out, ("batch", "length", None), policy), top_H


def sharded_attention(
    q_BHTC: jax.Array, k_BHTC: jax.Array, v_BHTV: jax.Array, segment_BT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Mix values by causal softmax weights: `y_BHTV`, and each head's largest logit `top_H`.

    Devices along `context` have a part of each row. They exchange it, with all heads, for whole
    rows of some heads, and the mixed values back [DeepSpeed-Ulysses 2023]: wherever documents end,
    each has the same work. A mesh for inference does not split rows.
    """
    if meshless():
        y_BHTV, top_BH = _attention_with_max_logit(q_BHTC, k_BHTC, v_BHTV, segment_BT, scale)
        return y_BHTV, top_BH.max(axis=0)

    def on_device(q_BHTC, k_BHTC, v_BHTV, segment_BT):
        if not axes_of("length"):
            return _attention_with_max_logit(q_BHTC, k_BHTC, v_BHTV, segment_BT, scale)
        rows = (all_to_all(a, "context", 1, 2) for a in (q_BHTC, k_BHTC, v_BHTV))
        y_BHTV, top_BH = _attention_with_max_logit(*rows, segment_BT, scale)
        return all_to_all(y_BHTV, "context", 2, 1), top_BH

    part_spec = storage_spec(("batch", "heads", "length", None))
    y_BHTV, top_BH = jax.shard_map(
        on_device,
        in_specs=(part_spec, part_spec, part_spec, storage_spec(("batch", None))),
        out_specs=(part_spec, storage_spec(("batch", "heads_of_row"))),
        check_vma=False,  # loops and custom gradients inside; tests compare with one device
    )(q_BHTC, k_BHTC, v_BHTV, reshard(segment_BT, "batch", None))
    return y_BHTV, reshard(top_BH.max(axis=0), None)


def _attention_with_max_logit(q_BHTC, k_BHTC, v_BHTV, segment_BT, scale):
    """Mixed values, and the largest logit of each head and row, padding left out."""
    y_BHTV, top_BHT = causal_attention(q_BHTC, k_BHTC, v_BHTV, segment_BT, scale)
    top_BHT = jnp.where((segment_BT > 0)[:, None], jax.lax.stop_gradient(top_BHT), -jnp.inf)
    return y_BHTV, top_BHT.max(axis=2)
