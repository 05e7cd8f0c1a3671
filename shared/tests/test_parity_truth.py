"""The truth about a recorded step: formulas, outputs, losses, gradients along a direction, optimizer steps; and who is
wrong. Steps are made by hand and written to a real trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.algorithms.dialects import experience
from diptych.algorithms.optimizers import CLIP_EPS, adamw_step, global_norm, sgd_step
from diptych.engine import OptimizerSpec, OptimizerState, TokenBatch
from diptych.families.family import read_model, tensor_shapes
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter
from diptych.parity.truth.oracle import forward
from diptych.parity.truth.slope import slope
from diptych.parity.truth.truth import Truth, explained, who

CONFIG = {
    "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip
RECIPE = """
name: truth
stages: [rl]
model: {path: nowhere}
data: {prompts: {path: "task:postcards", limit: 20}}
rl:
  reward: {model_path: nowhere}
  kl_coef: 0.1
  missing_eos_penalty: 2.0
  value_coef: 0.5
  learning_rate: 1.0e-3
  optimizer: {betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.1, max_grad_norm: 1.0}
rollout: {temperature: 0.7}
"""
MODEL = read_model(CONFIG)
HEADS = {"policy": "lm", "critic": "scalar"}
SPEC = OptimizerSpec(name="adamw", beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
PROMPT = np.array([[False, True, True], [True, True, True]])
MASK = np.array([[True, True, True, True], [True, True, False, False]])


def draw(name: str, shape, std=0.4) -> np.ndarray:
    return random.normal(1, name, tuple(shape), std=std).astype(np.float32)


def weights_of(role: str, step: int) -> dict[str, np.ndarray]:
    shapes = tensor_shapes(MODEL, HEADS[role])
    return {name: draw(f"{name}", shape) + draw(f"{role}/{step}/{name}", shape, 0.01) * step
            for name, shape in shapes.items()}  # fmt: skip


def rollout() -> TokenBatch:
    real = np.concatenate([PROMPT, MASK], axis=1)
    positions = np.where(real, np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    tokens = random.generator(1, "tokens").integers(0, 20, real.shape).astype(np.int32)
    return TokenBatch(tokens=tokens, attention=real, positions=positions, first=3)


def made_step(step: int) -> Step:
    """What the first update of an iteration leaves, with numbers that only belong together where a test says so."""
    batch = rollout()
    arrays: dict[str, np.ndarray] = {
        "prompts/tokens": batch.tokens[:, :3], "prompts/attention": PROMPT, "used/tokens": batch.tokens[:, 3:],
        "used/mask": MASK, "used/finish": np.array([0, 1], np.int32), "logprobs": -np.abs(draw("l", (2, 4))),
        "ref_logprobs": -np.abs(draw("r", (2, 4))), "values": draw("v", (2, 4)), "scores": draw("s", (2,), 1.0),
    }  # fmt: skip
    metrics = {}
    for role in HEADS:
        start = weights_of(role, step)
        first = {name: draw(f"m/{name}", value.shape, 1e-3) for name, value in start.items()}
        second = {name: draw(f"v/{name}", value.shape, 1e-3) ** 2 for name, value in start.items()}
        gradients = {name: draw(f"g/{name}", value.shape, 1e-2) for name, value in start.items()}
        norm = global_norm(gradients)
        gradients = {name: value * min(1.0, 1.0 / (norm + CLIP_EPS)) for name, value in gradients.items()}
        state = OptimizerState(step=step, first=first, second=second)
        new, after = adamw_step(start, gradients, state, spec=SPEC, learning_rate=1e-3)
        groups = {"start/weights": start, "start/first": first, "start/second": second, "weights": new,
                  "first": after.first, "second": after.second, "gradient": gradients}  # fmt: skip
        for group, tensors in groups.items():
            arrays |= {f"{role}/{group}/{name}": value.astype(np.float32) for name, value in tensors.items()}
        arrays |= {f"{role}/probe/{name}": getattr(batch, name) for name in ("tokens", "attention", "positions")}
        arrays |= {f"{role}/probe/first": np.asarray(3, np.int64)}
        arrays |= {f"{role}/probe/arrays/{name}": value for name, value in probe_arrays(role).items()}
        arrays |= {f"{role}/probe/denominators/num_tokens": np.asarray(6.0)}
        metrics |= {f"{role}/step": float(step), f"{role}/learning_rate": 1e-3, f"{role}/grad_norm": norm}
    return Step(
        stage="rl", step=step, metrics=metrics,
        tensors={name: Recorded(values=np.asarray(value), layout="") for name, value in arrays.items()},
    )  # fmt: skip


def probe_arrays(role: str) -> dict[str, np.ndarray]:
    mask = np.pad(MASK, ((0, 0), (3, 0))).astype(np.float32)
    if role == "policy":
        return {"mask": mask, "advantages": draw("a", mask.shape, 1.0), "old_logprobs": draw("o", mask.shape) - 3}
    states = np.roll(mask, -1, axis=1)
    return {"mask": states, "columns": np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7)),
            "old_values": draw("old", mask.shape), "returns": draw("ret", mask.shape, 1.0)}  # fmt: skip


PROVENANCE: dict[str, Any] = {
    "recipe": RECIPE,
    "models": {role: {"config": CONFIG, "head": head} for role, head in HEADS.items()},
    "tokenizers": {"policy": {"fingerprint": "a"}, "critic": {"fingerprint": "a"}},
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return write(tmp_path_factory.mktemp("truth") / "a", PROVENANCE)


def write(path, provenance: Mapping[str, Any]) -> Trace:
    with TraceWriter(path, producer={"name": "jax", "precision": "float32"}, provenance=provenance) as writer:
        for step in range(2):
            writer.add(made_step(step))
    return Trace(path)


def truth(trace: Trace, step: int = 1, **arrays: np.ndarray) -> Truth:
    read = trace.read("rl", step)
    changed = {name: replace(read.tensors[name], values=value) for name, value in arrays.items()}
    return Truth(trace, replace(read, tensors=read.tensors | changed))


def unpadded(role: str, step: int, row: int, temperature: float = 1.0) -> np.ndarray:
    """The oracle on one row without its padding, at the columns of its response."""
    batch = rollout()
    tokens = batch.tokens[row][batch.attention[row]][None]
    whole = np.ones(tokens.shape, bool)
    alone = TokenBatch(tokens=tokens, attention=whole, positions=np.arange(tokens.shape[1], dtype=np.int32)[None])
    return forward(MODEL, HEADS[role], weights_of(role, step), alone, temperature=temperature).outputs[0]


def test_log_probabilities_values_and_scores_of_the_rollout(trace):
    one = truth(trace)
    for row, (start, new) in enumerate(zip(PROMPT.sum(axis=1), MASK.sum(axis=1), strict=True)):
        policy, critic = unpadded("policy", 1, row, 0.7), unpadded("critic", 1, row)
        close = {"rtol": 0, "atol": 1e-13}
        np.testing.assert_allclose(one.of("logprobs")[row, :new], policy[start:], **close)
        np.testing.assert_allclose(one.of("values")[row, :new], critic[start - 1 : -1], **close)
        # The reference and the reward model are what the first step started from.
        np.testing.assert_allclose(one.of("ref_logprobs")[row, :new], unpadded("policy", 0, row, 0.7)[start:], **close)
        assert one.of("scores")[row] == pytest.approx(unpadded("critic", 0, row)[-1], abs=1e-13)


def test_returns_and_advantages_by_a_loop_of_their_own(trace):
    one = truth(trace)
    step, lam = trace.read("rl", 1), 0.95
    logprobs, reference, values = (step.array(name).astype(float) for name in ("logprobs", "ref_logprobs", "values"))
    scores = step.array("scores").astype(float) - 2.0 * np.array([1.0, 0.0])  # row 0 did not end by itself
    for row, length in enumerate(MASK.sum(axis=1)):
        rewards = -0.1 * (logprobs - reference)[row, :length]
        rewards[-1] += scores[row]
        advantage, following = 0.0, 0.0
        for t in reversed(range(length)):
            advantage = rewards[t] + following - values[row, t] + lam * advantage
            following = values[row, t]
            assert one.of("returns")[row, t] == pytest.approx(advantage + values[row, t], abs=1e-13)
            assert one.of("shaped")[row, t] == pytest.approx(rewards[t], abs=1e-13)
        assert one.of("kl")[row] == pytest.approx((logprobs - reference)[row, :length].sum(), abs=1e-13)
    inside = one.of("advantages")[MASK]
    assert (inside.mean(), inside.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1, abs=1e-6))


def test_outputs_and_losses_of_the_probe_batch(trace):
    one = truth(trace)
    assert one.of("policy/outputs").shape == (2, 7)
    assert not np.allclose(one.of("policy/outputs"), one.of("policy/next_outputs"), atol=1e-6)
    arrays = {name: value.astype(np.float64) for name, value in probe_arrays("critic").items()}
    residual = one.of("critic/outputs") - arrays["returns"]
    clipped = np.clip(one.of("critic/outputs"), arrays["old_values"] - 0.2, arrays["old_values"] + 0.2)
    clipped = clipped - arrays["returns"]
    larger = np.maximum(residual**2, clipped**2) * arrays["mask"]
    assert one.of("critic/loss") == pytest.approx(0.5 * 0.5 * larger.sum() / 6, abs=1e-13)
    assert one.of("critic/loss/loss/value_avg") == pytest.approx(0.5 * larger.sum() / 6, abs=1e-13)
    assert 0 < one.of("policy/loss/policy/clipfrac_avg") < 1


def score_gradient(one: Truth) -> np.ndarray:
    """The gradient of the value loss by the scalar head, by hand: sum over slots of dL/dv times what the head reads."""
    seen = {}
    forward(MODEL, "scalar", weights_of("critic", 1), rollout(), tap=lambda name, x: seen.setdefault(name, x))
    arrays, values = probe_arrays("critic"), one.of("critic/outputs")
    inside = np.abs(values - arrays["old_values"]) < 0.2
    clipped = np.clip(values, arrays["old_values"] - 0.2, arrays["old_values"] + 0.2)
    unclipped_wins = (values - arrays["returns"]) ** 2 > (clipped - arrays["returns"]) ** 2
    slopes = 0.5 * (values - arrays["returns"]) * (inside | unclipped_wins) * arrays["mask"] / 6
    return np.einsum("BT,BTD->D", slopes, seen["final"])[None]


@pytest.mark.parametrize("wrong", ["A", "B"])
def test_the_slope_along_the_difference_says_which_gradient_is_wrong(trace, wrong):
    one, name = truth(trace), "critic/gradient/score.weight"
    right = score_gradient(one).astype(np.float32)
    bad = (right * np.float32(1.001)).astype(np.float32)
    a, b = (bad, right) if wrong == "A" else (right, bad)
    true, at_a, at_b = one.gradient_verdict(name, a, b)
    scale = float(np.linalg.norm(right))
    assert who(abs(true - at_a), abs(true - at_b), 1e-6 * scale) == f"{wrong} is wrong"
    assert abs(true - {"A": at_b, "B": at_a}[wrong]) < 1e-7 * scale
    # As an array: the true component along the difference in place of the side's own.
    array = truth(trace, **{name: a}).of(name, other=b)
    errors = [np.linalg.norm(side - array) for side in (a, b)]
    assert who(*errors, 1e-6 * scale) == f"{wrong} is wrong"


def test_a_slope_is_found_to_many_digits_and_a_kink_is_said():
    found = slope(lambda h: np.exp(3 * h) - np.exp(-3 * h), scale=0.1)
    assert abs(found.value - 3) < 1e-9
    assert found.uncertainty < 1e-8
    kinked = slope(lambda h: abs(h - 1e-7) - abs(-h - 1e-7) + abs(h - 3e-3), scale=0.1)
    assert kinked.uncertainty > 1e-2


def test_what_cannot_be_known_is_none(trace, tmp_path):
    one = truth(trace)
    for name in ("response/logprobs", "policy/first/lm_head.weight", "policy/grad_norm", "rows", "policy/loss/nothing",
                 "policy/gradient/lm_head.weight"):  # fmt: skip
        assert one.of(name) is None, name
    foreign = truth(write(tmp_path / "foreign", {}))
    two = {"policy": {"fingerprint": "a"}, "critic": {"fingerprint": "b"}}
    retokenised = truth(write(tmp_path / "b", PROVENANCE | {"tokenizers": two}))
    assert all(foreign.of(name) is None for name in ("returns", "logprobs", "policy/outputs", "policy/loss"))
    assert foreign.consistency("policy") == {}
    assert retokenised.of("values") is None
    assert retokenised.of("scores") is None
    assert retokenised.of("logprobs") is not None


def test_an_optimizer_step_is_checked_against_its_own_moments(trace):
    for step in (0, 1):
        found = truth(trace, step).consistency("policy")
        assert {name.split("/")[0] for name in found} == {"second", "weights", "grad_norm"}
        assert max(found.values()) < 1e-6, found


TENSOR = "model.layers.0.self_attn.q_proj.weight"
BUGS = {  # what to change of the recorded step, and what sees it
    "eps in the root": lambda arrays, spec: adam(arrays, eps=0.0, inner=1e-8),
    "no decay": lambda arrays, spec: adam(arrays, decay=0.0),
    "no bias correction": lambda arrays, spec: adam(arrays, corrected=False),
    "another learning rate": lambda arrays, spec: adam(arrays, rate=1.01e-3),
}


def adam(arrays, *, eps=1e-8, inner=0.0, decay=0.1, corrected=True, rate=1e-3):
    old, m, v = (arrays[f"policy/{group}/{TENSOR}"].astype(float) for group in ("start/weights", "first", "second"))
    left = (1 - 0.9**2, 1 - 0.999**2) if corrected else (1.0, 1.0)
    step = m / left[0] / (np.sqrt(v / left[1] + inner) + eps) + decay * old
    return (old - rate * step).astype(np.float32)


@pytest.mark.parametrize("bug", BUGS)
def test_canary_another_optimizer_is_seen(trace, bug):
    arrays = {name: one.values for name, one in trace.read("rl", 1).tensors.items()}
    name = f"policy/weights/{TENSOR}"
    found = truth(trace, **{name: BUGS[bug](arrays, SPEC)}).consistency("policy")
    assert found.pop(f"weights/{TENSOR}") > 1e-4
    assert max(found.values()) < 1e-6
    assert truth(trace, **{name: adam(arrays)}).consistency("policy")[f"weights/{TENSOR}"] < 1e-6


def test_canary_a_second_moment_of_another_beta_is_seen(trace):
    arrays = {name: one.values for name, one in trace.read("rl", 1).tensors.items()}
    name = f"policy/second/{TENSOR}"
    old, new = arrays[f"policy/start/second/{TENSOR}"], arrays[name]
    found = truth(trace, **{name: (new + np.float32(0.001) * (new - old)).astype(np.float32)}).consistency("policy")
    assert found[f"second/{TENSOR}"] > 1e-4


def test_sgd_is_checked_too(tmp_path):
    spec = OptimizerSpec(name="sgd", momentum=0.5, weight_decay=0.1)
    recipe = RECIPE.replace("optimizer: {betas: [0.9, 0.999], eps: 1.0e-8,", "optimizer: {name: sgd, momentum: 0.5,")
    trace = write(tmp_path / "sgd", PROVENANCE | {"recipe": recipe})
    start = weights_of("policy", 1)
    gradients = {name: draw(f"g/{name}", value.shape, 1e-2) for name, value in start.items()}
    state = OptimizerState(step=1, first={name: draw(f"m/{name}", value.shape) for name, value in start.items()},
                           second={})  # fmt: skip
    new, after = sgd_step(start, gradients, state, spec=spec, learning_rate=1e-3)
    arrays = {f"policy/weights/{name}": value.astype(np.float32) for name, value in new.items()}
    arrays |= {f"policy/first/{name}": value.astype(np.float32) for name, value in after.first.items()}
    found = truth(trace, **arrays).consistency("policy")
    assert max(found.values()) < 1e-6
    assert set(found) == {f"weights/{name}" for name in start}
    arrays[f"policy/weights/{TENSOR}"] = start[TENSOR]
    assert truth(trace, **arrays).consistency("policy")[f"weights/{TENSOR}"] > 0.5


def test_the_experience_is_in_the_recipes_dialect(tmp_path):
    trace = write(tmp_path / "trl", PROVENANCE | {"recipe": RECIPE.replace("rl:", "rl:\n  dialect: trl")})
    one, other = truth(trace), truth(write(tmp_path / "plain", PROVENANCE))
    assert one.of("value_mask").sum() == other.of("value_mask").sum() + 1
    step = trace.read("rl", 1)
    made = experience(
        "trl", mask=MASK, ended=np.array([False, True]), kl_coef=0.1, kl_estimator="k1", gamma=1.0, lam=0.95,
        whiten_rewards=False, score_clip=None, scores=step.array("scores").astype(float) - np.array([2.0, 0.0]),
        **{name: step.array(name).astype(float) for name in ("logprobs", "ref_logprobs", "values")},
    )  # fmt: skip
    np.testing.assert_array_equal(one.of("returns"), made.returns)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (1e-8, 1e-3, "B is wrong"),
        (1e-3, 1e-8, "A is wrong"),
        (1e-3, 2e-3, "both"),
        (1e-2, 5e-6, "A is wrong"),
        (1e-8, 1e-7, "neither: the limit is too tight"),
        (np.nan, 1e-3, "cannot tell"),
        (np.inf, np.inf, "cannot tell"),
        (1e-8, np.inf, "B is wrong"),
    ],
)
def test_who(a, b, verdict):
    assert who(a, b, 1e-6) == verdict
    assert explained(a, b, 1e-6).startswith(verdict)
