"""Rollouts by a program against the training forward and against the modules, for every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diptych.engine import ModelSpec, PromptBatch, Sampling
from diptych.parity.tolerances import TOLERANCES
from diptych_torch import cache, decode, linear, program
from diptych_torch.model import Network, build, device_batch
from torch_impl.tests.plain import CASES, hot
from torch_impl.tests.test_torch_decode import whole_rows

pytestmark = pytest.mark.skipif(not linear.HAS_ONEDNN, reason="this build of torch has no oneDNN")
CPU = torch.device("cpu")
LIMIT = TOLERANCES["decode"].at("float32")
OTHERS = {"mixtral": "a mixture of experts", "qwen3_moe": "a mixture of experts", "bloom": "ALiBi", "rnn": "recurrent"}


def network(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Network:
    spec = ModelSpec(config=config, weights=hot(config), head="lm", optimizer=None, micro_batch_size=1)
    return build(spec, dtype, CPU)


def prompts(rows: int = 9, width: int = 6) -> PromptBatch:
    rng = np.random.default_rng(0)
    attention = np.arange(width) >= rng.integers(0, width, rows)[:, None]
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0).astype(np.int32)
    tokens = np.where(attention, rng.integers(0, 40, (rows, width)), 0).astype(np.int32)
    return PromptBatch(tokens=tokens, attention=attention, positions=positions)


def rollout(model: Network, *, width: int = 6, prefill: int | None = None, **changes: Any) -> tuple[Any, str, float]:
    """Completions, what made them, and their log-probabilities' distance from the training forward's."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 9, "stop_token_ids": (3, 7)}
    sampling, given = Sampling(**{**settings, **changes}), prompts(width=width)
    noise = np.random.default_rng(1).random((9, sampling.max_new_tokens), dtype=np.float32)
    decoder = decode.Decoder(model, CPU)
    made = decoder.generate(given, sampling, noise, pad_token_id=0, prefill=prefill)
    with torch.no_grad():
        scored = model(device_batch(whole_rows(given, made), model.config, CPU))[0]
    gap = np.abs(scored.numpy()[:, width:] - made.logprobs)[made.mask].max()
    return made, decoder.describe(), float(gap)


@pytest.mark.parametrize("case", [name for name in CASES if name.split(",")[0] not in OTHERS])
def test_a_program_is_the_training_forward_in_every_family(case, monkeypatch):
    model = network(CASES[case])
    ways: list[dict[str, Any]] = [{}, {"decode_rows": 4}, {"prefill": 2}, {"width": 1}, {"top_k": 5}]
    found = [rollout(model, **changes) for changes in ways]
    for _, how, gap in found:
        assert "by a program" in how
        assert gap < LIMIT
    for made, _, _ in found[1:3]:  # neither slots nor pieces of prompts change a draw
        np.testing.assert_array_equal(made.tokens, found[0][0].tokens)
    monkeypatch.setattr(decode, "obstacle", lambda *_: "for this test")
    for changes, (made, _, _) in zip(ways, found, strict=True):
        modules, how, _ = rollout(model, **changes)
        assert "by transformers' modules (for this test)" in how
        np.testing.assert_array_equal(made.tokens, modules.tokens)
        np.testing.assert_allclose(made.logprobs, modules.logprobs, rtol=0, atol=LIMIT)
        np.testing.assert_allclose(made.margins, modules.margins, rtol=0, atol=LIMIT)


@pytest.mark.parametrize("case", OTHERS)
def test_other_families_say_why_they_run_their_modules(case):
    _, how, gap = rollout(network(CASES[case]))
    assert OTHERS[case] in how
    assert gap < LIMIT


def test_other_types_and_weights_beyond_the_limit_run_their_modules(monkeypatch):
    for dtype in (torch.float64, torch.bfloat16):
        assert f"{dtype} on cpu" in rollout_only(network(CASES["llama"], dtype))
    monkeypatch.setattr(program, "LIMIT", 2**10)
    assert "which would lie there twice" in rollout_only(network(CASES["llama"]))


def rollout_only(model: Network) -> str:
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=2, stop_token_ids=())
    decoder = decode.Decoder(model, CPU)
    decoder.generate(prompts(), sampling, np.zeros((9, 2), np.float32), pad_token_id=0)
    return decoder.describe()


def test_a_program_is_made_anew_for_each_rollout_and_not_kept():
    model = network(CASES["llama"])
    decoder = decode.Decoder(model, CPU)
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=9, stop_token_ids=())

    def made() -> np.ndarray:
        return decoder.generate(prompts(), sampling, np.zeros((9, 9), np.float32), pad_token_id=0).tokens

    before = made()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= -1.5
    assert (made() != before).any()
    assert decoder._slots is not None
    assert decoder._slots.reader is model


@pytest.mark.parametrize("bug", ["order of heads", "gain's offset", "column", "last column"])
def test_canary_seeded_bugs_are_seen(monkeypatch, bug):
    case = "gemma2" if bug == "gain's offset" else "llama"
    if bug == "order of heads":  # of the keys as they are read, not of the queries
        write = cache.Cache.write
        monkeypatch.setattr(cache.Cache, "write", lambda self, rows, layer: write(self, rows.flip(-1), layer))
    elif bug == "gain's offset":
        monkeypatch.setattr(program.math, "sqrt", lambda x: 1.01 * x**0.5)
    elif bug == "column":
        step_to = cache.Cache.step_to
        monkeypatch.setattr(cache.Cache, "step_to", lambda self, at, reach: step_to(self, (at - 1).clamp(0), reach))
    else:
        call = program._Layer.__call__
        monkeypatch.setattr(
            program._Layer, "__call__", lambda self, x, *more: call(self, x.roll(1, 0) if more[3] else x, *more)
        )
    assert rollout(network(CASES[case]))[2] > 10 * LIMIT
