"""The formulas of spec 1.2-1.8 in NumPy, float64, a row at a time, on published tensors.

Written from the formulas, without our code; `test_mtp.py` holds a layer of it to transformers.
"""

import numpy as np


def rms(x, gain, eps):
    return gain * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, t, stem):
    gate, up, down = (t[f"{stem}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def rotated(x, position, cfg, frequency):
    """Consecutive channels as complex numbers [DSV3 model.py]."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position[:, None] * frequency)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def attention(x, t, stem, cfg, frequency):
    length, heads, position = len(x), cfg.heads, np.arange(len(x))

    def get(name):
        return t[f"{stem}.{name}.weight"]

    if cfg.q_rank:
        q = rms(x @ get("q_a_proj").T, get("q_a_layernorm"), 1e-6) @ get("q_b_proj").T
    else:
        q = x @ get("q_proj").T
    q = q.reshape(length, heads, cfg.nope + cfg.rope).transpose(1, 0, 2)
    latent = x @ get("kv_a_proj_with_mqa").T
    kv = rms(latent[:, : cfg.kv_rank], get("kv_a_layernorm"), 1e-6) @ get("kv_b_proj").T
    kv = kv.reshape(length, heads, cfg.nope + cfg.value).transpose(1, 0, 2)
    q_rope = rotated(q[..., cfg.nope :], position, cfg, frequency)
    k_rope = rotated(latent[:, cfg.kv_rank :], position, cfg, frequency)
    score = q[..., : cfg.nope] @ kv[..., : cfg.nope].transpose(0, 2, 1) + q_rope @ k_rope.T
    score = np.where(np.tri(length, dtype=bool), score * cfg.softmax_scale, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    out = (weight @ kv[..., cfg.nope :]).transpose(1, 0, 2).reshape(length, -1)
    return out @ get("o_proj").T, score.max(axis=(1, 2))


def mixture(x, t, stem, cfg):
    score = 1 / (1 + np.exp(-(x @ t[f"{stem}.gate.weight"].T)))
    biased = score + t[f"{stem}.gate.e_score_correction_bias"]
    out, load = np.zeros_like(x), np.zeros(cfg.experts)
    for i, token in enumerate(x):
        groups = biased[i].reshape(cfg.groups, -1)
        worth = np.sort(groups)[:, -2:].sum(axis=1) if cfg.groups > 1 else np.zeros(1)
        kept = np.argsort(-worth)[: cfg.groups_per_token]
        open_ = np.repeat(np.isin(np.arange(cfg.groups), kept), groups.shape[1])
        chosen = np.argsort(-np.where(open_, biased[i], -np.inf))[: cfg.experts_per_token]
        weights = cfg.routed_scale * score[i, chosen] / score[i, chosen].sum()
        load[chosen] += 1
        for e, weight in zip(chosen, weights, strict=True):
            out[i] += weight * swiglu(token, t, f"{stem}.experts.{e}")
    return (out + swiglu(x, t, f"{stem}.shared_experts") if cfg.shared_experts else out), load


def layer(x, t, number, cfg, frequency):
    """A layer with routed experts: its output, each head's largest logit, the experts' load."""
    stem = f"model.layers.{number}"
    gain = t[f"{stem}.input_layernorm.weight"]
    y, top = attention(rms(x, gain, cfg.norm_eps), t, f"{stem}.self_attn", cfg, frequency)
    x = x + y
    normed = rms(x, t[f"{stem}.post_attention_layernorm.weight"], cfg.norm_eps)
    y, load = mixture(normed, t, f"{stem}.mlp", cfg)
    return x + y, top, load


def mtp(x, token, t, cfg, frequency):
    """Every MTP layer's logits [length - k, vocab], largest logits and load; of one document.

    Args:
        x: the main model's normed output [length, embed].
        token: ids, [length].
        t: published tensors.
        cfg: sizes.
        frequency: of the rotation.
    """
    found = []
    for k in range(1, cfg.mtp_layers + 1):
        number = cfg.layers + k - 1

        def get(name, n=number):
            return t[f"model.layers.{n}.{name}.weight"]

        x = x[: len(token) - k]  # token i + k is there for these
        e = rms(get("embed_tokens")[token[k:]], get("enorm"), cfg.norm_eps)
        h = rms(x, get("hnorm"), cfg.norm_eps)
        joined = np.concatenate([e, h], axis=-1) @ get("eh_proj").T
        x, top, load = layer(joined, t, number, cfg, frequency)
        x = rms(x, get("shared_head.norm"), cfg.norm_eps)
        found.append((x @ get("shared_head.head").T, top, load))
    return found
