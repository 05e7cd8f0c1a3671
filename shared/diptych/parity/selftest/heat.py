"""Hot weights: what initial weights hide.

Freshly initialised models are nearly linear (gains 1, small projections, attention almost uniform): many bugs change
their outputs by less than rounding. Tests and the self-test of a recipe with a new model run on heated ones.
"""

from __future__ import annotations

from dataclasses import replace

from diptych import random
from diptych.weights.huggingface import Checkpoint


def heat(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """Gains leave 1 (keyed noise of 0.2), biases leave 0 (0.1), embeddings are 3 and projections 4 times as large."""
    weights = {}
    for name, value in checkpoint.weights.items():
        if name == "score.weight":
            weights[name] = value
        elif value.ndim == 1:
            std = 0.1 if name.endswith("bias") else 0.2
            weights[name] = value + random.normal(seed, f"heat/{name}", value.shape, std=std).astype(value.dtype)
        else:
            weights[name] = value * (3.0 if "embed" in name or "wte" in name or "wpe" in name else 4.0)
    return replace(checkpoint, weights=weights)
