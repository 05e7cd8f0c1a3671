"""Sampling: draws against the NumPy definition, decoding with a cache against the training forward, a real model."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych.algorithms.sampling import sample
from diptych.engine import EngineSettings, Finish, ModelSpec, PromptBatch, Sampling, TokenBatch
from diptych.errors import UserError
from diptych.families.family import read_model
from diptych_jax import decode, weights
from diptych_jax import sampling as device
from diptych_jax.engine import create

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"temperature": 1.3, "top_k": 7},
    "top-p": {"temperature": 0.9, "top_p": 0.7},
    "top-k-top-p": {"top_k": 20, "top_p": 0.8},
    "tiny-top-p": {"top_p": 1e-6},
    "top-k-1": {"top_k": 1},
    "top-k-beyond": {"top_k": 1000},
    "greedy": {"temperature": 0.0},
}


def _sampling(num_new=10, stop=(), **changes) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": num_new, "stop_token_ids": stop,
                       **changes})  # fmt: skip


def _device_draw(logits, uniforms, dtype, *, temperature, top_k, top_p):
    logits = jnp.asarray(logits, dtype)
    if temperature == 0:
        return jax.jit(device.draw_greedy)(logits)
    draw = jax.jit(device.draw, static_argnames=("top_k", "nucleus"))
    return draw(logits / temperature, jnp.asarray(uniforms), jnp.asarray(top_p, dtype), top_k=top_k, nucleus=top_p < 1)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize(("precision", "vocab"), [("float32", 1), ("float32", 50), ("float64", 1000)])
def test_draws_equal_the_definition(precision, case, vocab):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **SETTINGS[case]}
    draws = np.random.default_rng(vocab)
    # Half of the rows are rounded, so that many logits are equal and order among equals counts.
    logits = draws.normal(0, 2, (64, vocab)).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    uniforms = draws.random(64, dtype=np.float32)
    uniforms[:4] = [0.0, 1 - 2.0**-24, 2.0**-24, 0.5]
    with jax.enable_x64(precision == "float64"):
        tokens, logprobs, margins = (np.asarray(x) for x in _device_draw(logits, uniforms, precision, **settings))
    wanted = sample(logits, uniforms, **settings)
    assert tokens.dtype == np.int32
    noise = {"float32": 1e-5, "float64": 1e-13}[precision]
    same = tokens == wanted[0]
    assert (same | (wanted[2] < noise)).all()
    # A truncation boundary within rounding of top_p moves the whole distribution: none in these draws.
    np.testing.assert_allclose(logprobs[same], wanted[1][same], rtol=0, atol=noise)
    np.testing.assert_allclose(margins[same], wanted[2][same], rtol=0, atol=noise)
    if vocab == 1000 and case in ("plain", "top-p"):
        shifted = sample(logits, np.roll(uniforms, 1), **settings)  # canary: other uniforms draw other tokens
        assert (tokens != shifted[0]).mean() > 0.5


def test_truncated_tokens_are_never_drawn():
    """JAX sums in a tree, so cumulative sums may rise over a dropped token: it must not be drawn for that."""
    draws = np.random.default_rng(0)
    logits = np.tile(draws.normal(0, 1, (1, 900)).astype(np.float32), (4096, 1))
    uniforms = (np.arange(4096) / 4096).astype(np.float32)
    tokens, _, _ = _device_draw(logits, uniforms, "float32", temperature=1.0, top_k=5, top_p=1.0)
    assert set(np.asarray(tokens)) == set(np.argsort(-logits[0])[:5])


def _prompts(ragged_batch, num_rows=4, length=9) -> PromptBatch:
    batch = ragged_batch(num_rows, length)
    return PromptBatch(tokens=batch.tokens, attention=batch.attention, positions=batch.positions)


def _whole(prompts, completions) -> TokenBatch:
    """Prompts and completions side by side, as the trainer sees them."""
    attention = np.concatenate([prompts.attention, completions.mask], axis=1)
    return TokenBatch(
        tokens=np.concatenate([prompts.tokens, completions.tokens], axis=1),
        attention=attention,
        positions=np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32),
        first=prompts.tokens.shape[1],
    )


@pytest.mark.parametrize(
    ("precision", "case"),
    [("float32", "plain"), ("float32", "greedy"), ("float64", "top-k-top-p"), ("float64", "greedy")],
)
def test_decoding_with_a_cache_equals_the_training_forward(precision, case, tiny_model, ragged_batch):
    """Token by token: the sampler's log-probabilities are the trainer's, and its tokens the definition's draws."""
    changes = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} if case == "greedy" else {}
    model = tiny_model(precision, **changes)
    prompts, settings = _prompts(ragged_batch), _sampling(num_new=24, **SETTINGS[case])
    uniforms = np.random.default_rng(1).random((4, 24), dtype=np.float32)
    result = model.generate(prompts, settings, uniforms, pad_token_id=0)
    assert result.mask.all()
    assert (result.finish == Finish.LENGTH).all()
    batch = _whole(prompts, result)
    scored = model.logprobs(batch, temperature=settings.scoring_temperature)
    np.testing.assert_allclose(result.logprobs, scored[:, 9:], rtol=0, atol=TOLERANCE[precision])
    assert np.abs(result.logprobs - np.roll(scored[:, 9:], 1, axis=1)).max() > 0.1  # canary: a column too far
    # The distribution of the last column, from the trainer's forward pass: one token at a time takes its place.
    every = np.arange(64, dtype=np.int32)
    tokens = np.repeat(batch.tokens[:1], 64, axis=0)
    tokens[:, -1] = every
    row = batch.take(np.zeros(64, dtype=int))
    row = TokenBatch(tokens=tokens, attention=row.attention, positions=row.positions, first=row.first)
    logits = model.logprobs(row, temperature=1.0)[:, -1][None]
    token, logprob, margin = sample(
        logits, uniforms[:1, -1], temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    assert result.tokens[0, -1] == token[0]
    np.testing.assert_allclose(result.logprobs[0, -1], logprob[0], atol=TOLERANCE[precision])
    np.testing.assert_allclose(result.margins[0, -1], margin[0], atol=TOLERANCE[precision])


def test_stop_tokens_end_rows(tiny_model, ragged_batch):
    model, prompts = tiny_model(), _prompts(ragged_batch)
    uniforms = np.random.default_rng(1).random((4, 24), dtype=np.float32)
    free = model.generate(prompts, _sampling(num_new=24), uniforms, pad_token_id=0)
    stops = (int(free.tokens[0, 5]), int(free.tokens[1, 9]))
    result = model.generate(prompts, _sampling(num_new=24, stop=stops), uniforms, pad_token_id=63)
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), 24) for row in free.tokens]
    assert ends[0] <= 6
    assert len(set(ends)) > 1
    for row, end in enumerate(ends):
        assert result.mask[row].tolist() == [True] * end + [False] * (24 - end)  # the stop token is inside
        np.testing.assert_array_equal(result.tokens[row, :end], free.tokens[row, :end])
        assert (result.tokens[row, end:] == 63).all()
        assert (result.logprobs[row, end:] == 0).all()
        assert (result.margins[row, end:] == 0).all()
        stopped = end < 24 or free.tokens[row, 23] in stops
        assert result.finish[row] == (Finish.STOP if stopped else Finish.LENGTH)


def test_rows_draw_the_same_in_any_company(tiny_model, ragged_batch):
    """More padding, other rows beside it, longer generation: a row's tokens do not change."""
    model, prompts = tiny_model(), _prompts(ragged_batch)
    uniforms = np.random.default_rng(1).random((4, 24), dtype=np.float32)
    whole = model.generate(prompts, _sampling(num_new=24), uniforms, pad_token_id=0)
    padded = PromptBatch(
        tokens=np.pad(prompts.tokens[2:], ((0, 0), (5, 0)), constant_values=7),
        attention=np.pad(prompts.attention[2:], ((0, 0), (5, 0))),
        positions=np.pad(prompts.positions[2:], ((0, 0), (5, 0))),
    )
    part = model.generate(padded, _sampling(num_new=16), uniforms[2:, :16], pad_token_id=0)
    assert whole.margins.min() > 1e-6
    np.testing.assert_array_equal(part.tokens, whole.tokens[2:, :16])
    np.testing.assert_allclose(part.logprobs, whole.logprobs[2:, :16], atol=2e-5)
    assert (whole.tokens[2:, :16] != whole.tokens[:2, :16]).any()


STOPS = (3, 9, 20, 31, 40)


@pytest.fixture
def packed(tiny_config, hot_weights):
    """A float64 model of one layer, as `decode` takes it: a decoder (changes of its config), or the recurrent one."""
    jax.config.update("jax_enable_x64", True)

    def make(**changes):
        rnn = {"model_type": "rnn", "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 1}
        config = rnn if changes.pop("rnn", False) else tiny_config(num_hidden_layers=1, **changes)
        return weights.pack(read_model(config), "lm", hot_weights(config, "lm"), np.dtype("float64"))

    return make


def _generate(model, prompts, decode_rows=None, num_new=12, stop=STOPS, **changes):
    uniforms = np.random.default_rng(1).random((len(prompts), num_new), dtype=np.float32)
    sampling = _sampling(num_new=num_new, stop=stop, decode_rows=decode_rows, **changes)
    return decode.generate(model, prompts, sampling, uniforms, pad_token_id=0)


def _difference(a, b) -> float:
    """The largest difference of two rollouts' numbers; infinite where tokens or ends differ."""
    for name in ("tokens", "mask", "finish"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            return np.inf
    return max(np.abs(a.logprobs - b.logprobs).max(), np.abs(a.margins - b.margins).max())


@pytest.mark.parametrize(
    ("decode_rows", "changes"),
    [
        ((1, 3), {}), ((2,), {"temperature": 0.0}), ((5,), {"temperature": 0.9, "top_p": 0.8, "top_k": 30}),
        ((2,), {"rnn": True}),
    ],
    ids=["sampled", "greedy", "truncated", "rnn"],
)  # fmt: skip
def test_rows_that_wait_draw_the_same(decode_rows, changes, packed, ragged_batch):
    """Seven ragged prompts in fewer slots: rows take the places of finished ones, and no number changes."""
    model = packed(rnn=changes.pop("rnn", False))
    prompts = _prompts(ragged_batch, num_rows=7)
    at_once = _generate(model, prompts, **changes)
    lengths = at_once.mask.sum(axis=1)
    assert lengths.min() < 6
    assert len(set(lengths)) > 3
    for rows in decode_rows:
        assert _difference(_generate(model, prompts, rows, **changes), at_once) < 1e-13


def test_canary_a_refill_that_keeps_something_of_the_old_row_is_seen(packed, ragged_batch, monkeypatch):
    model, prompts, admitted = packed(), _prompts(ragged_batch, num_rows=7), decode._admitted
    at_once = _generate(model, prompts)
    for name in ("padding_B", "state"):
        function = decode.program.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]  # traced anew
        program = jax.jit(lambda *inputs, settings, run=function: run(*inputs, settings=settings),
                          static_argnames=("settings",))  # fmt: skip
        monkeypatch.setattr(decode, "program", program)

        def keeping(slots, new, put, name=name):
            return admitted(slots, new, put)._replace(**{name: getattr(slots, name)})

        monkeypatch.setattr(decode, "_admitted", keeping)
        assert _difference(_generate(model, prompts, 2), at_once) > 1e-6
        monkeypatch.undo()


def test_refills_compile_once(packed, ragged_batch, count_compilations):
    model, prompts = packed(), _prompts(ragged_batch, num_rows=7)
    at_once = _generate(model, prompts)
    first = _generate(model, prompts, 3)
    with count_compilations() as count:
        assert _difference(_generate(model, prompts, 9), at_once) == 0  # slots for all: the program without refills
        other = PromptBatch(tokens=prompts.tokens[::-1], attention=prompts.attention[::-1],
                            positions=prompts.positions[::-1])  # fmt: skip
        second = _generate(model, other, 3, stop=(1, 2, 4, 5, 6), temperature=0.7)
        assert count() == 0
    assert not np.array_equal(first.mask, second.mask)


def test_a_part_of_the_cache_is_read_where_it_holds_all(packed, ragged_batch, monkeypatch):
    """Steps that choose among prefixes equal steps that read the whole."""
    assert decode.prefixes(64, 128, "tpu") == (128,)
    assert decode.prefixes(64, 1024, "cpu") == (1024,)
    assert decode.prefixes(300, 1022, "tpu") == (511, 767, 1022)
    prompts = _prompts(ragged_batch, num_rows=5)
    model = packed(sliding_window=6, model_type="mistral")
    whole = _generate(model, prompts)
    for ends, same in (((10, 13, 18, 21), True), ((10, 13, 18), False)):  # canary: the last columns are not read
        monkeypatch.setattr(decode, "prefixes", lambda *_, ends=ends: ends)
        difference = _difference(_generate(model, prompts), whole)
        assert difference < 1e-13 if same else difference > 1e-6


def test_settings_compile_nothing(tiny_model, ragged_batch, count_compilations):
    model, prompts = tiny_model(), _prompts(ragged_batch)
    uniforms = np.random.default_rng(1).random((4, 24), dtype=np.float32)
    first = model.generate(prompts, _sampling(num_new=24, stop=(1, 2)), uniforms, pad_token_id=0)
    with count_compilations() as count:
        other = _sampling(num_new=24, temperature=0.5, stop=(3, 4))
        second = model.generate(prompts, other, 1 - uniforms, pad_token_id=5)
        assert count() == 0
    assert (first.tokens != second.tokens).any()
    with count_compilations() as count:
        model.generate(prompts, _sampling(num_new=1), uniforms[:, :1], pad_token_id=0)
        assert count() >= 1  # canary: another program is counted


def test_mistakes_are_errors(tiny_model, ragged_batch):
    model, prompts = tiny_model(), _prompts(ragged_batch)
    uniforms = np.zeros((4, 10), np.float32)
    with pytest.raises(ValueError, match=r"uniforms have shape \(4, 10\), the protocol asks for \(4, 11\)"):
        model.generate(prompts, _sampling(num_new=11), uniforms, pad_token_id=0)
    right = PromptBatch(tokens=prompts.tokens, attention=prompts.attention[:, ::-1], positions=prompts.positions)
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(right, _sampling(), uniforms, pad_token_id=0)
    shifted = PromptBatch(tokens=prompts.tokens, attention=prompts.attention, positions=prompts.positions + 1)
    with pytest.raises(ValueError, match="positions of prompts must count"):
        model.generate(shifted, _sampling(), uniforms, pad_token_id=0)
    with pytest.raises(ValueError, match="decode_rows must be 1 or more"):
        model.generate(prompts, _sampling(decode_rows=0), uniforms, pad_token_id=0)
    with pytest.raises(UserError, match="top_p"):
        model.generate(prompts, _sampling(top_p=0.0), uniforms, pad_token_id=0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompts, _sampling(num_new=0), uniforms[:, :0], pad_token_id=0)


@pytest.mark.skipif(not STORIES.exists(), reason="the folder shared/models/stories260K is not beside the repository")
def test_a_real_model_tells_its_story():
    """stories260K, greedy, 200 tokens: the very tokens of transformers' generate."""
    import torch
    from safetensors.numpy import load_file
    from transformers import LlamaForCausalLM

    config, weights = json.loads((STORIES / "config.json").read_text()), load_file(STORIES / "model.safetensors")
    spec = ModelSpec(config=config, weights=weights, head="lm", optimizer=None, micro_batch_size=1)
    tokens = np.array([[1, 403, 407, 261, 378]], np.int32)
    prompts = PromptBatch(
        tokens=tokens, attention=np.ones_like(tokens, bool), positions=np.arange(5, dtype=np.int32)[None]
    )
    settings = _sampling(num_new=200, temperature=0.0, stop=(2,))
    model = create(EngineSettings(precision="float32")).model(spec)
    result = model.generate(prompts, settings, np.zeros((1, 200), np.float32), pad_token_id=2)

    reference = LlamaForCausalLM.from_pretrained(STORIES)
    ids = torch.from_numpy(tokens.astype(np.int64))
    wanted = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    wanted = wanted[0, 5:].numpy()
    found = result.tokens[0][result.mask[0]]
    np.testing.assert_array_equal(found, wanted)
    assert len(found) == 200
    assert result.margins[0].min() > 1e-5  # no near-tie: equality was no luck
