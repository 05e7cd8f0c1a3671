"""Adapters in the stages: where one starts, how it is saved, and the policy below it as the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diptych.engine import AdapterSpec, Model, Precision, Tensors, TokenBatch
from diptych.families.adapter import SCORE, initial_adapter, merge
from diptych.recipe.schema import AdapterRecipe
from diptych.weights.adapters import Adapter, read_adapter
from diptych.weights.huggingface import Checkpoint


def start_adapter(
    recipe: AdapterRecipe, checkpoint: Checkpoint, *, seed: int, precision: Precision
) -> tuple[Checkpoint, Adapter]:
    """The adapter that training starts from, the one at `recipe.path` or a new one that changes nothing yet, and the
    checkpoint below it, with the scalar head that was saved beside the adapter.

    Raises UserError where it does not fit the model.
    """
    if recipe.path is None:
        spec = AdapterSpec(rank=recipe.rank, alpha=recipe.alpha, targets=recipe.targets)
        return checkpoint, Adapter(spec=spec, weights=initial_adapter(checkpoint.model, spec, seed=seed))
    adapter = read_adapter(Path(recipe.path), checkpoint.model, checkpoint.head, precision=precision)
    if SCORE not in adapter.weights:
        return checkpoint, adapter
    parts = dict(adapter.weights)
    weights = {**checkpoint.weights, "score.weight": parts.pop(SCORE)}
    return replace(checkpoint, weights=weights), replace(adapter, weights=parts)


def merged_weights(checkpoint: Checkpoint, spec: AdapterSpec, weights: Tensors, adapter: Tensors) -> Tensors:
    """A copy of `weights`, the model's or a part of them, with an adapter, and a scalar head trained beside it, merged
    in."""
    merged = merge(checkpoint.model, spec, weights, {name: part for name, part in adapter.items() if name != SCORE})
    if SCORE in adapter and "score.weight" in weights:
        merged["score.weight"] = adapter[SCORE]
    return merged


@dataclass(frozen=True)
class BelowAdapter:
    """A policy without its adapter: the reference, at no memory of its own."""

    policy: Model

    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Float[np.ndarray, "batch time"]:
        """See `diptych.engine.Model.logprobs`."""
        return self.policy.logprobs(batch, temperature=temperature, adapter=False)
