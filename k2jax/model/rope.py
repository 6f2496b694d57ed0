"""Rotary positions in the checkpoint's convention, with YaRN."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ModelConfig, yarn_scale


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32 [batch, length, rope / 2]."""

    cos: jax.Array
    sin: jax.Array


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """Compute the angle per position of each channel pair, float64 [rope / 2].

    YaRN keeps pairs that turn more than `beta_fast` times in the original context, divides by
    `factor` those that turn less than `beta_slow` times, and interpolates linearly in between. It
    applies at every position, short rows included.
    Source: [JLE] modeling_deepseek.py 225-330.
    """
    dim, yarn = cfg.rope, cfg.yarn

    def channel(rotations: float) -> float:
        turns = yarn.context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    width = high - low or 0.001  # a step where both ends meet
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    plain = cfg.rope_theta ** (-np.arange(0, dim, 2) / dim)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def rotation(position_BT: jax.Array, cfg: ModelConfig) -> Rotation:
    """Compute the rotation at each position, counted from the start of its document."""
    angle_BTF = position_BT[..., None].astype(jnp.float32) * jnp.float32(frequencies(cfg))
    yarn = cfg.yarn
    # 1 for every published model; the softmax scale has the rest.
    gain = yarn_scale(yarn.factor, yarn.mscale) / yarn_scale(yarn.factor, yarn.mscale_all_dim)
    return Rotation(jnp.cos(angle_BTF) * gain, jnp.sin(angle_BTF) * gain)


def rotate(x_BHTP: jax.Array, turn: Rotation) -> jax.Array:
    """Turn each pair of channels (0, 1), (2, 3), ... by its angle.

    The result has all first members, then all second ones: queries and keys are permuted alike,
    so their products are those of the interleaved order, without putting it back.
    """
    x_BHTP, dtype = x_BHTP.astype(jnp.float32), x_BHTP.dtype
    a, b = x_BHTP[..., 0::2], x_BHTP[..., 1::2]
    cos, sin = turn.cos[:, None], turn.sin[:, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(dtype)
