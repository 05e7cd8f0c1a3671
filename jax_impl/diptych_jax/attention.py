"""Attention: rotary positions and one softmax(scale q k + bias) v over grouped key-value heads, never repeated.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head
size, R = rotated pairs. Every training, prefill and decode step goes through `attention`, and only it decides which
implementation runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.families.rope import Rope, frequencies

Rotation = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]  # cosines and sines of the angles


def rotation(positions_BT: Int[Array, "B T"], rope: Rope, dtype: Any) -> Rotation:
    """Cosines and sines of position x inverse frequency, for rows whose first column need not be position 0.

    The frequencies are the hinge's float32 numbers. The product, the cosine and the sine are taken in float32 for
    models of up to float32 and in float64 for float64 models: angles in a narrower type are off by whole radians at
    long positions. Where frequencies depend on the length of a sequence, each row takes those of its own last position.
    """
    # Upcast: angles in at least float32.
    angle_dtype = jnp.promote_types(dtype, jnp.float32)
    table = jnp.asarray(frequencies(rope), angle_dtype)
    if rope.by_length:
        lengths_B = jnp.max(positions_BT, axis=1) + 1
        inverse_BTR = table[rope.rows(lengths_B).astype(jnp.int32)][:, None]
    else:
        inverse_BTR = table[0]
    angles_BTR = positions_BT.astype(angle_dtype)[..., None] * inverse_BTR
    return jnp.cos(angles_BTR) * rope.attention_factor, jnp.sin(angles_BTR) * rope.attention_factor


def rotate(x_BTNH: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + R) of every head, the half-split layout of Hugging Face checkpoints; columns from 2R on
    stay as they are."""
    cos, sin = (part[:, :, None, :] for part in angles)
    pairs = cos.shape[-1]
    # Upcast: the rotation itself runs in the angles' type, at least float32.
    wide = x_BTNH.astype(cos.dtype)
    first, second = wide[..., :pairs], wide[..., pairs : 2 * pairs]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * pairs < x_BTNH.shape[-1]:
        parts.append(wide[..., 2 * pairs :])
    return jnp.concatenate(parts, axis=-1).astype(x_BTNH.dtype)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: Float[Array, "B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Each query attends to the keys where its mask is True; scores are scale q k, capped (c tanh(x / c)), plus bias.

    A query whose mask is False everywhere (padding) gets the plain mean of the values: finite, with finite gradients,
    and of no consequence because no real query can see a padding key.
    """
    if q_BTNH.dtype == jnp.float64 or softcap is not None or bias_BNTS is not None:
        # jax.nn.dot_product_attention takes its softmax in float32 even when all inputs are float64, and has no cap.
        return _einsum_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, softcap, bias_BNTS)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation="xla"
    )


def _einsum_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None,
    bias_BNTS: Float[Array, "B N T S"] | None,
) -> Float[Array, "B T N H"]:
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    # Upcast: scores and softmax in at least float32.
    score_dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=score_dtype) * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if bias_BNTS is not None:
        scores_BKGTS = scores_BKGTS + bias_BNTS.reshape(scores_BKGTS.shape).astype(score_dtype)
    # The largest finite negative number, not -inf: a fully masked row would be 0/0, and its gradient NaN.
    lowest = jnp.finfo(score_dtype).min
    probs_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest), axis=-1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, size)
