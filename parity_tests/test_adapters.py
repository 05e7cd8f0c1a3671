"""Low-rank adapters on both engines, float64: the same numbers below, above and in training, and the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.engine import AdapterSpec, ModelSpec, OptimizerSpec, PromptBatch, Sampling, Tensors
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model
from diptych.parity.tolerances import TOLERANCES
from parity_tests.families import CASES, hot_weights, loss_of, targets, train_batch
from parity_tests.family_checks import (
    ENGINES,
    engine,
    gradient_error,
    output_error,
    outputs,
    quick_compilation,
    tokens_differ,
)
from parity_tests.test_families_canaries import short_batch

SPECS = {
    "llama": AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "mlp.down_proj")),
    "gpt2": AdapterSpec(rank=3, alpha=5.0, targets=("all-linear",)),
    "rnn": AdapterSpec(rank=2, alpha=1.0, targets=("input", "recurrent")),
}
ADAMW = OptimizerSpec(name="adamw", weight_decay=0.1, max_grad_norm=0.5)
SAMPLING = Sampling(temperature=0.8, top_k=0, top_p=0.9, max_new_tokens=8, stop_token_ids=(1,))


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def hot_adapter(case: str) -> Tensors:
    return {
        name: random.normal(1, f"adapters/{name}", shape, std=0.2).astype(np.float64)
        for name, shape in adapter_shapes(read_model(CASES[case]), SPECS[case]).items()
    }


@cache
def adapted(name: str, case: str, scale: float = 1.0) -> Any:
    """A trained model; every test puts back what it changes. scale: of alpha, for canaries."""
    return engine(name, "float64").model(
        ModelSpec(
            config=CASES[case], weights=hot_weights(CASES[case], "lm", "float64"), head="lm", optimizer=ADAMW,
            micro_batch_size=2, adapter=replace(SPECS[case], alpha=SPECS[case].alpha * scale),
            adapter_weights=hot_adapter(case),
        )
    )  # fmt: skip


def draw(model: Any) -> Any:
    batch = short_batch()
    rows = batch.attention.all(axis=1)
    prompts = PromptBatch(tokens=batch.tokens[rows], attention=batch.attention[rows], positions=batch.positions[rows])
    uniforms = np.random.default_rng(3).uniform(size=(len(prompts), SAMPLING.max_new_tokens))
    return model.generate(prompts, SAMPLING, uniforms, pad_token_id=0)


@pytest.mark.parametrize("case", SPECS)
def test_both_engines_compute_and_train_the_same_adapter(case, judge):
    batch, loss = short_batch(), loss_of("lm")
    data, mask = train_batch(batch, "lm"), targets(batch)
    ours, theirs = (adapted(name, case) for name in ENGINES)

    judge(case, "two adapters", output_error(outputs(ours, batch), outputs(theirs, batch), mask), 1e-12)
    below, other = (model.logprobs(batch, temperature=1.0, adapter=False) for model in (ours, theirs))
    judge(case, "two adapters", output_error(below, other, mask), 1e-12)
    assert output_error(below, outputs(ours, batch), mask) > 1e-2  # canary: the two differ
    gradients = [model.gradients(loss, data) for model in (ours, theirs)]
    judge(case, "two adapters' gradients", gradient_error(*gradients), 1e-11)
    drawn = [draw(model) for model in (ours, theirs)]
    assert tokens_differ(*drawn) == 0
    assert output_error(drawn[0].logprobs, drawn[1].logprobs, drawn[0].mask) <= 1e-12

    held, base = ours.adapter_weights(), ours.weights()
    metrics = [model.update(loss, data, learning_rate=1e-2) for model in (ours, theirs)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-12)
    after = [model.adapter_weights() for model in (ours, theirs)]
    judge(case, "two adapters' updates", gradient_error(*after), 1e-12)
    assert min(float(np.abs(after[0][name] - held[name]).max()) for name in held) > 1e-3  # all of it is trained
    for model in (ours, theirs):
        assert all(np.array_equal(value, base[name]) for name, value in model.weights().items())


def test_canary_another_scale_is_seen():
    batch = short_batch()
    ours, other = adapted("torch", "rnn"), adapted("torch", "rnn", 1.001)
    other.load_adapter(ours.adapter_weights())
    assert output_error(outputs(ours, batch), outputs(other, batch), targets(batch)) > 1e-6
    found = [model.gradients(loss_of("lm"), train_batch(batch, "lm")) for model in (ours, other)]
    assert gradient_error(*found) > TOLERANCES["gradient_relative_l2"].float64
