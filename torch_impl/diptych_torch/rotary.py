"""Rotary angles from the hinge's frequencies, in place of transformers' rotary modules.

transformers computes its frequencies in float32 and its angles in float32 whatever the model's precision; the last bits
of both differ from ours. Both engines' angles are products of the same float32 frequencies.

Dimensions: B batch, T time, R rotated columns of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from diptych.errors import UserError
from diptych.families.rope import Rope, frequencies


class Rotary(nn.Module):
    """Cosines and sines of position * frequency, each twice (half-split layout, Su et al. 2021), times the rope's
    attention factor. Stands in for a transformers rotary module: same call, same result."""

    def __init__(self, ropes: Sequence[Rope], rope_of_type: Mapping[str, int], device: torch.device):
        """rope_of_type: which rope each layer type takes, in models that ask by layer type."""
        super().__init__()
        self.ropes = tuple(ropes)
        self.rope_of_type = dict(rope_of_type)
        for index, rope in enumerate(self.ropes):
            table = torch.tensor(np.array(frequencies(rope)), device=device)
            self.register_buffer(f"frequencies_{index}", table, persistent=False)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "B T"], layer_type: str | None = None
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
        """The angles' cosines and sines in x's dtype."""
        index = 0 if layer_type is None else self.rope_of_type[layer_type]
        angles, factor = self.angles(position_ids, index, x.dtype)
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * factor).to(x.dtype), (both.sin() * factor).to(x.dtype)

    def angles(
        self, position_ids: Int[Tensor, "B T"], index: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "B T A"], float]:
        """The angles of one of the ropes, half as many (A) as rotated columns, and its attention factor."""
        rope, table = self.ropes[index], self.get_buffer(f"frequencies_{index}")
        # Upcast: angles in at least float32 (a bfloat16 position is off by 8 at 2000).
        wide = torch.promote_types(dtype, torch.float32)
        rows = table[0]
        if rope.by_length:
            rows = table[rope.rows(lengths(position_ids)).long()]
        return position_ids[..., None].to(wide) * rows.to(wide), rope.attention_factor

    @property
    def rotated(self) -> int:
        """Columns of a head that are rotated, the first ones."""
        return 2 * self.get_buffer("frequencies_0").shape[-1]


def lengths(positions: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """One more than the last position of the sequence that each column belongs to, whatever its neighbours' are; a row
    may hold several, each from a position 0 on."""
    sequence = (positions == 0).cumsum(dim=1)
    last = positions.new_zeros(len(positions), positions.shape[1] + 1)
    return last.scatter_reduce(1, sequence, positions, "amax").gather(1, sequence) + 1


def check_frequencies(rotary: Any, ropes: Sequence[Rope], rope_of_type: Mapping[str, int]) -> None:
    """Raise UserError where transformers reads other rotary frequencies or another attention factor from the config.

    rotary: transformers' rotary module of the model (on any device). Ropes by length are compared at both ends.
    """
    config = rotary.config
    theirs = type(rotary)(config=config)  # outside of `meta`: with numbers
    for layer_type, index in (dict(rope_of_type) if len(ropes) > 1 else {None: 0}).items():
        rope, prefix = ropes[index], "" if layer_type is None else f"{layer_type}_"
        ours = frequencies(rope)
        found = [(getattr(theirs, f"{prefix}inv_freq"), getattr(theirs, f"{prefix}attention_scaling"))]
        if rope.by_length:
            length = rope.original_max_position_embeddings + len(ours) - 1
            found.append(ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"), seq_len=length))
        for (table, factor), row in zip(found, (ours[0], ours[-1]), strict=False):
            agrees = table.shape == row.shape and np.allclose(table.numpy(), row, rtol=1e-5, atol=0.0)
            if not agrees or not np.isclose(factor, rope.attention_factor, rtol=1e-6, atol=0.0):
                raise UserError(
                    "config.json: transformers computes other rotary frequencies from it than Diptych; "
                    "check rope_parameters, rope_scaling and rope_theta"
                )
