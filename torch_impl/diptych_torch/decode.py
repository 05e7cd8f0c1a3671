"""Rollouts: prefill the left-padded prompts, then one token a step, until every row has ended.

The decoder layers are the training forward's (`Network.hidden_states`); only the cache is new to them. It is allocated
once, written in place, and hands out the filled part.

Dimensions: B rows, P prompt columns, N new columns, K key-value heads, H head size.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.engine import Completions, Finish, PromptBatch, Sampling
from diptych_torch.model import Network, causal_mask, check_token_ids
from diptych_torch.sampling import draw


class Cache:
    """Keys and values [B, K, P + N, H] of every layer. `start`: the column that the next token goes to.

    transformers' attention calls `update` with the keys and values of its new tokens and reads what it returns.
    """

    def __init__(self, network: Network, *, rows: int, columns: int, device: torch.device):
        shape = (rows, network.shape.num_kv_heads, columns, network.shape.head_dim)
        layers = range(network.shape.num_layers)
        self.keys = [torch.empty(shape, dtype=network.dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=network.dtype, device=device) for _ in layers]
        self.start = 0

    def update(self, keys: Tensor, values: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        end = self.start + keys.shape[2]
        self.keys[layer_index][:, :, self.start : end] = keys
        self.values[layer_index][:, :, self.start : end] = values
        return self.keys[layer_index][:, :, :end], self.values[layer_index][:, :, :end]


@torch.inference_mode()
def generate(
    network: Network,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    device: torch.device,
) -> Completions:
    """Sample completions (`diptych.engine.Model.generate`). The network is read, never written."""
    _check(prompts, sampling, uniforms, network.shape.vocab_size)
    rows, width = prompts.tokens.shape
    new = sampling.max_new_tokens
    columns = width + new
    cache = Cache(network, rows=rows, columns=columns, device=device)
    readable = torch.ones(rows, columns, dtype=torch.bool, device=device)
    readable[:, :width] = torch.tensor(prompts.attention, device=device)
    noise = torch.tensor(uniforms, device=device)
    stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)

    tokens = torch.full((rows, new), pad_token_id, dtype=torch.int64, device=device)
    mask = torch.zeros(rows, new, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, new, dtype=torch.promote_types(network.dtype, torch.float32), device=device)
    margins = torch.zeros_like(logprobs)
    active = torch.ones(rows, dtype=torch.bool, device=device)

    current = torch.tensor(prompts.tokens, dtype=torch.int64, device=device)
    positions = torch.tensor(prompts.positions, dtype=torch.int64, device=device)
    reads = causal_mask(readable[:, :width])
    for step in range(new):
        hidden = network.hidden_states(current, positions, reads, cache)
        drawn = draw(network.logits(hidden[:, -1]), noise[:, step], sampling)
        mask[:, step] = active
        tokens[:, step] = drawn.token.where(active, pad_token_id)
        logprobs[:, step] = drawn.logprob.where(active, 0.0)
        margins[:, step] = drawn.margin.where(active, 0.0)
        active &= ~torch.isin(drawn.token, stops)
        if not bool(active.any()):
            break
        # Rows that have ended go on reading padding; nothing reads them.
        cache.start = width + step
        current, positions = tokens[:, step : step + 1], positions[:, -1:] + 1
        reads = readable[:, None, None, : cache.start + 1]
    return Completions(
        tokens=tokens.to(torch.int32).cpu().numpy(),
        mask=mask.cpu().numpy(),
        logprobs=logprobs.cpu().numpy(),
        margins=margins.cpu().numpy(),
        finish=np.where(active.cpu().numpy(), Finish.LENGTH, Finish.STOP).astype(np.int32),
    )


def _check(prompts: PromptBatch, sampling: Sampling, uniforms: np.ndarray, vocab_size: int) -> None:
    check_token_ids(prompts.tokens, vocab_size)
    rows, width = prompts.tokens.shape
    if not (width and prompts.attention[:, -1].all() and (np.diff(prompts.attention.astype(np.int8)) >= 0).all()):
        raise ValueError("prompts must be left-padded and hold at least one token each")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"not a way to sample: {sampling}")
    if uniforms.shape != (rows, sampling.max_new_tokens):
        raise ValueError(f"uniforms must be [{rows}, {sampling.max_new_tokens}], got {list(uniforms.shape)}")
