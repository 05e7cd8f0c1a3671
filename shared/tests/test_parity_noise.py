"""The verdict of noise mode: a gap in floors, an uneven budget, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.errors import UserError
from diptych.parity.noise import Noise, as_json, describe, distances, errors_against
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter


def noise(**changes):
    settings = {
        "engines": ("jax", "torch"),
        "precision": "float32",
        "floors": {("jax", "half the micro-batch"): {"policy": 1e-6}, ("torch", "one thread"): {"policy": 2e-6}},
        "gaps": {"policy": 3e-6},
        "budget": {},
    }
    return Noise(**(settings | changes))


@pytest.mark.parametrize(
    ("found", "code", "says"),
    [
        (noise(), 0, "1.5 floors: noise"),
        (noise(gaps={"policy": 6.1e-6}), 1, "BEYOND NOISE"),
        (noise(gaps={"policy": 0.0}), 0, "the same bits"),
        (noise(floors={}), 0, "no floor to measure by"),
        (noise(gaps={}), 1, "largest difference"),
        (noise(precision="bfloat16", budget={"rl: policy/outputs": (1e-3, 1.1e-3)}), 0, "ratio 0.91"),
        (noise(precision="bfloat16", budget={"rl: policy/outputs": (1e-3, 2.1e-3)}), 1, "ratio 0.48"),
    ],
)
def test_a_gap_is_judged_by_the_engines_own_noise(found, code, says):
    assert found.code == code
    assert says in describe(found)
    assert as_json(found)["code"] == code


def trace(directory, values, *, name="jax", precision="float32"):
    mask = np.ones(values.shape, bool)
    with TraceWriter(directory, producer={"name": name, "precision": precision}, provenance={}) as writer:
        writer.add(
            Step(
                stage="rl",
                step=0,
                tensors={
                    "policy/probe/attention": Recorded(values=mask, layout="batch time", phase="given"),
                    "policy/outputs": Recorded(values=values, layout="batch time", mask="policy/probe/attention"),
                },
            )
        )
    return Trace(directory)


def test_distances_and_errors(tmp_path):
    a = trace(tmp_path / "a", np.full((2, 3), -1.0, np.float32))
    b = trace(tmp_path / "b", np.full((2, 3), -1.25, np.float32), name="torch")
    truth = trace(tmp_path / "t", np.full((2, 3), -1.1), precision="float64")
    assert distances(a, b) == {"policy": 0.25}
    assert distances(a, truth)["policy"] == pytest.approx(0.1)
    (pair,) = errors_against(truth, [a, b]).values()
    assert pair == pytest.approx((0.1, 0.15))


@pytest.mark.parametrize("wrong", [np.full((2, 3), np.nan, np.float32), np.zeros((3, 2), np.float32)])
def test_what_cannot_be_compared_is_no_noise(wrong, tmp_path):
    a, b = trace(tmp_path / "a", np.zeros((2, 3), np.float32)), trace(tmp_path / "b", wrong)
    with pytest.raises(UserError, match="policy/outputs"):
        distances(a, b)
