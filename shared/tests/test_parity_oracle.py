"""The oracle on its own: taps where families/taps.py says, packing, adapters, bad input. parity_tests/ holds it against
transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.algorithms.losses import sft_loss
from diptych.engine import AdapterSpec, Loss, TokenBatch, TrainBatch
from diptych.errors import UserError
from diptych.families.adapter import initial_adapter
from diptych.families.family import read_model, tensor_shapes
from diptych.families.taps import taps
from diptych.parity.truth.oracle import evaluate, forward

BASE = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = BASE | {
    "model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "pre": LLAMA,
    "post": BASE | {"model_type": "opt", "ffn_dim": 12, "do_layer_norm_before": False, "max_position_embeddings": 32},
    "output": LLAMA | {"model_type": "olmo2"},
    "sandwich": LLAMA | {"model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4},
    "parallel": BASE
    | {"model_type": "gpt_neox", "intermediate_size": 12, "max_position_embeddings": 32, "rotary_pct": 0.5},
    "experts": LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "recurrent": {"model_type": "rnn", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2},
}


def weights_of(model, head="lm"):
    return {name: random.normal(1, name, shape, std=0.4) for name, shape in tensor_shapes(model, head).items()}


def batch_of(*lengths: int, first: int = 1) -> TokenBatch:
    """Right-padded rows."""
    real = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    tokens = random.generator(1, "tokens").integers(0, 20, real.shape).astype(np.int32)
    positions = (np.cumsum(real, axis=1) - 1).astype(np.int32) * real
    return TokenBatch(tokens=tokens, attention=real, positions=positions.astype(np.int32), first=first)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_taps_are_those_of_the_list_in_their_layouts(name, head):
    model, batch = read_model(CONFIGS[name]), batch_of(6, 4)
    seen = {}

    def note(tap, value):
        seen[tap] = value.shape
        return value

    forward(model, head, weights_of(model, head), batch, tap=note)
    wanted = taps(model, head, "ops")
    assert list(seen) == [name for name in seen if name in wanted]
    assert set(seen) == set(wanted)
    for tap, layout in wanted.items():
        assert len(seen[tap]) == len(layout.split()), tap


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap_is_read_by_what_comes_after_it(name):
    """Forcing another value anywhere changes the outputs; forcing what was computed does not."""
    model, batch = read_model(CONFIGS[name]), batch_of(6, 4)
    weights = weights_of(model)
    free = forward(model, "lm", weights, batch).outputs
    for tap in taps(model, "lm", "ops"):
        for moved in (0.0, 0.3):
            ramp = np.linspace(0, moved, 6)  # (a constant added to an input of a layer norm changes nothing)

            def force(name, value, tap=tap, ramp=ramp):
                ramp = ramp.reshape(6, *[1] * (value.ndim - 2))
                return value + ramp * np.linspace(-1, 2, value.shape[-1]) if name == tap and value.ndim > 2 else (
                    value + ramp if name == tap else value
                )  # fmt: skip

            changed = np.abs(forward(model, "lm", weights, batch, tap=force).outputs - free).max()
            assert (changed > 1e-4) == (moved > 0), tap


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_examples_are_read_as_if_they_were_alone(name):
    model, apart = read_model(CONFIGS[name]), batch_of(5, 4)
    weights = weights_of(model)
    together = TokenBatch(
        tokens=np.concatenate([apart.tokens[0, :5], apart.tokens[1, :4]])[None],
        attention=np.ones((1, 9), bool),
        positions=np.concatenate([np.arange(5), np.arange(4)])[None].astype(np.int32),
    )
    one, two = forward(model, "lm", weights, apart).outputs, forward(model, "lm", weights, together).outputs
    np.testing.assert_allclose(two[0], np.concatenate([one[0, :5], one[1, :4]]), rtol=0, atol=1e-13)
    assert two[0, 5] == 0


def test_an_adapter_is_added_to_the_weights():
    model, batch, spec = read_model(LLAMA), batch_of(6, 4), AdapterSpec(rank=2, alpha=4.0, targets=("q_proj",))
    weights = weights_of(model)
    parts = {name: random.normal(2, name, value.shape, std=0.5) for name, value in
             initial_adapter(model, spec, seed=1).items()}  # fmt: skip
    merged = dict(weights)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + 2.0 * b.astype(float) @ a.astype(float)
    found = forward(model, "lm", weights, batch, adapter=(spec, parts)).outputs
    np.testing.assert_allclose(found, forward(model, "lm", merged, batch).outputs, rtol=0, atol=1e-13)
    assert np.abs(found - forward(model, "lm", weights, batch).outputs).max() > 0.01


def test_a_loss_is_evaluated_with_its_metrics_and_the_balance_of_experts():
    model = read_model(CONFIGS["experts"])
    weights, tokens = weights_of(model), batch_of(6, 4)
    mask = tokens.attention.astype(np.float32)
    batch = TrainBatch(tokens=tokens, arrays={"mask": mask}, denominators={"num_tokens": 8.0})
    plain = evaluate(Loss(function=sft_loss, reads="logprobs"), model, weights, batch)
    logprobs = forward(model, "lm", weights, tokens).outputs
    assert plain["loss"] == pytest.approx(-(logprobs * mask).sum() / 8, abs=1e-14)
    balanced = evaluate(Loss(function=sft_loss, reads="logprobs", balance=0.5), model, weights, batch)
    assert balanced["loss"] == pytest.approx(plain["loss"] + 0.5 * balanced["router/balance_loss"], abs=1e-14)
    assert balanced["router/balance_loss"] > 1.5  # top 2 of 3 experts: 2 where all are equal


def test_entropy_and_temperature():
    model, batch = read_model(LLAMA), batch_of(6, 4)
    weights = weights_of(model)
    hot = forward(model, "lm", weights, batch, temperature=1e6)
    np.testing.assert_allclose(hot.entropy[0, 1:], np.log(20), atol=1e-5)
    np.testing.assert_allclose(hot.outputs[0, 1:], -np.log(20), atol=1e-5)
    assert (forward(model, "lm", weights, batch).entropy[0, 1:] < np.log(20) - 1e-3).all()
    assert (forward(model, "lm", weights, batch_of(6, 4, first=4)).outputs[:, :4] == 0).all()


def test_bad_input():
    model, batch = read_model(LLAMA), batch_of(6, 4)
    weights = weights_of(model)
    with pytest.raises(UserError, match="lm_head"):
        forward(model, "lm", {name: value for name, value in weights.items() if name != "lm_head.weight"}, batch)
    with pytest.raises(UserError, match="q_proj"):
        forward(model, "lm", weights | {"model.layers.1.self_attn.q_proj.weight": np.zeros((3, 3))}, batch)
    learned = read_model(CONFIGS["post"])
    with pytest.raises(UserError, match="positions"):
        forward(learned, "lm", weights_of(learned), batch_of(40))
