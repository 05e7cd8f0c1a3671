"""Low-rank adapters: what they compute, what is trained, what is saved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diptych.engine import AdapterSpec, EngineSettings, ModelSpec
from diptych.errors import UserError
from diptych.families.adapter import SCORE, adapter_shapes, merge
from diptych.families.family import read_model

SPEC = AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "o_proj", "mlp.up_proj"))


def _hot(config):
    draws = np.random.default_rng(7)
    return {name: draws.normal(0, 0.2, shape) for name, shape in adapter_shapes(read_model(config), SPEC).items()}


def _build(config, weights, *, head="lm", optimizer=None, adapter=None):
    from diptych_jax.engine import create

    return create(EngineSettings(precision="float64")).model(
        ModelSpec(
            config=config,
            weights=weights,
            head=head,
            optimizer=optimizer,
            micro_batch_size=4,
            adapter=None if adapter is None else SPEC,
            adapter_weights=adapter or {},
        )
    )


def test_an_adapter_is_what_its_merged_weights_are_and_only_it_is_trained(
    tiny_config, hot_weights, adamw, sft, sft_batch, tmp_path
):
    config, batch = tiny_config(), sft_batch()
    weights, adapter = hot_weights(config, "lm"), _hot(config)
    model = _build(config, weights, optimizer=adamw, adapter=adapter)
    base, merged = (_build(config, w) for w in (weights, merge(read_model(config), SPEC, weights, adapter)))
    tokens = batch.tokens
    adapted = model.logprobs(tokens, temperature=1.0)
    # `merge` rounds to the float32 of these weights.
    np.testing.assert_allclose(adapted, merged.logprobs(tokens, temperature=1.0), atol=2e-5)
    plain = base.logprobs(tokens, temperature=1.0)
    np.testing.assert_array_equal(model.logprobs(tokens, temperature=1.0, adapter=False), plain)
    assert np.abs(adapted - plain).max() > 1e-2  # canary: a forgotten adapter is seen

    gradients = model.gradients(sft, batch)
    assert gradients.keys() == adapter.keys()
    for name in list(adapter)[:2]:  # A and B of the first layer, against the slope of the loss
        values = []
        for step in (1e-6, -1e-6):
            moved = adapter | {
                name: adapter[name] + step * (np.arange(adapter[name].size) == 5).reshape(adapter[name].shape)
            }
            model.load_adapter(moved)
            values.append(model.evaluate(sft, batch)["loss"])
        slope = (values[0] - values[1]) / 2e-6
        assert gradients[name].ravel()[5] == pytest.approx(slope, rel=1e-5, abs=1e-9)
    model.load_adapter(adapter)

    model.update(sft, batch, learning_rate=1e-2)
    assert all(np.array_equal(value, weights[name]) for name, value in model.weights().items())
    assert all(not np.array_equal(value, adapter[name]) for name, value in model.adapter_weights().items())
    assert model.optimizer_state().first.keys() == adapter.keys()
    model.load_optimizer_state(model.optimizer_state())
    model.save_checkpoint(tmp_path / "c")()
    again = _build(config, weights, optimizer=adamw, adapter=adapter)
    again.load_checkpoint(tmp_path / "c")
    assert again.update(sft, batch, learning_rate=1e-2) == model.update(sft, batch, learning_rate=1e-2)
    for name, value in model.adapter_weights().items():
        np.testing.assert_array_equal(again.adapter_weights()[name], value)


def test_a_scalar_head_is_trained_beside_the_adapter(tiny_config, hot_weights, adamw):
    config = tiny_config()
    weights = hot_weights(config, "scalar")
    model = _build(config, weights, head="scalar", optimizer=adamw, adapter=_hot(config))
    assert set(model.adapter_weights()) == {*_hot(config), SCORE}
    np.testing.assert_array_equal(model.adapter_weights()[SCORE], weights["score.weight"])


def test_what_does_not_fit_is_named(tiny_config, hot_weights, ragged_batch):
    config = tiny_config()
    weights, adapter = hot_weights(config, "lm"), _hot(config)
    wrong = dict(list(adapter.items())[1:])
    with pytest.raises(UserError, match="missing or left over base_model"):
        _build(config, weights, adapter=wrong)
    model = _build(config, weights)
    with pytest.raises(ValueError, match="no adapter"):
        model.logprobs(ragged_batch(2, 8), temperature=1.0, adapter=False)
    spec = replace(SPEC, targets=("c_attn",))
    with pytest.raises(UserError, match="'c_attn' names no linear layer"):
        adapter_shapes(read_model(config), spec)
