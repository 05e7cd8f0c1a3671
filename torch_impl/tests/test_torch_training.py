"""Updates: the optimizer's formula, micro-batches, ZeRO stages, averages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.algorithms import optimizers as oracle
from diptych.engine import EngineSettings, Loss, OptimizerSpec, TrainBatch, load_engine
from diptych.errors import UserError
from diptych.layout import Layout, Zero
from diptych_torch import optimizer, zero


def objective(logprobs: Any, *, entropy: Any, weight: Any, kind: Any, total: float, coefficient: float) -> Any:
    loss = -(logprobs * weight).sum() / total + coefficient * (logprobs**2 * weight * kind[:, None]).sum() / total
    return loss, {
        "entropy": (entropy * weight).sum() / total,
        "rows": kind.sum() / 1.0,
        "logprob_max": (logprobs * weight).max(),
    }


LOSS = Loss(function=objective, reads="logprobs", options=(("coefficient", 0.01),), temperature=0.9, entropy=True)


@pytest.fixture
def data(make_batch, wanted) -> TrainBatch:
    batch = make_batch(rows=6)
    mask = wanted(batch)
    signs = np.random.default_rng(5).normal(size=mask.shape)
    return TrainBatch(
        tokens=batch,
        arrays={"weight": (mask * signs).astype(np.float32), "kind": np.array([0, 1, 0, 1, 1, 0])},
        denominators={"total": float(mask.sum())},
    )


def assert_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def furthest(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)


SPECS = {
    "adamw": OptimizerSpec(name="adamw", beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=0.3),
    "adamw, defaults": OptimizerSpec(name="adamw"),
    "adamw, unclipped": OptimizerSpec(name="adamw", max_grad_norm=None, ema_decay=0.9),
    "sgd": OptimizerSpec(name="sgd", momentum=0.9, weight_decay=0.1, max_grad_norm=0.3),
    "sgd, plain": OptimizerSpec(name="sgd", max_grad_norm=None),
}


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-13), ("float32", 3e-6)])
@pytest.mark.parametrize("name", SPECS)
def test_updates_are_the_definitions(make_model, data, name, precision, tolerance):
    """50 steps, each on the gradient that the engine itself reports; weights, moments, average and norm."""
    spec = SPECS[name]
    ours = make_model(optimizer=spec, precision=precision)
    weights = {name: value.astype(np.float64) for name, value in ours.weights().items()}
    state, average, clipped = oracle.initial_state(weights, spec=spec), weights, 0
    assert furthest(ours.optimizer_state().first, state.first) == 0
    for step in range(50):
        learning_rate = 1e-3 * (1 + step % 3)
        gradients = ours.gradients(LOSS, data)
        metrics = ours.update(LOSS, data, learning_rate=learning_rate)
        weights, state, norm = oracle.optimizer_step(weights, gradients, state, spec=spec, learning_rate=learning_rate)
        average = oracle.ema_step(average, weights, decay=spec.ema_decay or 0.0)
        clipped += spec.max_grad_norm is not None and norm > spec.max_grad_norm
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-14 if precision == "float64" else 1e-6)
        if step in (0, 49):
            theirs = ours.optimizer_state()
            assert theirs.step == step + 1
            assert furthest(ours.weights(), weights) < tolerance
            assert furthest(theirs.first, state.first) < tolerance
            assert theirs.second.keys() == state.second.keys()
            assert not state.second or furthest(theirs.second, state.second) < tolerance
    assert clipped > 40 or spec.max_grad_norm != 0.3
    if spec.ema_decay is not None:
        assert furthest(ours.ema_weights(), average) < tolerance
        assert furthest(ours.ema_weights(), weights) > 1e-3


@pytest.mark.parametrize("bug", ["eps", "decay on vectors", "no clipping", "beta2", "stale learning rate"])
def test_canary_seeded_bugs_are_seen(make_model, data, monkeypatch, bug):
    spec, build = SPECS["adamw"], optimizer.build
    changes = {"eps": {"eps": 1e-5}, "no clipping": {"max_grad_norm": None}, "beta2": {"beta2": 0.951}}
    if bug == "decay on vectors":

        def decayed(spec: Any, parameters: Any) -> Any:
            built = build(spec, parameters)
            built.param_groups[1]["weight_decay"] = spec.weight_decay
            return built

        monkeypatch.setattr(optimizer, "build", decayed)
    ours = make_model(optimizer=OptimizerSpec(**{**vars(spec), **changes.get(bug, {})}), precision="float64")
    weights = ours.weights()
    state = oracle.initial_state(weights, spec=spec)
    for learning_rate in (1e-3, 2e-3):
        gradients = ours.gradients(LOSS, data)
        ours.update(LOSS, data, learning_rate=1e-3 if bug == "stale learning rate" else learning_rate)
        weights, state, _ = oracle.optimizer_step(weights, gradients, state, spec=spec, learning_rate=learning_rate)
    assert furthest(ours.weights(), weights) > 1e-8


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-13), ("float32", 2e-6)])
def test_micro_batches_change_nothing(make_model, data, precision, tolerance):
    results = []
    for size in (1, 2, 3, 6, 100):
        ours = make_model(optimizer=SPECS["sgd"], precision=precision, micro_batch_size=size)
        scored = ours.logprobs(data.tokens, temperature=1.0)
        metrics = [ours.update(LOSS, data, learning_rate=1e-2) for _ in range(3)]
        results.append(({"scored": scored, **ours.weights()}, metrics))
    for tensors, metrics in results[1:]:
        assert furthest(tensors, results[0][0]) < tolerance
        for one, other in zip(metrics, results[0][1], strict=True):
            assert one == pytest.approx(other, rel=10 * tolerance, abs=tolerance)
    assert results[0][1][0]["rows"] == 3  # summed over micro-batches
    assert results[0][1][0]["logprob_max"] > 0.1  # the largest, not a sum: equal for every size


def test_evaluate_is_the_update_without_the_step(make_model, data):
    ours = make_model(optimizer=SPECS["adamw"])
    before = ours.weights()
    evaluated = ours.evaluate(LOSS, data)
    assert_equal(ours.weights(), before)
    updated = ours.update(LOSS, data, learning_rate=1e-2)
    assert {**evaluated, "grad_norm": updated["grad_norm"]} == pytest.approx(updated, rel=1e-6)
    assert evaluated["loss"] != ours.evaluate(LOSS, data)["loss"]
    frozen = make_model(weights=before)
    assert frozen.evaluate(LOSS, data) == pytest.approx(evaluated, rel=1e-6)


def test_scores_are_trained(make_model, make_config, data):
    """A scalar head, to fixed targets: the loss falls."""

    def squares(scores: Any, *, weight: Any, kind: Any, total: float) -> Any:
        return (((scores - kind[:, None]) ** 2) * weight.abs()).sum() / total, {}

    ours = make_model(config=make_config(tie_word_embeddings=True), head="scalar", optimizer=SPECS["adamw, defaults"])
    loss = Loss(function=squares, reads="scores")
    losses = [ours.update(loss, data, learning_rate=1e-2)["loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert ours.gradients(loss, data)["score.weight"].shape == (1, 32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_zero_stages_train_alike(make_model, make_config, data, monkeypatch, name, tied):
    """Three clipped steps of three micro-batches; losses, norms, weights, averages, moments, gradients, scoring."""
    monkeypatch.setattr(zero, "PERSISTENCE_THRESHOLD", 0)  # stage 3 partitions every tensor, however small
    spec = OptimizerSpec(**{**vars(SPECS[name]), "ema_decay": 0.9, "eps": 1e-4})
    config, results = make_config(tie_word_embeddings=tied), []
    for stage in range(4):
        ours = make_model(config=config, optimizer=spec, stage=stage)
        scored = ours.logprobs(data.tokens, temperature=1.0)
        metrics = [ours.update(LOSS, data, learning_rate=1e-2) for _ in range(3)]
        tensors = {"scored": scored, **ours.weights()}
        tensors |= {f"ema {name}": value for name, value in ours.ema_weights().items()}
        tensors |= {f"first {name}": value for name, value in ours.optimizer_state().first.items()}
        tensors |= {f"second {name}": value for name, value in ours.optimizer_state().second.items()}
        tensors |= {f"gradient {name}": value for name, value in ours.gradients(LOSS, data).items()}
        results.append((tensors, metrics))
    assert all(step["grad_norm"] > 2 * (spec.max_grad_norm or 0) for step in results[0][1])  # clipping is active
    for tensors, metrics in results[1:]:
        assert furthest(tensors, results[0][0]) < 1e-6
        for one, other in zip(metrics, results[0][1], strict=True):
            assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_and_weights_go_into_another_model(make_model, hot_weights, make_config, data, stage, name, monkeypatch):
    """Interchange by Hugging Face names: a copy of weights and state goes on as the original does; so do the stages."""
    monkeypatch.setattr(zero, "PERSISTENCE_THRESHOLD", 0)
    spec = OptimizerSpec(**{**vars(SPECS[name]), "eps": 1e-4})
    original = make_model(optimizer=spec)
    for _ in range(2):
        original.update(LOSS, data, learning_rate=1e-2)
    for updates_before in (0, 1):
        other = make_model(optimizer=spec, stage=stage, weights=hot_weights(make_config(), seed=9))
        for _ in range(updates_before):
            other.update(LOSS, data, learning_rate=1e-2)
        other.load_weights(original.weights())
        other.load_optimizer_state(original.optimizer_state())
        assert_equal(other.weights(), original.weights())
        state, copied = original.optimizer_state(), other.optimizer_state()
        assert copied.step == state.step == 2
        assert_equal(copied.first, state.first)
        assert_equal(copied.second, state.second)
        twin = make_model(optimizer=spec, weights=original.weights())
        twin.load_optimizer_state(state)
        for model in (twin, other):
            model.update(LOSS, data, learning_rate=1e-2)
        assert furthest(other.weights(), twin.weights()) < 1e-6
        assert other.optimizer_state().step == 3
        assert furthest(other.weights(), original.weights()) > 1e-4


def test_tensors_are_copies(make_model, make_config, hot_weights, data):
    given = {name: value.astype(np.float32) for name, value in hot_weights(make_config()).items()}
    kept = {name: value.copy() for name, value in given.items()}
    ours = make_model(optimizer=OptimizerSpec(name="adamw", ema_decay=0.9), weights=given)
    read, averaged = ours.weights(), ours.ema_weights()
    assert_equal(read, kept)
    assert_equal(averaged, kept)
    ours.update(LOSS, data, learning_rate=1e-2)
    state = ours.optimizer_state()
    frozen = {name: value.copy() for name, value in state.first.items()}
    ours.update(LOSS, data, learning_rate=1e-2)
    for tensors in (given, read, averaged):
        assert_equal(tensors, kept)
    assert_equal(state.first, frozen)
    after = ours.weights()
    for tensors in (given, read, averaged, ours.weights(), ours.ema_weights(), ours.optimizer_state().first):
        for value in tensors.values():
            value[:] = 99
    assert_equal(ours.weights(), after)


def test_what_cannot_be_trained_is_refused(make_model, data, make_batch):
    frozen, ours = make_model(), make_model(optimizer=SPECS["adamw"], micro_batch_size=4)
    for call in (
        lambda: frozen.update(LOSS, data, learning_rate=1e-3),
        lambda: frozen.optimizer_state(),
        lambda: frozen.save_checkpoint(Path("nowhere")),
    ):
        with pytest.raises(ValueError, match="frozen"):
            call()
    with pytest.raises(ValueError, match="ema_decay"):
        ours.ema_weights()
    with pytest.raises(ValueError, match="6 rows cannot be cut into micro-batches of 4"):
        ours.update(LOSS, data, learning_rate=1e-3)
    with pytest.raises(ValueError, match="head 'scalar'"):
        ours.scores(data.tokens)
    with pytest.raises(ValueError, match="head 'lm'"):
        make_model(head="scalar").logprobs(data.tokens, temperature=1.0)
    with pytest.raises(ValueError, match="head 'scalar'"):
        frozen.evaluate(Loss(function=objective, reads="scores"), data)
    with pytest.raises(ValueError, match="temperature"):
        frozen.logprobs(data.tokens, temperature=0.0)
    for first in (0, 12):
        with pytest.raises(ValueError, match="first"):
            frozen.logprobs(make_batch(first=first), temperature=1.0)
    short = TrainBatch(tokens=data.tokens, arrays={"weight": np.ones((5, 11))}, denominators={})
    with pytest.raises(ValueError, match="'weight' has 5 rows"):
        frozen.evaluate(LOSS, short)
    named = Loss(function=lambda logprobs, **_: (logprobs.sum(), {"loss": 1.0}), reads="logprobs")
    with pytest.raises(ValueError, match="names are the engine's"):
        frozen.evaluate(named, data)


def test_optimizer_state_of_something_else_is_refused(make_model, make_config, data):
    ours = make_model(optimizer=SPECS["adamw"])
    before = ours.optimizer_state()
    tied = make_model(config=make_config(tie_word_embeddings=True), optimizer=SPECS["adamw"]).optimizer_state()
    narrow = make_model(config=make_config(intermediate_size=40), optimizer=SPECS["adamw"]).optimizer_state()
    sgd = make_model(optimizer=SPECS["sgd"])
    with pytest.raises(UserError, match="lm_head"):
        ours.load_optimizer_state(tied)
    with pytest.raises(UserError, match="has shape"):
        ours.load_optimizer_state(narrow)
    with pytest.raises(UserError, match="second moment"):
        sgd.load_optimizer_state(before)
    with pytest.raises(UserError, match="left over|missing"):
        ours.load_optimizer_state(sgd.optimizer_state())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_non_finite_gradient_shows(make_model, data, stage):
    ours = make_model(optimizer=SPECS["adamw"], stage=stage)
    broken = Loss(function=lambda logprobs, **_: (logprobs.sum() * float("nan"), {}), reads="logprobs")
    metrics = ours.update(broken, data, learning_rate=1e-3)
    assert not np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "float32", "layout": Layout(zero=Zero(stage=4))}, "layout.zero.stage"),
        ({"precision": "bfloat16"}, "bfloat16 needs layout.zero.stage"),
        ({"precision": "float16"}, "precision must be one of float32, float64, bfloat16"),
    ],
)
def test_settings_that_cannot_be_served(settings, message):
    with pytest.raises(UserError, match=message):
        load_engine("torch", EngineSettings(**settings))


def test_the_environment_is_recorded():
    layout = Layout(zero=Zero(stage=2, offload_optimizer=True), zero_critic=Zero(stage=1), zero_reward=Zero(stage=3))
    record = load_engine("torch", EngineSettings(precision="float32", layout=layout)).environment()
    assert record["precision"] == "float32"
    assert record["zero/policy"] == "stage 2, optimizer in host memory"
    assert [record[f"zero/{role}"] for role in ("critic", "reference", "reward")] == ["stage 1", "stage 0", "stage 3"]
    assert record["processes"] == "1"
    assert record["tf32"] == "False"
    assert json.loads(json.dumps(record)) == record
    assert all(record[package] for package in ("torch", "deepspeed", "transformers", "numpy"))
