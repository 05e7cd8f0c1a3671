"""Attention: rotary positions and one softmax(scale q k + bias) v over grouped key-value heads, never repeated.

Training and scoring read whole rows (`self_attention`), decoding new columns and a cache (`attention`). `kernels` says
which implementation runs where.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K queries per key-value head, H head
size, R = rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.families.rope import Rope, frequencies
from diptych_jax.kernels import Kernel, cudnn, splash

UNLIMITED = 2**30  # a window that no row fills
# (queries, keys, values of all columns, which of the windows: None where there is one) -> what the queries read
Attention = Callable[[Array, Array, Array, Array | None], Float[Array, "B T N H"]]
Rotation = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]  # cosines and sines of the angles


def rotation(positions_BT: Int[Array, "B T"], rope: Rope, dtype: Any) -> Rotation:
    """Cosines and sines of position x inverse frequency, for rows whose first column need not be position 0.

    The frequencies are the hinge's float32 numbers. The product, the cosine and the sine are taken in float32 for
    models of up to float32 and in float64 for float64 models: angles in a narrower type are off by whole radians at
    long positions. Where frequencies depend on the length of a sequence, each takes those of its own last position; a
    row may hold several, each from a position 0 on.
    """
    # Upcast: angles in at least float32.
    angle_dtype = jnp.promote_types(dtype, jnp.float32)
    table = jnp.asarray(frequencies(rope), angle_dtype)
    inverse_BTR = table[rope.rows(_lengths(positions_BT)).astype(jnp.int32)] if rope.by_length else table[0]
    angles_BTR = positions_BT.astype(angle_dtype)[..., None] * inverse_BTR
    return jnp.cos(angles_BTR) * rope.attention_factor, jnp.sin(angles_BTR) * rope.attention_factor


def _lengths(positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """One more than the last position of the sequence that each column belongs to."""

    def of_row(positions_T, sequence_T):
        last = jax.ops.segment_max(positions_T, sequence_T, num_segments=len(positions_T) + 1)
        return last[sequence_T] + 1

    return jax.vmap(of_row)(positions_BT, jnp.cumsum(positions_BT == 0, axis=1, dtype=jnp.int32))


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


def segment_ids(attention_BT: Bool[Array, "B T"], positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Equal numbers on the columns of one example, 0 on padding. An example begins where a position is 0."""
    begins_BT = attention_BT & (positions_BT == 0)
    return jnp.where(attention_BT, 1 + jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32), 0)


def self_attention(
    segments_BT: Int[Array, "B T"],
    *,
    windows: Sequence[int | None],
    scale: float,
    softcap: float | None,
    bias_BNTS: Float[Array, "B N T S"] | None,
    kernel: Kernel,
) -> Attention:
    """Attention of whole rows: a column reads the columns of its own segment up to itself, within a window (measured in
    columns; None: no limit). Padding reads padding, so every column reads something.

    windows: those that the layers have, each once. Made before the loop over layers: they share what does not differ.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if kernel == "splash":
        branches = [partial(splash, window=window, **options) for window in windows]

        def read_blocks(q_BTNH, k_BTKH, v_BTKH, which):
            inputs = q_BTNH, k_BTKH, v_BTKH, segments_BT
            return branches[0](*inputs) if which is None else jax.lax.switch(which, branches, *inputs)

        return read_blocks
    columns = jnp.arange(segments_BT.shape[1])
    distance_TT = columns[:, None] - columns
    mask_BTT = (distance_TT >= 0) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    limits = [UNLIMITED if window is None else window for window in windows]

    def read(q_BTNH, k_BTKH, v_BTKH, which) -> Any:
        limit = limits[0] if which is None else jnp.asarray(limits)[which]
        mask = mask_BTT if windows == (None,) else mask_BTT & (distance_TT < limit)
        if kernel == "xla" and q_BTNH.dtype == jnp.float32 and softcap is None and bias_BNTS is None:
            return softmax_attention(q_BTNH, k_BTKH, v_BTKH, mask, scale)
        return attention(q_BTNH, k_BTKH, v_BTKH, mask, **options, bias_BNTS=bias_BNTS, kernel=kernel)

    return read


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias_BNTS: Float[Array, "B N T S"] | None = None,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """Each query attends to the keys where its mask is True; scores are scale q k, capped (c tanh(x / c)), plus bias.

    A query whose mask is False everywhere (padding) gets the plain mean of the values: finite, with finite gradients,
    and of no consequence because no real query can see a padding key. kernel: as `kernels.choose` found, xla or cudnn.
    """
    if kernel == "cudnn":
        assert softcap is None
        assert bias_BNTS is None
        return cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale=scale)
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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """`attention` in float32 of queries that each see a key, with a derivative of its own: of [T, S] it keeps one
    array, the exponentials, and reads it once. They are divided by their sum after the product with the values."""
    return _softmax_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)[0]


def _softmax_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale: float):
    q_BKMH, k_BKSH, v_BKSH = _by_head(q_BTNH, k_BSKH), _by_head(k_BSKH, k_BSKH), _by_head(v_BSKH, k_BSKH)
    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH)
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    mask_BKMS = jnp.tile(mask_BTS, (1, groups, 1))[:, None]
    scores_BKMS = jnp.where(mask_BKMS, scores_BKMS * scale, jnp.finfo(scores_BKMS.dtype).min)
    exps_BKMS = jnp.exp(scores_BKMS - jnp.max(scores_BKMS, axis=-1, keepdims=True))
    sums_BKM1 = jnp.sum(exps_BKMS, axis=-1, keepdims=True)
    out_BTNH = _by_column(jnp.einsum("BKMS,BKSH->BKMH", exps_BKMS, v_BKSH) / sums_BKM1, q_BTNH)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, exps_BKMS, sums_BKM1, out_BTNH)


def _softmax_backward(scale: float, saved, change_BTNH):
    q_BTNH, k_BSKH, v_BSKH, exps_BKMS, sums_BKM1, out_BTNH = saved
    q_BKMH, k_BKSH, v_BKSH = _by_head(q_BTNH, k_BSKH), _by_head(k_BSKH, k_BSKH), _by_head(v_BSKH, k_BSKH)
    mean_BKM1 = jnp.sum(_by_head(change_BTNH * out_BTNH, k_BSKH), axis=-1, keepdims=True)
    change_BKMH = _by_head(change_BTNH, k_BSKH) / sums_BKM1  # of each exponential's own share
    dv_BKSH = jnp.einsum("BKMS,BKMH->BKSH", exps_BKMS, change_BKMH)
    dscores_BKMS = exps_BKMS * (jnp.einsum("BKMH,BKSH->BKMS", change_BKMH, v_BKSH) - mean_BKM1 / sums_BKM1)
    dq_BKMH = jnp.einsum("BKMS,BKSH->BKMH", dscores_BKMS, k_BKSH) * scale
    dk_BKSH = jnp.einsum("BKMS,BKMH->BKSH", dscores_BKMS, q_BKMH) * scale
    return _by_column(dq_BKMH, q_BTNH), _by_column(dk_BKSH, k_BSKH), _by_column(dv_BKSH, v_BSKH), None


softmax_attention.defvjp(_softmax_forward, _softmax_backward)


def _by_head(x_BTNH: Array, k_BSKH: Array) -> Float[Array, "B K M H"]:
    """Rows [G T] of each key-value head."""
    batch, length, heads, size = x_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size)
    return x_BTKGH.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)


def _by_column(x_BKMH: Array, like_BTNH: Array) -> Float[Array, "B T N H"]:
    """The inverse of `_by_head`."""
    batch, length, _, size = like_BTNH.shape
    x_BKGTH = x_BKMH.reshape(batch, x_BKMH.shape[1], -1, length, size)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(like_BTNH.shape)
