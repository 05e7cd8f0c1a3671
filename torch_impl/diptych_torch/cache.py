"""What a network remembers of the columns that it has read: keys and values, or a recurrent model's state.

It is allocated once, for so many rows (*slots*) and columns, and written in place, so that a captured program finds it
where it was. Prompts are read into it column by column (`start`, the same for all rows); a decode step writes one
column, each row its own (`step_to`), and reads a prefix of the columns, as far as any row has come.

Dimensions: B slots, S columns, K key-value heads, H head size, G rows of a group, D width of a recurrent state.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.families.decoder import DecoderConfig
from diptych_torch.attention import causal_mask
from diptych_torch.recurrent import RNNState


class Cache:
    """Keys and values [B, K, S, H] of every layer, and all positions [B, S].

    transformers' attention calls `update` with the keys and values of its new tokens and reads what it returns.
    """

    def __init__(self, config: DecoderConfig, *, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        shape = (rows, config.num_kv_heads, columns, config.head_dim)
        layers = range(config.num_layers)
        # Zeros: what is masked out must still be finite, since attention multiplies it by 0.
        self._both = [torch.zeros(2, *shape, dtype=dtype, device=device) for _ in layers]
        self.keys, self.values = [both[0] for both in self._both], [both[1] for both in self._both]
        self.positions = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.start = 0
        self._column: Tensor | None = None  # [B], during a step
        self._reach = 0  # columns that a step reads
        heads = torch.arange(rows * config.num_kv_heads, device=device)
        self._first = heads.view(rows, config.num_kv_heads) * columns  # of each row and head, as the cache lies flat
        self._places = self._first.flatten()
        self._places_of_both = self._places
        self._indices = torch.arange(columns, device=device)

    def clear(self) -> None:
        """Begin anew."""
        self.start, self._column = 0, None
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def step_to(self, column: Int[Tensor, " B"], reach: int) -> None:
        """From now on each pass reads one token of each row, into this column of the row, and the first `reach`
        columns."""
        self._column, self._reach, self.start = column, reach, reach - 1
        places = self._first + column[:, None]
        self._places = places.flatten()
        self._places_of_both = torch.cat((places, places + self.keys[0][..., 0].numel()), dim=1).flatten()

    @property
    def is_step(self) -> bool:
        """Does each pass read one token of each row, into a column of the row's own?"""
        return self._column is not None

    def extend(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Note the new columns' positions; returns those of all columns."""
        if self._column is not None:
            self.positions.scatter_(1, self._column[:, None], positions)
            return self.positions[:, : self._reach]
        end = self.start + positions.shape[1]
        self.positions[:, self.start : end] = positions
        return self.positions[:, :end]

    def mask(self, segments: Bool[Tensor, "B S"], queries: int, window: int | None) -> Bool[Tensor, "B 1 Q S"]:
        """`attention.causal_mask`, in a step from each row's own column on."""
        if self._column is None:
            return causal_mask(segments, queries, window)
        distance = self._column[:, None] - self._indices[: self._reach]
        seen = (distance >= 0) & segments
        return (seen if window is None else seen & (distance < window))[:, None, None]

    def update(
        self, keys: Float[Tensor, "B K T H"], values: Float[Tensor, "B K T H"], layer_idx: int
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Take in a layer's new columns; returns its keys and values so far. The last layer's turn ends the pass."""
        held = self.keys[layer_idx], self.values[layer_idx]
        if self._column is not None:
            for all_of_layer, new in zip(held, (keys, values), strict=True):
                # As one list of columns: a scatter with one index each, the cheapest there is.
                all_of_layer.view(-1, new.shape[-1]).index_copy_(0, self._places, new.reshape(-1, new.shape[-1]))
            return held[0][:, :, : self._reach], held[1][:, :, : self._reach]
        end = self.start + keys.shape[2]
        held[0][:, :, self.start : end] = keys
        held[1][:, :, self.start : end] = values
        if layer_idx == len(self.keys) - 1:
            self.start = end
        return held[0][:, :, :end], held[1][:, :, :end]

    def write(
        self, rows: Float[Tensor, "BK2 H"], layer_idx: int
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """`update` in a step, of keys and values side by side: each row's K heads of keys, then its K of values."""
        both = self._both[layer_idx]
        both.view(-1, both.shape[-1]).index_copy_(0, self._places_of_both, rows)
        return both[0, :, :, : self._reach], both[1, :, :, : self._reach]

    def settle(self, running: Bool[Tensor, " B"] | None = None) -> None:
        """Nothing to do: a row that does not run writes again what it has written."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks how many columns there are already."""
        return self.start

    def admit(self, slots: Int[Tensor, " G"], other: Any) -> None:
        """Put the columns that `other`, a smaller cache, has read into these rows."""
        end = other.start
        for mine, others in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:, :, :end].index_copy_(0, slots, others[:, :, :end])
        self.positions[:, :end].index_copy_(0, slots, other.positions[:, :end])


class StateCache(RNNState):
    """A recurrent model's states [B, D], in place. A step keeps the states of rows that do not run."""

    def __init__(self, *, layers: int, rows: int, width: int, dtype: torch.dtype, device: torch.device):
        self.held = [torch.zeros(rows, width, dtype=dtype, device=device) for _ in range(layers)]
        super().__init__(list(self.held))

    def clear(self) -> None:
        """Begin anew."""
        self.start, self.layers = 0, list(self.held)
        for state in self.held:
            state.zero_()

    def step_to(self, column: Int[Tensor, " B"], reach: int) -> None:
        """From now on each pass reads one token of each row. A state has no columns."""

    def settle(self, running: Bool[Tensor, " B"] | None = None) -> None:
        """Bring the states that the model has just made into place: of all rows, or of those that run."""
        for held, new in zip(self.held, self.layers, strict=True):
            held.copy_(new if running is None else new.where(running[:, None], held))
        self.layers = list(self.held)

    def admit(self, slots: Int[Tensor, " G"], other: Any) -> None:
        """Put the states of `other`, a smaller one, into these rows."""
        for mine, others in zip(self.held, other.held, strict=True):
            mine.index_copy_(0, slots, others)
