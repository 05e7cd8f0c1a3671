"""Rollouts: prefill the left-padded prompts, then one token a step, until every row has ended.

The trunk is the training forward's (`Network.hidden_states`); only the cache is new to it. It is allocated once,
written in place, and hands out the filled part. A recurrent model has its state instead.

Dimensions: B rows, P prompt columns, N new columns, K key-value heads, H head size.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.engine import Completions, Finish, PromptBatch, Sampling
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, check_reach
from diptych_torch.model import Network, check_token_ids
from diptych_torch.recurrent import RNNState
from diptych_torch.sampling import draw


class Cache:
    """Keys and values [B, K, columns, H] of every layer, and all positions. `start`: how many columns are filled.

    transformers' attention calls `update` with the keys and values of its new tokens and reads what it returns.
    """

    def __init__(self, config: DecoderConfig, *, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        shape = (rows, config.num_kv_heads, columns, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.positions = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.start = 0

    def extend(self, positions: Tensor) -> Tensor:
        """Note the new columns' positions; returns those of all columns."""
        end = self.start + positions.shape[1]
        self.positions[:, self.start : end] = positions
        return self.positions[:, :end]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take in a layer's new columns; returns its keys and values so far. The last layer's turn ends the step."""
        end = self.start + keys.shape[2]
        self.keys[layer_idx][:, :, self.start : end] = keys
        self.values[layer_idx][:, :, self.start : end] = values
        if layer_idx == len(self.keys) - 1:
            self.start = end
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks how many columns there are already."""
        return self.start


def new_cache(network: Network, *, rows: int, columns: int, device: torch.device) -> Cache | RNNState:
    """An empty memory of a network for so many columns: keys and values, or a recurrent model's state."""
    config = network.config
    if isinstance(config, DecoderConfig):
        return Cache(config, rows=rows, columns=columns, dtype=network.dtype, device=device)
    zeros = torch.zeros(rows, config.hidden_size, dtype=network.dtype, device=device)
    return RNNState([zeros] * config.num_layers)


@torch.inference_mode()
def generate(
    network: Network,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    device: torch.device,
    prefill: int | None = None,
) -> Completions:
    """Sample completions (`diptych.engine.Model.generate`), `sampling.decode_rows` rows at a time: the next ones start
    when all rows of a group have ended. The network is read, never written.

    prefill: prompt columns that go through the network at once; None: all. It changes nothing but memory.
    """
    _check(prompts, sampling, uniforms, network.config)
    size = sampling.decode_rows or len(prompts)
    groups = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        group = PromptBatch(
            tokens=prompts.tokens[rows], attention=prompts.attention[rows], positions=prompts.positions[rows]
        )
        groups.append(
            _generate(
                network, group, sampling, uniforms[rows], pad_token_id=pad_token_id, device=device, prefill=prefill
            )
        )
    names = [field.name for field in dataclasses.fields(Completions)]
    return Completions(**{name: np.concatenate([getattr(group, name) for group in groups]) for name in names})


def _generate(
    network: Network,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    device: torch.device,
    prefill: int | None,
) -> Completions:
    """One group of rows, to their ends."""
    rows, width = prompts.tokens.shape
    new = sampling.max_new_tokens
    columns = width + new
    cache = new_cache(network, rows=rows, columns=columns, device=device)
    readable = torch.ones(rows, columns, dtype=torch.bool, device=device)
    readable[:, :width] = torch.tensor(prompts.attention, device=device)
    noise = torch.tensor(uniforms, device=device)
    stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)

    tokens = torch.full((rows, new), pad_token_id, dtype=torch.int64, device=device)
    mask = torch.zeros(rows, new, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, new, dtype=torch.promote_types(network.dtype, torch.float32), device=device)
    margins = torch.zeros_like(logprobs)
    active = torch.ones(rows, dtype=torch.bool, device=device)

    prompt = torch.tensor(prompts.tokens, dtype=torch.int64, device=device)
    positions = torch.tensor(prompts.positions, dtype=torch.int64, device=device)
    size = width if prefill is None else prefill
    pieces = list(zip(prompt.split(size, dim=1), positions.split(size, dim=1), strict=True))
    for piece, where in pieces[:-1]:
        network.hidden_states(piece, where, readable[:, : cache.start + piece.shape[1]], cache)
    current, positions = pieces[-1]
    for step in range(new):
        hidden = network.hidden_states(current, positions, readable[:, : width + step], cache)
        drawn = draw(network.logits(hidden[:, -1]), noise[:, step], sampling)
        mask[:, step] = active
        tokens[:, step] = drawn.token.where(active, pad_token_id)
        logprobs[:, step] = drawn.logprob.where(active, 0.0)
        margins[:, step] = drawn.margin.where(active, 0.0)
        active &= ~torch.isin(drawn.token, stops)
        if not bool(active.any()):
            break
        # Rows that have ended go on reading padding; nothing reads them.
        current, positions = tokens[:, step : step + 1], positions[:, -1:] + 1
    return Completions(
        tokens=tokens.to(torch.int32).cpu().numpy(),
        mask=mask.cpu().numpy(),
        logprobs=logprobs.cpu().numpy(),
        margins=margins.cpu().numpy(),
        finish=np.where(active.cpu().numpy(), Finish.LENGTH, Finish.STOP).astype(np.int32),
    )


def _check(prompts: PromptBatch, sampling: Sampling, uniforms: np.ndarray, config: ModelConfig) -> None:
    check_token_ids(prompts.tokens, config.vocab_size)
    rows, width = prompts.tokens.shape
    if not (width and prompts.attention[:, -1].all() and (np.diff(prompts.attention.astype(np.int8)) >= 0).all()):
        raise ValueError("prompts must be left-padded and hold at least one token each")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if sampling.decode_rows is not None and sampling.decode_rows < 1:
        raise ValueError(f"decode_rows must be at least 1, got {sampling.decode_rows}")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"not a way to sample: {sampling}")
    if uniforms.shape != (rows, sampling.max_new_tokens):
        raise ValueError(f"uniforms must be [{rows}, {sampling.max_new_tokens}], got {list(uniforms.shape)}")
    check_reach(config, prompt=int(prompts.positions.max()) + 1, new=sampling.max_new_tokens)
