"""Both engines looked into at the same places: every tap's value and gradient, in float64, with hot weights."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.families.family import read_model
from diptych.families.taps import taps
from diptych.parity.tolerances import TOLERANCES
from parity_tests.families import CASES, hot_weights, left_padded, loss_of, train_batch
from parity_tests.family_checks import build, quick_compilation

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_neox", "mixtral", "rnn")


@pytest.fixture(autouse=True)
def compilation():
    with quick_compilation():
        yield


def batch():
    from diptych.engine import TokenBatch

    tokens, real, where = left_padded((20, 13), 20, "probe")
    return train_batch(TokenBatch(tokens=tokens, attention=real, positions=where), "lm")


def relative(x, y):
    apart = float(np.linalg.norm(x - y))
    return apart / float(np.linalg.norm(x)) if apart else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tap_of_both_engines(name):
    case, data = CASES[name], batch()
    held, real = hot_weights(case, "lm", "float64"), data.tokens.attention
    sides = [build(engine, case, held).probe(loss_of("lm"), data, depth="ops") for engine in ("jax", "torch")]
    names = list(taps(read_model(case), "lm", "ops"))
    assert [list(side.taps.values) for side in sides] == [names, names]
    a, b = sides
    for tap in names:
        for x, y in ((a.taps.values, b.taps.values), (a.taps.gradients, b.taps.gradients)):
            assert relative(x[tap][real], y[tap][real]) <= TOLERANCES["gradient_relative_l2"].float64, tap
    # Each fed the other's taps: what is left is each operation's own rounding.
    forced = build("torch", case, held).probe(loss_of("lm"), data, depth="ops", forced=a.taps)
    for tap in names:
        for made, wanted in ((forced.taps.values, a.taps.values), (forced.taps.gradients, a.taps.gradients)):
            assert relative(wanted[tap][real], made[tap][real]) <= TOLERANCES["operation_relative_l2"].float64, tap
