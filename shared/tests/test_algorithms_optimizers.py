"""Schedules by hand; optimizer oracles by hand and against the frameworks' own AdamW and SGD in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest

from diptych.algorithms.optimizers import adamw_step, clip, ema_step, global_norm, initial_state, optimizer_step
from diptych.algorithms.schedules import learning_rate
from diptych.engine import OptimizerSpec
from diptych.errors import UserError

ADAMW = OptimizerSpec(name="adamw", beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
SGD = OptimizerSpec(name="sgd", momentum=0.9, weight_decay=0.1, max_grad_norm=0.5)

# --- schedules -------------------------------------------------------------------------------------------------------

COURSES = {
    ("constant", 0): [1, 1, 1, 1],
    ("constant", 2): [0.5, 1, 1, 1],
    ("linear", 0): [1, 0.75, 0.5, 0.25],
    ("linear", 2): [0.5, 1, 1, 0.5],
    ("linear", 4): [0.25, 0.5, 0.75, 1],
    ("cosine", 0): [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
    ("cosine", 2): [0.5, 1, 1, 0.5],
}


@pytest.mark.parametrize(("schedule", "warmup_steps"), COURSES)
def test_schedules(schedule, warmup_steps):
    course = [learning_rate(s, peak=3.0, num_steps=4, schedule=schedule, warmup_steps=warmup_steps) for s in range(4)]
    assert course == pytest.approx([3.0 * part for part in COURSES[schedule, warmup_steps]], abs=1e-15)


def test_canary_schedule_off_by_one():
    late = [learning_rate(max(s - 1, 0), peak=1.0, num_steps=4, schedule="linear", warmup_steps=0) for s in range(4)]
    assert late != pytest.approx(COURSES["linear", 0])


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"schedule": "cosin"}, UserError, "optimizer.schedule"),
        ({"warmup_steps": 5}, UserError, "optimizer.warmup_steps"),
        ({"warmup_steps": -1}, UserError, "optimizer.warmup_steps"),
        ({"step": 4}, ValueError, "step must lie"),
        ({"step": -1}, ValueError, "step must lie"),
    ],
)
def test_bad_schedule(changes, error, text):
    arguments = {"step": 0, "peak": 1.0, "num_steps": 4, "schedule": "linear", "warmup_steps": 0, **changes}
    with pytest.raises(error, match=text):
        learning_rate(arguments.pop("step"), **arguments)


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_adamw_first_step_by_hand():
    """t = 1: the bias-corrected moments are g and g^2, so p -= lr (g / (|g| + eps) + wd p)."""
    weights, gradients = {"w": np.array([[2.0]]), "gain": np.array([2.0])}, {"w": np.array([[0.5]]), "gain": [-0.5]}
    gradients = {name: np.asarray(g) for name, g in gradients.items()}
    new, state = adamw_step(weights, gradients, initial_state(weights, spec=ADAMW), spec=ADAMW, learning_rate=0.01)
    assert new["w"].item() == pytest.approx(2 - 0.01 * (0.5 / 0.501 + 0.1 * 2), abs=1e-15)
    assert new["gain"].item() == pytest.approx(2 + 0.01 * 0.5 / 0.501, abs=1e-15)  # no decay on a vector
    assert state.step == 1
    assert state.first["w"].item() == pytest.approx(0.1, abs=1e-15)
    assert state.second["w"].item() == pytest.approx(0.0125, abs=1e-15)
    assert weights["w"].item() == 2.0  # never in place


def test_clip():
    gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert global_norm(gradients) == 5.0
    clipped, norm = clip(gradients, max_grad_norm=0.5)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], [3.0 * 0.5 / (5 + 1e-6), 0], rtol=1e-15)
    np.testing.assert_array_equal(clip(gradients, max_grad_norm=6.0)[0]["a"], [3.0, 0.0])
    np.testing.assert_array_equal(clip(gradients, max_grad_norm=None)[0]["a"], [3.0, 0.0])
    zeros, norm = clip({"a": np.zeros(3)}, max_grad_norm=1.0)
    assert norm == 0
    assert not zeros["a"].any()


def problem():
    rng = np.random.default_rng(0)
    weights = {"matrix": rng.standard_normal((3, 4)), "gain": rng.standard_normal(4)}
    steps = [{name: rng.standard_normal(p.shape) for name, p in weights.items()} for _ in range(20)]
    return weights, steps, [0.01 * (1 + i % 3) for i in range(20)]


def ours(spec):
    weights, steps, rates = problem()
    state = initial_state(weights, spec=spec)
    for gradients, rate in zip(steps, rates, strict=True):
        weights, state, _ = optimizer_step(weights, gradients, state, spec=spec, learning_rate=rate)
    assert state.step == 20
    return weights, state


def with_torch(spec):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diptych[torch]'")
    weights, steps, rates = problem()
    parameters = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in weights.items()}
    groups = [
        {"params": [parameters["matrix"]], "weight_decay": spec.weight_decay},
        {"params": [parameters["gain"]], "weight_decay": 0.0},
    ]
    if spec.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(spec.beta1, spec.beta2), eps=spec.eps)
    else:
        # torch's SGD couples weight decay into the momentum: decoupled here by hand, before the step.
        optimizer = torch.optim.SGD(
            [{**group, "weight_decay": 0.0} for group in groups], lr=1.0, momentum=spec.momentum
        )
    for gradients, rate in zip(steps, rates, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(parameters.values(), spec.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if spec.name == "sgd":
            with torch.no_grad():
                parameters["matrix"] *= 1 - rate * spec.weight_decay
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def with_optax(spec):
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'diptych[jax]'")
    optax = pytest.importorskip("optax", reason="optax is not installed: pip install 'diptych[jax]'")
    weights, steps, rates = problem()
    with jax.enable_x64(True):
        weights = {name: jax.numpy.asarray(p) for name, p in weights.items()}
        if spec.name == "adamw":
            scale = optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2, eps=spec.eps, eps_root=0.0)
        else:
            scale = optax.trace(decay=spec.momentum, nesterov=False)
        decay = optax.add_decayed_weights(spec.weight_decay, mask={"matrix": True, "gain": False})
        transform = optax.chain(scale, decay)
        state = transform.init(weights)
        for gradients, rate in zip(steps, rates, strict=True):
            clipped, _ = clip(gradients, max_grad_norm=spec.max_grad_norm)
            updates, state = transform.update({n: jax.numpy.asarray(g) for n, g in clipped.items()}, state, weights)
            weights = {name: p - rate * updates[name] for name, p in weights.items()}
        return {name: np.asarray(p) for name, p in weights.items()}


def check_optimizer(spec, framework, oracle_spec=None):
    theirs = {"torch": with_torch, "optax": with_optax}[framework](spec)
    mine, _ = ours(oracle_spec or spec)
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-13, strict=True)


@pytest.mark.parametrize("framework", ["torch", "optax"])
@pytest.mark.parametrize("spec", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_optimizers(spec, framework):
    check_optimizer(spec, framework)


@pytest.mark.parametrize(
    "changes",
    [{"eps": 1.1e-3}, {"beta2": 0.951}, {"weight_decay": 0.11}, {"max_grad_norm": 0.5 * (1 + 1e-6)}, {"beta1": 0.81}],
)
def test_canary_adamw(changes):
    with pytest.raises(AssertionError):
        check_optimizer(ADAMW, "torch", replace(ADAMW, **changes))


def test_canary_sgd():
    with pytest.raises(AssertionError):
        check_optimizer(SGD, "torch", replace(SGD, momentum=0.91))


def test_sgd_has_no_second_moment():
    assert ours(SGD)[1].second == {}


def test_ema():
    average = {"w": np.array([1.0])}
    for _ in range(3):
        average = ema_step(average, {"w": np.array([2.0])}, decay=0.5)
    assert average["w"].item() == 1.875
