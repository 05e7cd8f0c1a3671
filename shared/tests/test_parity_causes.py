"""Likely causes: every pattern of the table, made by hand, is named; and rounding alone names none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from diptych.parity.comparison.causes import CAUSES, likely_causes
from diptych.parity.comparison.ladder import climb
from diptych.parity.comparison.patterns import Evidence
from diptych.parity.trace import Recorded, Step
from shared.tests.parity_steps import LENGTHS, NEW, ROWS, TENSORS, change, elsewhere, healthy, put

Q = "model.layers.1.self_attn.q_proj.weight"
GRADIENT = f"policy/gradient/{Q}"
LAST = (np.arange(ROWS), np.array(LENGTHS) - 1)
F32 = np.float32


def named(a: Step, b: Step, rung: str, *, most: int = 3) -> list[str]:
    """Keys of the causes of a rung, most telling first."""
    result = next(one for one in climb(a, b, precision="float32") if one.rung.name == rung)
    assert result.status == "red"
    name = next((one.name for one in result.red if one.name in a.tensors and one.name in b.tensors), "")
    return [one.key for one in likely_causes(Evidence(rung=result, a=a, b=b, name=name), most=most)]


def scaled(step: Step, group: str, factor: float) -> Step:
    for name in TENSORS:
        step = change(step, f"policy/{group}/{name}", step.array(f"policy/{group}/{name}") * F32(factor))
    return step


def moved(step: Step, move: Callable[[np.ndarray, np.ndarray], np.ndarray], only=lambda x: True) -> Step:
    """New weights of the policy: move(new, start)."""
    for name in TENSORS:
        new, start = step.array(f"policy/weights/{name}"), step.array(f"policy/start/weights/{name}")
        if only(new):
            step = change(step, f"policy/weights/{name}", move(new, start).astype(F32))
    return step


def at(step: Step, name: str, index, by: float | np.ndarray) -> Step:
    values = step.array(name).copy()
    values[index] += by
    return change(step, name, values)


def numbers(step: Step, **metrics: float) -> Step:
    return replace(step, metrics=step.metrics | {name.replace("__", "/"): value for name, value in metrics.items()})


def padded_on_the_right(step: Step) -> Step:
    mask = step.array("prompts/attention")[:, ::-1].copy()
    return change(change(step, "prompts/attention", mask), "prompts/tokens", np.where(mask, 7, 0).astype(np.int32))


def long_rows(seed: int = 3) -> Step:
    """A step whose responses are long enough for a trend."""
    draws = np.random.default_rng(seed)
    mask = np.ones((ROWS, 12), bool)
    logprobs = -np.abs(draws.standard_normal((ROWS, 12))).astype(F32) - F32(0.1)
    step = healthy()
    rest = {name: one for name, one in step.tensors.items() if name not in ("logprobs", "used/mask", "ref_logprobs")}
    made = {
        "used/mask": Recorded(values=mask, layout="rows new"),
        "logprobs": Recorded(values=logprobs, layout="rows new", mask="used/mask"),
        "advantages": Recorded(values=logprobs, layout="rows new", mask="used/mask"),
    }
    return replace(step, tensors=rest | made)


def trend(name: str, backwards: bool = False) -> tuple[Step, Step]:
    a = long_rows()
    ramp = np.linspace(0, 1e-2, 12, dtype=F32) ** 2
    return a, change(a, name, a.array(name) + (ramp[::-1] if backwards else ramp))


def shifted(name: str) -> tuple[Step, Step]:
    a = long_rows()
    return a, change(a, name, np.roll(a.array(name), 1, axis=1))


A = healthy()
B = elsewhere(A)
NOISE = np.random.default_rng(5)
COUNTED = float(A.array("policy/probe/arrays/mask").mean())
PATTERNS: dict[str, tuple[str, Callable[[], tuple[Step, Step]]]] = {
    "premise": ("tokens", lambda: (A, put(B, f"policy/start/weights/{Q}", (0, 0), 3))),
    "padding side": ("tokens", lambda: (A, padded_on_the_right(B))),
    "data order": ("tokens", lambda: (A, change(B, "rows", A.array("rows")[::-1].copy()))),
    "other data": ("tokens", lambda: (A, put(B, "prompts/tokens", (0, 0), 9))),
    "sampling": ("tokens", lambda: (A, put(B, "response/tokens", (slice(None), 1), 49))),
    "masks": ("tokens", lambda: (A, put(B, "policy_mask", LAST, False))),
    "one column off": ("policy", lambda: shifted("logprobs")),
    "first token": ("policy", lambda: (A, at(B, "logprobs", (slice(None), 0), 0.5))),
    "last token": ("policy", lambda: (A, at(B, "logprobs", LAST, 0.5 + NOISE.random(ROWS).astype(F32)))),
    "left padding": ("policy", lambda: (A, at(B, "logprobs", np.ix_([1, 2], [0, 1, 2]), NOISE.random((2, 3))))),
    "positions": ("policy", lambda: trend("logprobs")),
    "zeros": ("policy", lambda: (A, put(B, "logprobs", (slice(None), [1, 2]), 0.0))),
    "ddof": ("advantages", lambda: (A, change(B, "advantages", A.array("advantages") * F32((17 / 16) ** 0.5)))),
    "cut rows": ("rewards", lambda: (A, at(B, "scores", [0, 3], -1))),
    "constant": ("values", lambda: (A, change(B, "values", A.array("values") + F32(0.25)))),
    "whitening": ("advantages", lambda: (A, change(B, "advantages", A.array("advantages") * F32(1.3) + F32(0.5)))),
    "scale": ("kl", lambda: (A, change(B, "kl", A.array("kl") * F32(0.5)))),
    "discount": ("advantages", lambda: trend("advantages", backwards=True)),
    "terminal": ("returns", lambda: (A, at(B, "returns", LAST, NOISE.random(ROWS)))),
    "one row": ("policy", lambda: (A, at(B, "logprobs", (2, slice(1, 3)), NOISE.random(2)))),
    "everywhere": ("policy", lambda: (A, at(B, "logprobs", ..., NOISE.random((ROWS, NEW)) + 0.1))),
    "denominator": ("loss", lambda: (A, numbers(B, policy__loss=0.1 * COUNTED))),
    "clip": ("loss", lambda: (numbers(A, policy__loss__clipfrac=0.1), numbers(B, policy__loss__clipfrac=0.2))),
    "loss scale": ("loss", lambda: (A, numbers(B, policy__loss=0.03, policy__loss__loss_avg=0.03))),
    "gradient scale": ("gradients", lambda: (A, scaled(B, "gradient", 0.25))),
    "transposed": ("gradients", lambda: (A, change(B, GRADIENT, A.array(GRADIENT).T.copy()))),
    "one-dimensional gradients": ("gradients", lambda: (A, at(B, "policy/gradient/model.norm.weight", [0, 1], 0.5))),
    "attention gradients": (
        "gradients",
        lambda: (A, at(at(B, f"policy/gradient/{Q}", (0, 1), 1), f"policy/gradient/{Q.replace('1', '0')}", (0, 1), 1)),
    ),
    "from a layer on": (
        "gradients",
        lambda: (A, at(at(B, f"policy/gradient/{Q.replace('1', '0')}", (0, 1), 1),
                       "policy/gradient/model.layers.0.mlp.down_proj.weight", (0, 1), 1)),
    ),
    "clipped norm": ("norm", lambda: (numbers(A, policy__grad_norm=3.3), numbers(B, policy__grad_norm=1.0))),
    "norm alone": ("norm", lambda: (A, numbers(B, policy__grad_norm=0.73))),
    "beta2": ("optimizer", lambda: (A, scaled(B, "second", 1.02))),
    "beta1": ("optimizer", lambda: (A, scaled(B, "first", 1.02))),
    "moments' gradient": ("optimizer", lambda: (A, scaled(scaled(B, "second", 1.02), "first", 1.01))),
    "not moved": ("weights", lambda: (A, moved(B, lambda new, start: start))),
    "step size": ("weights", lambda: (A, moved(B, lambda new, start: start + 1.1 * (new - start)))),
    "decay mask": ("weights", lambda: (A, moved(B, lambda new, start: new - 1e-3 * start, lambda x: x.ndim == 1))),
    "decay": ("weights", lambda: (A, moved(B, lambda new, start: new - 1e-3 * start, lambda x: x.ndim > 1))),
    "epsilon": (
        "weights",
        lambda: (A, change(B, f"policy/weights/{Q}", B.array(f"policy/weights/{Q}") + F32(1e-6)
                           / np.sqrt(A.array(f"policy/second/{Q}")) ** 3)),
    ),
    "stale": ("next", lambda: (A, change(B, "policy/next_outputs", A.array("policy/outputs")))),
}  # fmt: skip


@pytest.mark.parametrize("key", PATTERNS)
def test_the_pattern_names_its_cause(key):
    rung, make = PATTERNS[key]
    found = named(*make(), rung)
    assert key in found, found


FIRST = (
    "premise", "padding side", "data order", "sampling", "one column off", "first token", "left padding", "positions",
    "ddof", "cut rows", "constant", "whitening", "scale", "discount", "everywhere", "denominator", "loss scale",
    "gradient scale", "transposed", "clipped norm", "beta1", "beta2", "not moved", "step size", "decay mask", "stale",
)  # fmt: skip


@pytest.mark.parametrize("key", FIRST)
def test_the_telling_ones_come_first(key):
    rung, make = PATTERNS[key]
    assert named(*make(), rung)[0] == key


def test_every_cause_has_a_pattern_here():
    untested = {"embedding gradients"}  # the same rule as attention gradients, for names that these steps do not have
    assert {one.key for one in CAUSES} == PATTERNS.keys() | untested
    assert len({one.key for one in CAUSES}) == len(CAUSES)
    assert all(one.says and one.look and one.rungs for one in CAUSES)


def test_canary_the_same_number_at_one_place_is_no_pattern_of_positions_padding_or_scale():
    found = named(A, at(B, "logprobs", (0, 2), 0.5), "policy", most=10)
    assert not {"positions", "left padding", "scale", "constant", "first token", "everywhere"} & set(found)
