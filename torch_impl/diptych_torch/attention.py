"""Which column may read which, and the one attention function that every family calls.

transformers lets a model choose its attention by name; ours is `NAME`. It takes the boolean mask as it is, keeps to the
softcap (transformers' own SDPA refuses it or drops it, by version) and has no dropout.

Dimensions: B batch, Q queries (the last Q of S columns), S keys, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import AttentionInterface

from diptych.families.decoder import alibi_slopes

NAME = "diptych"


def causal_mask(segments: Shaped[Tensor, "B S"], queries: int, window: int | None) -> Bool[Tensor, "B 1 Q S"]:
    """mask[b, 0, q, k]: may query q (column S - Q + q) read key k? Keys of its own segment in the last `window` columns
    up to itself.

    segments: equal numbers on the columns of one example, 0 on padding; booleans where a row is one example. Padding
    reads padding, so that no row of the mask is empty: attention stays finite, forward and backward, in every kernel.
    """
    columns = torch.arange(segments.shape[1], device=segments.device)
    distance = columns[-queries:, None] - columns
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (seen & (segments[:, -queries:, None] == segments[:, None, :]))[:, None]


def attend(
    module: Any,
    query: Float[Tensor, "B N Q H"],
    key: Float[Tensor, "B K S H"],
    value: Float[Tensor, "B K S H"],
    attention_mask: Bool[Tensor, "B 1 Q S"],
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B Q N H"], None]:
    """softmax(q k scaling) v, each key-value head read by N / K query heads; transformers' calling convention.

    softcap: logits l become softcap tanh(l / softcap). The mask carries the window (`options` may name it again).
    """
    del module, options
    if dropout:
        raise ValueError("attention dropout is not supported: the network must be deterministic")
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    is_packed = queries == 1 and groups > 1
    if is_packed:  # one query: its group's heads stand side by side as queries of their key-value head
        query = query.reshape(batch, heads // groups, groups, size)
    elif groups > 1:
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
    if softcap is None:
        read = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
    else:
        # Upcast: softmax in at least float32.
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = softcap * torch.tanh((query @ key.transpose(-1, -2)).to(wide) * scaling / softcap)
        logits = logits.masked_fill(~attention_mask, torch.finfo(wide).min)
        read = torch.softmax(logits, dim=-1).to(value.dtype) @ value
    if is_packed:
        read = read.reshape(batch, heads, 1, size)
    return read.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def additive(mask: Bool[Tensor, "B 1 Q S"], dtype: torch.dtype) -> Float[Tensor, "B 1 Q S"]:
    """0 where the mask allows and the least finite number elsewhere, for BLOOM, which adds its mask to the logits."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def alibi(
    num_heads: int, queries: Int[Tensor, "B Q"], keys: Int[Tensor, "B S"], dtype: torch.dtype
) -> Float[Tensor, "BN Q S"]:
    """slope (position of key - position of query) for each head (Press et al. 2022), rows of batch times heads.

    transformers adds slope * position of key, which the softmax makes the same thing; its rounding grows with the
    position, ours with the distance.
    """
    slopes = _slopes(num_heads, dtype, keys.device)
    distance = (keys[:, None, :] - queries[:, :, None]).to(dtype)
    return (slopes[:, None, None] * distance[:, None]).flatten(0, 1)


@cache
def _slopes(num_heads: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " N"]:
    """Kept on the device: a captured decode step brings nothing there."""
    with torch.inference_mode(False):  # training reads them too
        return torch.tensor(np.array(alibi_slopes(num_heads)), device=device).to(dtype)
