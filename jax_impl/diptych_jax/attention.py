"""Attention: rotary positions and one softmax(q k / sqrt(H)) v over grouped key-value heads, which are never repeated.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head
size, R = H / 2 rotated pairs. Every training, prefill and decode step goes through `attention`, and only it decides
which implementation runs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Rotation = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]  # cosines and sines of the angles


def rotation(
    positions_BT: Int[Array, "B T"], inverse_frequencies_R: Float[np.ndarray, " R"], dtype: np.dtype
) -> Rotation:
    """Cosines and sines of position x inverse frequency, for rows whose first column need not be position 0.

    The frequencies are the hinge's float32 numbers. The product, the cosine and the sine are taken in float32 for
    models of up to float32 and in float64 for float64 models: angles in a narrower type are off by whole radians at
    long positions.
    """
    # Upcast: angles in at least float32.
    angle_dtype = jnp.promote_types(dtype, jnp.float32)
    angles_BTR = positions_BT.astype(angle_dtype)[..., None] * jnp.asarray(inverse_frequencies_R, angle_dtype)
    return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


def rotate(x_BTNH: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of every head, the half-split layout of Hugging Face checkpoints."""
    cos, sin = (part[:, :, None, :] for part in angles)
    # Upcast: the rotation itself runs in the angles' type, at least float32.
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Each query attends to the keys where its mask is True, at scale 1/sqrt(H).

    A query whose mask is False everywhere (padding) gets the plain mean of the values: finite, with finite gradients,
    and of no consequence because no real query can see a padding key.
    """
    scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
    if q_BTNH.dtype == jnp.float64:
        # jax.nn.dot_product_attention takes its softmax in float32 even when all inputs are float64.
        return _einsum_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation="xla"
    )


def _einsum_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    # Upcast: scores and softmax in at least float32.
    score_dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=score_dtype) * scale
    # The largest finite negative number, not -inf: a fully masked row would be 0/0, and its gradient NaN.
    lowest = jnp.finfo(score_dtype).min
    probs_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest), axis=-1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, size)
