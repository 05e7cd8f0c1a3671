"""The torch sampler against the hinge's NumPy definition, ties and edges included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diptych.algorithms import sampling as oracle
from diptych.engine import Sampling
from diptych_torch import sampling

SETTINGS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 7, 1.0),
        (1.0, 1, 1.0),
        (1.0, 50, 1.0),
        (1.0, 1000, 1.0),
        (1.0, 0, 0.9),
        (1.0, 0, 1e-6),
        (0.7, 10, 0.83),  # not 0.8: eight of ten equals hold just that, up to rounding
        (0.0, 0, 1.0),
        (0.0, 5, 0.5),
    ]
]


def logits(kind: str, rows: int = 200, vocabulary: int = 61) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "smooth":
        return rng.normal(0, 2, (rows, vocabulary))
    if kind == "tied":  # a handful of levels: ties at every boundary of top-k and top-p
        return rng.integers(-2, 3, (rows, vocabulary)).astype(np.float64)
    peaked = rng.normal(0, 1, (rows, vocabulary))  # most probabilities underflow to 0 in float32
    peaked[np.arange(rows), rng.integers(0, vocabulary, rows)] += 200
    return peaked


def uniforms(rows: int) -> np.ndarray:
    drawn = np.random.default_rng(1).integers(0, 2**24, rows) * 2.0**-24
    drawn[:3] = 0, 1 - 2.0**-24, 0.5
    return drawn.astype(np.float32)


def draw(values: np.ndarray, noise: np.ndarray, settings: dict[str, Any], dtype: torch.dtype) -> list[np.ndarray]:
    wanted = Sampling(**settings, max_new_tokens=1, stop_token_ids=())
    drawn = sampling.draw(torch.tensor(values, dtype=dtype), torch.tensor(noise), wanted)
    return [value.numpy() for value in drawn]


@pytest.mark.parametrize("kind", ["smooth", "tied", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_the_definitions_float64(settings, kind):
    values, noise = logits(kind), uniforms(200)
    token, logprob, margin = draw(values, noise, settings, torch.float64)
    expected = oracle.sample(values, noise, **settings)
    clear = expected[2] > 1e-12  # elsewhere the uniform lies on a boundary, to rounding
    clear |= settings["temperature"] == 0
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(token[clear], expected[0][clear])
    np.testing.assert_allclose(logprob[clear], expected[1][clear], rtol=0, atol=1e-12)
    np.testing.assert_allclose(margin[clear], expected[2][clear], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["smooth", "tied", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_the_same_where_rare_cases_are_not_looked_for(monkeypatch, settings, kind):
    """As on an accelerator; and in a vocabulary of more than FEW tokens, where the CPU ranks only those if it may."""
    values, noise = logits(kind, vocabulary=sampling.FEW + 40), uniforms(200)
    looked = draw(values, noise, settings, torch.float64)
    expected = oracle.sample(values, noise, **settings)
    clear = (expected[2] > 1e-12) | (settings["temperature"] == 0)
    np.testing.assert_array_equal(looked[0][clear], expected[0][clear])
    monkeypatch.setattr(sampling, "_has_none", lambda cases: False)
    for found, same in zip(draw(values, noise, settings, torch.float64), looked, strict=True):
        np.testing.assert_array_equal(found, same)


def test_few_ranks_are_enough_for_most_distributions(monkeypatch):
    values, noise = logits("smooth", vocabulary=sampling.FEW + 40), uniforms(200)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 0.7}
    expected = draw(values, noise, settings, torch.float64)
    monkeypatch.setattr(torch.Tensor, "sort", lambda *inputs, **options: 1 / 0)
    for found, same in zip(draw(values, noise, settings, torch.float64), expected, strict=True):
        np.testing.assert_array_equal(found, same)
    monkeypatch.setattr(sampling, "FEW", 2)  # the canary: not enough, and seen
    with pytest.raises(ZeroDivisionError):
        draw(values, noise, settings, torch.float64)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_the_definitions_float32_up_to_near_ties(settings):
    values, noise = logits("smooth").astype(np.float32), uniforms(200)
    token, logprob, margin = draw(values, noise, settings, torch.float32)
    expected = oracle.sample(values, noise, **settings)
    clear = expected[2] > 1e-6
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(token[clear], expected[0][clear])
    np.testing.assert_allclose(logprob[clear], expected[1][clear], rtol=0, atol=2e-6)
    np.testing.assert_allclose(margin[clear], expected[2][clear], rtol=0, atol=2e-6)


def test_tokens_of_probability_zero_are_never_drawn():
    values = np.full((3, 5), -np.inf)
    values[:, [1, 3]] = 0.0
    for noise in (0.0, 0.5, 1 - 2.0**-24):
        token, _, _ = draw(values, np.full(3, noise, np.float32), SETTINGS[0], torch.float32)
        assert set(token) <= {1, 3}
    # A point that rounding puts at the very end takes the last token that can be drawn, not one past it.
    probabilities = torch.tensor([[0.25, 0.75, 0.0]])
    token, probability, margin = sampling._invert(probabilities, torch.tensor([1.0]))
    assert token.tolist() == [1]
    assert probability.tolist() == [0.75]
    assert margin.tolist() == [0.0]


@pytest.mark.parametrize("bug", ["ties by the other end", "top_p keeps one less", "no temperature", "cdf by rank"])
def test_canary_seeded_bugs_are_seen(monkeypatch, bug):
    values, noise = logits("tied"), uniforms(200)
    settings = {"temperature": 0.7, "top_k": 10, "top_p": 0.83}
    kept = sampling._kept
    if bug == "ties by the other end":
        monkeypatch.setattr(sampling, "_kept", lambda z, s: kept(z.flip(-1), s).flip(-1))
    elif bug == "top_p keeps one less":
        monkeypatch.setattr(
            sampling, "_kept", lambda z, s: kept(z, s) & (z > z.where(kept(z, s), 99).amin(-1)[:, None])
        )
    elif bug == "no temperature":
        monkeypatch.setattr(sampling, "tempered", lambda z, temperature: z)
    else:
        invert = sampling._invert

        def by_rank(p: torch.Tensor, u: torch.Tensor) -> Any:
            ordered, order = p.sort(dim=-1, descending=True)
            token, probability, margin = invert(ordered, u)
            return order.gather(1, token[:, None])[:, 0], probability, margin

        monkeypatch.setattr(sampling, "_invert", by_rank)
    token, _, _ = draw(values, noise, settings, torch.float64)
    assert (token != oracle.sample(values, noise, **settings)[0]).any()
