"""Rollouts: decoding against the training forward, transformers' greedy search and an author's published text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diptych.engine import Completions, Finish, OptimizerSpec, PromptBatch, Sampling, TokenBatch
from diptych.weights.huggingface import read_checkpoint
from diptych_torch import cache, slots

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
PAD = 9


def prompts(rows: int = 5, width: int = 7, vocab: int = 64) -> PromptBatch:
    rng = np.random.default_rng(0)
    attention = np.arange(width) >= rng.integers(0, width, rows)[:, None]
    attention[0], attention[1] = True, [False] * (width - 1) + [True]
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0)
    tokens = np.where(attention, rng.integers(0, vocab, (rows, width)), PAD)
    return PromptBatch(tokens=tokens.astype(np.int32), attention=attention, positions=positions.astype(np.int32))


def how(**changes: Any) -> Sampling:
    settings = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12, "stop_token_ids": ()}
    return Sampling(**{**settings, **changes})


def noise(rows: int, new: int) -> np.ndarray:
    return np.random.default_rng(2).random((rows, new), dtype=np.float32)


def whole_rows(prompts: PromptBatch, completions: Completions) -> TokenBatch:
    attention = np.concatenate([prompts.attention, completions.mask], axis=1)
    return TokenBatch(
        tokens=np.concatenate([prompts.tokens, completions.tokens], axis=1),
        attention=attention,
        positions=(np.maximum(attention.cumsum(axis=1) - 1, 0) * attention).astype(np.int32),
        first=prompts.tokens.shape[1],
    )


def gap(ours: Any, sampling: Sampling, given: PromptBatch, completions: Completions) -> float:
    trained = ours.logprobs(whole_rows(given, completions), temperature=sampling.scoring_temperature)
    difference = trained[:, given.tokens.shape[1] :] - completions.logprobs
    return float(np.abs(difference[completions.mask]).max())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"head_dim": 12, "num_key_value_heads": 4},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=str,
)
def test_decoding_is_the_training_forward(make_model, make_config, changes, precision):
    ours = make_model(config=make_config(**changes), precision=precision, micro_batch_size=5)
    given = prompts()
    for sampling in (how(stop_token_ids=(3, 40)), how(temperature=1.4, top_k=20, top_p=0.9), how(temperature=0.0)):
        completions = ours.generate(given, sampling, noise(5, 12), pad_token_id=PAD)
        assert completions.logprobs.dtype == precision
        assert gap(ours, sampling, given, completions) < TOLERANCE[precision]


@pytest.mark.parametrize("bug", ["prompt padding is read", "positions stand still", "cache off by one"])
def test_canary_seeded_bugs_are_seen(make_model, monkeypatch, bug):
    ours, given, sampling = make_model(micro_batch_size=5), prompts(), how()
    if bug == "prompt padding is read":
        mask = cache.causal_mask
        monkeypatch.setattr(cache, "causal_mask", lambda s, q, w: mask(torch.ones_like(s), q, w))
    elif bug == "positions stand still":
        advance = slots.Slots.advance

        def standing(self: Any, *inputs: Any) -> None:
            self.position.fill_(3)
            advance(self, *inputs)

        monkeypatch.setattr(slots.Slots, "advance", standing)
    else:
        update = cache.Cache.update

        def off_by_one(self: Any, keys: Any, values: Any, layer: int) -> Any:
            keys, values = update(self, keys, values, layer)
            return keys, values.roll(1, dims=2)

        monkeypatch.setattr(cache.Cache, "update", off_by_one)
    completions = ours.generate(given, sampling, noise(5, 12), pad_token_id=PAD)
    monkeypatch.undo()
    assert gap(ours, sampling, given, completions) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_is_transformers_generate(make_model, make_config, hot_weights, tied):
    config = make_config(tie_word_embeddings=tied)
    weights, given, stop = hot_weights(config, seed=4), prompts(rows=8), 17
    settings = {name: value for name, value in config.items() if name != "model_type"}
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    theirs.tie_weights()
    expected = theirs.generate(
        torch.tensor(given.tokens, dtype=torch.int64),
        attention_mask=torch.tensor(given.attention, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=stop,
        pad_token_id=PAD,
    ).numpy()[:, given.tokens.shape[1] :]
    sampling = how(temperature=0.0, max_new_tokens=20, stop_token_ids=(stop,))
    ours = make_model(config=config, weights=weights).generate(given, sampling, noise(8, 20), pad_token_id=PAD)
    np.testing.assert_array_equal(ours.tokens[:, : expected.shape[1]], expected)
    assert len(np.unique(ours.tokens)) > 8
    assert ours.margins[ours.mask].min() > 1e-5  # no near-tie could have gone either way


def test_stories_as_published():
    if not STORIES.is_dir():
        pytest.skip("../shared/models/stories260K is not here")
    checkpoint = read_checkpoint(STORIES, precision="float32")
    from diptych.engine import EngineSettings, ModelSpec, load_engine

    ours = load_engine("torch", EngineSettings(precision="float32")).model(
        ModelSpec(config=checkpoint.config, weights=checkpoint.weights, head="lm", optimizer=None, micro_batch_size=1)
    )
    tokens = np.array([[1, 403, 407, 261, 378]], np.int32)  # "Once upon a time"
    given = PromptBatch(tokens=tokens, attention=tokens > 0, positions=np.arange(5, dtype=np.int32)[None])
    sampling = how(temperature=0.0, max_new_tokens=200, stop_token_ids=(2,))
    completions = ours.generate(given, sampling, noise(1, 200), pad_token_id=0)
    theirs: Any = AutoModelForCausalLM.from_pretrained(STORIES)
    ids = torch.tensor(tokens, dtype=torch.int64)
    expected = theirs.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, max_new_tokens=200, pad_token_id=0)
    np.testing.assert_array_equal(completions.tokens[0], expected[0, 5:].numpy())


def test_stop_tokens_end_a_row_and_belong_to_it(make_model):
    ours, given = make_model(), prompts(rows=8)
    free = ours.generate(given, how(), noise(8, 12), pad_token_id=PAD)
    assert free.mask.all()
    assert (free.finish == Finish.LENGTH).all()
    stops = (int(free.tokens[0, 4]), int(free.tokens[1, 0]), int(free.tokens[2, 11]))
    stopped = ours.generate(given, how(stop_token_ids=stops), noise(8, 12), pad_token_id=PAD)
    for row in range(8):
        hits = np.flatnonzero(np.isin(free.tokens[row], stops))
        length = hits[0] + 1 if len(hits) else 12
        np.testing.assert_array_equal(stopped.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_allclose(stopped.logprobs[row, :length], free.logprobs[row, :length], atol=1e-5)
        assert stopped.mask[row].sum() == length
        assert stopped.mask[row, :length].all()
        assert (stopped.tokens[row, length:] == PAD).all()
        assert not stopped.logprobs[row, length:].any()
        assert not stopped.margins[row, length:].any()
        assert stopped.finish[row] == (Finish.STOP if len(hits) else Finish.LENGTH)
    assert {Finish.STOP, Finish.LENGTH} == set(stopped.finish.tolist())


def test_all_rows_stopping_ends_the_loop(make_model, monkeypatch):
    ours, given = make_model(), prompts()
    every = tuple(range(64))
    calls, draw = [], slots.draw
    monkeypatch.setattr(slots, "draw", lambda *inputs: calls.append(1) or draw(*inputs))
    completions = ours.generate(given, how(stop_token_ids=every), noise(5, 12), pad_token_id=PAD)
    assert len(calls) == 1
    assert completions.mask.sum(axis=1).tolist() == [1] * 5
    assert completions.tokens.shape == (5, 12)


def test_a_row_draws_the_same_in_any_batch(make_model):
    ours, given, drawn = make_model(precision="float64"), prompts(), noise(5, 12)
    together = ours.generate(given, how(), drawn, pad_token_id=PAD)
    for row in range(5):
        real = given.attention[row]
        alone = PromptBatch(
            tokens=given.tokens[row : row + 1, real],
            attention=np.ones((1, real.sum()), bool),
            positions=given.positions[row : row + 1, real],
        )
        completions = ours.generate(alone, how(), drawn[row : row + 1], pad_token_id=PAD)
        np.testing.assert_array_equal(completions.tokens[0], together.tokens[row])


@pytest.mark.parametrize("decode_rows", [1, 2, 4, 16])
def test_rows_that_wait_draw_the_same(make_model, monkeypatch, decode_rows):
    """In slots that are refilled, whichever row is admitted to which slot when."""
    ours, given, drawn = make_model(precision="float64"), prompts(rows=11), noise(11, 12)
    sampling = how(stop_token_ids=(3, 7, 20, 33, 41, 50, 60))
    together = ours.generate(given, sampling, drawn, pad_token_id=PAD)
    admitted, admit = [], slots.Slots.admit
    monkeypatch.setattr(
        slots.Slots, "admit", lambda self, p, rows, at, *how: admitted.append((rows, at)) or admit(
            self, p, rows, at, *how))  # fmt: skip
    refilled = ours.generate(given, replace(sampling, decode_rows=decode_rows), drawn, pad_token_id=PAD)
    assert len(admitted[0][0]) == min(decode_rows, 11)
    assert (len(admitted) > 1) == (decode_rows < 11)
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in admitted]), np.arange(11))
    for name in ("tokens", "mask", "finish"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(together, name))
    for name in ("logprobs", "margins"):
        np.testing.assert_allclose(getattr(refilled, name), getattr(together, name), rtol=0, atol=1e-13)


def test_a_free_slot_is_taken_at_once(make_model, monkeypatch):
    """Two slots, a row of 12 tokens, and shorter ones that follow each other beside it."""
    ours, steps, advance = make_model(), [], slots.Slots.advance
    monkeypatch.setattr(slots.Slots, "advance", lambda *inputs: steps.append(1) or advance(*inputs))
    given, drawn = prompts(rows=13), noise(13, 12)
    free = ours.generate(given, how(), drawn, pad_token_id=PAD)
    stops = tuple(set(free.tokens[1:, 0].tolist()) - set(free.tokens[0].tolist()))
    steps.clear()
    done = ours.generate(given, how(stop_token_ids=stops, decode_rows=2), drawn, pad_token_id=PAD)
    after_first = (done.mask.sum(axis=1) - 1).tolist()  # the first token comes with the prefill
    assert after_first[0] == 11
    ends = [0, 0]
    for length in after_first:
        ends = sorted((ends[0] + length, ends[1]))
    pairs = [max(after_first[row : row + 2]) for row in range(0, 13, 2)]
    assert len(steps) == ends[1] < sum(pairs)
    with pytest.raises(ValueError, match="decode_rows must be at least 1"):
        ours.generate(given, how(decode_rows=0), drawn, pad_token_id=PAD)


@pytest.mark.parametrize("bug", ["a new row keeps the old one's padding", "a new row draws with another's uniforms"])
def test_canary_a_slot_that_is_not_wholly_taken_is_seen(make_model, monkeypatch, bug):
    ours, given, drawn = make_model(precision="float64"), prompts(rows=11), noise(11, 12)
    together = ours.generate(given, how(), drawn, pad_token_id=PAD)
    admit = slots.Slots.admit

    def broken(self: Any, prompts: PromptBatch, rows: Any, at: Any, *how: Any) -> None:
        readable = self.readable.clone()
        admit(self, prompts, rows, at, *how)
        if rows[0] > 0 and bug == "a new row keeps the old one's padding":
            self.readable.copy_(readable)
        elif rows[0] > 0:
            self.place[torch.tensor(at)] = 1  # the first row's

    monkeypatch.setattr(slots.Slots, "admit", broken)
    refilled = ours.generate(given, how(decode_rows=3), drawn, pad_token_id=PAD)
    assert (refilled.tokens != together.tokens).any()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sampling_leaves_training_alone(make_model, hot_weights, make_config, stage, monkeypatch):
    """Two updates with rollouts between are two updates without, bit for bit; weights are read, never written."""
    from diptych.engine import Loss, TrainBatch
    from diptych_torch import zero

    monkeypatch.setattr(zero, "PERSISTENCE_THRESHOLD", 0)
    given = prompts(rows=4)
    batch = TokenBatch(tokens=given.tokens, attention=given.attention, positions=given.positions)
    data = TrainBatch(tokens=batch, arrays={}, denominators={"total": 10.0})
    loss = Loss(function=lambda logprobs, *, total: (-logprobs.sum() / total, {}), reads="logprobs")
    results = []
    for with_rollouts in (True, False):
        ours = make_model(optimizer=OptimizerSpec(name="adamw"), stage=stage)
        for _ in range(2):
            ours.update(loss, data, learning_rate=1e-2)
            if with_rollouts:
                before = ours.weights()
                completions = ours.generate(given, how(), noise(4, 12), pad_token_id=PAD)
                ours.gradients(loss, data)
                assert gap(ours, how(), given, completions) < TOLERANCE["float32"]
                for name, value in ours.weights().items():
                    np.testing.assert_array_equal(value, before[name])
        results.append(ours.weights())
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": np.tile([True, True, False], (2, 1))}, "left-padded"),
        ({"attention": np.tile([True, False, True], (2, 1))}, "left-padded"),
        ({"tokens": np.full((2, 3), 64, np.int32)}, "token ids"),
        ({"tokens": np.full((2, 3), -1, np.int32)}, "token ids"),
    ],
)
def test_prompts_that_cannot_be_read(make_model, change, message):
    whole = {
        "tokens": np.ones((2, 3), np.int32),
        "attention": np.ones((2, 3), bool),
        "positions": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
    }
    with pytest.raises(ValueError, match=message):
        make_model().generate(PromptBatch(**{**whole, **change}), how(), noise(2, 12), pad_token_id=PAD)


def test_uniforms_of_another_shape_are_refused(make_model):
    with pytest.raises(ValueError, match="uniforms"):
        make_model().generate(prompts(), how(), noise(5, 11), pad_token_id=PAD)
