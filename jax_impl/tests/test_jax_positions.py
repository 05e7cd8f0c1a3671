"""Positions that a model has no row for: JAX would silently take the last row, so the engine refuses them."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.engine import EngineSettings, ModelSpec, PromptBatch, Sampling
from diptych.errors import UserError
from diptych.families.family import read_model, tensor_shapes

GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}


def test_positions_past_the_table_are_refused_and_the_last_row_is_not(ragged_batch):
    from diptych_jax.engine import create

    draws = np.random.default_rng(0)
    shapes = tensor_shapes(read_model(GPT2), "lm")
    weights = {name: draws.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    model = create(EngineSettings(precision="float32")).model(
        ModelSpec(config=GPT2, weights=weights, head="lm", optimizer=None, micro_batch_size=2)
    )
    assert np.isfinite(model.logprobs(ragged_batch(2, 12), temperature=1.0)).all()
    with pytest.raises(ValueError, match=r"positions must be in 0\.\.11, got 12"):
        model.logprobs(ragged_batch(2, 13), temperature=1.0)
    prompt = ragged_batch(2, 8)
    prompts = PromptBatch(tokens=prompt.tokens, attention=prompt.attention, positions=prompt.positions)
    for new in (4, 5):
        sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, stop_token_ids=())
        uniforms = np.full((2, new), 0.5, np.float32)
        if new == 4:
            assert model.generate(prompts, sampling, uniforms, pad_token_id=0).mask.all()
            continue
        with pytest.raises(UserError, match="would pass the model's 12 positions"):
            model.generate(prompts, sampling, uniforms, pad_token_id=0)
