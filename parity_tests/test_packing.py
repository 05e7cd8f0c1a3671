"""Packing changes no number: several examples in a row give what each gives in a row of its own, in both engines.

Models of the families in which neighbours could meet in different ways: in the attention mask, in a window, in learned,
rotary (also by length) and ALiBi positions, in a recurrent state, in the balance of experts. And the whole sft stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diptych.algorithms.losses import sft_loss
from diptych.data.batches import packed, sft_batch
from diptych.data.examples import TokenExample
from diptych.engine import Loss, Model, TokenBatch, TrainBatch
from diptych.parity.compare import metrics, tensors
from diptych.parity.tolerances import TOLERANCES
from diptych.recipe.load import load_recipe
from diptych.run.metrics import read_metrics
from diptych.stages.pipeline import run_recipe
from parity_tests.conftest import QUICKSTART
from parity_tests.families import CASES, ORIGINAL, VOCAB, hot_weights
from parity_tests.family_checks import build, quick_compilation

FAMILIES = ["llama", "llama, dynamic", "gemma2", "mixtral", "opt", "bloom", "rnn"]
LENGTHS = (60, 20, 30, 9, 7, 40)  # two rows of 128 columns, with one past ORIGINAL beside short ones
WIDTH = 128
LIMIT = 1e-12
SFT = Loss(function=sft_loss, reads="logprobs", balance=0.1)


@pytest.fixture(autouse=True)
def compilation():
    with quick_compilation():
        yield


def model_of(engine: str, family: str) -> Model:
    return build(engine, CASES[family], hot_weights(CASES[family], "lm", "float64"))


def examples() -> list[TokenExample]:
    draws = np.random.default_rng(5)
    assert max(LENGTHS) > ORIGINAL > min(LENGTHS)
    return [
        TokenExample(
            row=row, tokens=draws.integers(0, VOCAB, length).astype(np.int32), trained=np.arange(length) >= length // 2
        )
        for row, length in enumerate(LENGTHS)
    ]


def batches() -> tuple[TrainBatch, TrainBatch]:
    """The examples one to a row, and packed; filled up to the same number of rows, so that one program takes both."""
    options: dict[str, Any] = {"buckets": (WIDTH,), "pad_token_id": 0, "multiple_of": len(LENGTHS)}
    apart, together = sft_batch(examples(), **options), sft_batch(examples(), **options, packing=True)
    assert together.tokens.attention.any(axis=1).tolist() == [True] * 2 + [False] * 4
    return apart, together


def difference(model: Model, batch: TokenBatch) -> float:
    """The largest difference between log-probabilities of the packed examples and those in rows of their own."""
    apart = model.logprobs(batches()[0].tokens, temperature=0.7)
    together = model.logprobs(batch, temperature=0.7)
    errors = []
    for index, row in enumerate(packed(examples(), (WIDTH,), len(LENGTHS))):
        start = 0
        for example in row:
            length = len(example.tokens)
            errors.append(np.abs(together[index, start : start + length] - apart[example.row, :length]).max())
            start += length
        assert (together[index, start:] == 0).all()
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_log_probabilities_know_no_neighbour(engine, family):
    model, batch = model_of(engine, family), batches()[1].tokens
    assert difference(model, batch) < LIMIT
    matches = model.greedy_matches(batch)
    assert not (matches & (batch.positions == 0)).any()


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "rnn"])
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_canary_positions_that_go_on_are_seen(engine, family):
    """Then the neighbours are read, too: where a position is 0 is where an example begins."""
    batch = batches()[1].tokens
    positions = np.where(batch.attention, np.arange(WIDTH), 0).astype(np.int32)
    assert difference(model_of(engine, family), replace(batch, positions=positions)) > 1e3 * LIMIT


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_canary_a_mask_across_examples_is_seen(engine, monkeypatch):
    if engine == "jax":
        monkeypatch.setattr("diptych_jax.model.segment_ids", lambda attention, positions: attention.astype("int32"))
    else:
        monkeypatch.setattr(TokenBatch, "segments", property(lambda batch: batch.attention.astype(np.int32)))
    # (Its own shape: JAX keeps the programs that the other tests have compiled.)
    model, batch = build(engine, CASES["llama"], hot_weights(CASES["llama"], "lm", "float64"), rows=3), batches()[1]
    assert difference(model, batch.tokens) > 1e3 * LIMIT


@pytest.mark.parametrize("family", ["mixtral", "rnn"])
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_gradients_of_a_step_are_the_same(engine, family):
    model = model_of(engine, family)
    apart, together = batches()
    assert apart.denominators == together.denominators
    gradients = [model.gradients(SFT, batch) for batch in (apart, together)]
    assert not tensors("gradients", *gradients, limit=1e-11)
    canary = replace(together, denominators={"num_tokens": together.denominators["num_tokens"] + 1})
    assert tensors("gradients", gradients[0], model.gradients(SFT, canary), limit=1e-11)


SETTINGS = [
    "precision=float64", "stages=[sft]", "data.demonstrations.limit=40", "data.buckets=[192]", "sft.max_steps=3",
    "sft.epochs=3", "sft.batch_size=6", "sft.micro_batch_size=2", "sft.eval_every=2", "sft.optimizer.warmup_steps=1",
    "model.new.hidden_size=16", "model.new.intermediate_size=32", "model.new.num_hidden_layers=1",
    "rollout.max_new_tokens=4",
]  # fmt: skip


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_the_sft_stage_logs_the_same_numbers(engine, tmp_path, monkeypatch):
    """Every metric of three steps with ragged rows, and of their evaluations."""
    logs, rows = [], []

    def counted(*arguments, **options):
        batch = sft_batch(*arguments, **options)
        rows[-1] += len(batch.tokens)
        return batch

    monkeypatch.setattr("diptych.stages.sft.sft_batch", counted)
    for packing in ("false", "true"):
        rows.append(0)
        recipe = load_recipe(QUICKSTART, [*SETTINGS, f"data.packing={packing}"])
        run_recipe(recipe, engine_name=engine, output=tmp_path / packing)
        logs.append(read_metrics(tmp_path / packing / "metrics.jsonl"))
    for apart, together in zip(*logs, strict=True):
        names = [
            name
            for name in apart
            if name not in ("stage", "step", "time") and not name.startswith(("timing_s", "tokens_"))
        ]
        a, b = ({name: row[name] for name in names} for row in (apart, together))
        assert not metrics(f"step {apart['step']}", a, b, limit=TOLERANCES["layout"].at("float64"), floor=1e-12)
    assert rows[1] < 0.7 * rows[0]
    assert {"loss", "grad_norm", "tokens", "eval/loss"} <= set(logs[0][-1])
