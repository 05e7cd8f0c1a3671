"""The Elman recurrent language model: what it computes and which parameters it has.

    h_t = f(W_xh x_t + W_hh h_{t-1} + b_h),   y_t = W_hy h_t + b_y          (Elman 1990; f tanh or relu; h_0 = 0)

x_t is the embedding of token t in the first layer and the state of the layer below in the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diptych.engine import Head
from diptych.families.decoder import Slot


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """What the model computes; hashable. Embeddings are as wide as the state, so that they can be tied."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    nonlinearity: Literal["tanh", "relu"]
    tie_word_embeddings: bool
    initializer_range: float
    max_position_embeddings: int

    @property
    def num_params(self) -> int:
        """Parameters of the language model."""
        return sum(
            math.prod(slot.shape) * (self.num_layers if slot.per_layer else 1) for slot in slots(self, "lm").values()
        )


def slots(config: RecurrentConfig, head: Head) -> dict[str, Slot]:
    """Every parameter, by name. Axes: v vocabulary, d width of the state, i the same width of inputs."""
    width = config.hidden_size
    sizes = {"v": config.vocab_size, "i": width, "d": width}

    def slot(pattern: str, *, layer: bool = True) -> Slot:
        return Slot(pattern=pattern, axes=tuple((a, n) for a, n in sizes.items() if a in pattern), per_layer=layer)

    found = {
        "embedding": slot("v d -> v d", layer=False),
        "input": slot("d i -> i d"),
        "recurrent": slot("d i -> i d"),
        "recurrent_bias": slot("d -> d"),
    }
    if head == "scalar":
        return found | {"score": slot("1 d -> 1 d", layer=False)}
    if not config.tie_word_embeddings:
        found["head"] = slot("v d -> v d", layer=False)
    return found | {"head_bias": slot("v -> v", layer=False)}
