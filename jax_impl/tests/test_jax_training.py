"""An optimizer step against NumPy float64, whatever the micro-batches; metrics, clipping, averages, compile counts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from diptych.algorithms.losses import ppo_policy_loss, sft_loss
from diptych.algorithms.optimizers import ema_step, initial_state, optimizer_step
from diptych.engine import Loss, OptimizerSpec, OptimizerState, TrainBatch
from diptych.errors import UserError

SFT = Loss(function=sft_loss, reads="logprobs")
ADAMW = OptimizerSpec(name="adamw", beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.9)
SGD = OptimizerSpec(name="sgd", momentum=0.8, weight_decay=0.1, max_grad_norm=None)


@pytest.fixture
def sft_batch(ragged_batch):
    def make(num_rows=4, length=12, seed=0):
        tokens = ragged_batch(num_rows, length, seed=seed, first=3)
        mask = tokens.attention & (np.arange(length) >= 7)
        return TrainBatch(tokens=tokens, arrays={"mask": mask}, denominators={"num_tokens": float(mask.sum())})

    return make


def _relative(found, wanted):
    return max(np.linalg.norm(found[n] - wanted[n]) / (np.linalg.norm(wanted[n]) + 1e-30) for n in wanted)


@pytest.mark.parametrize("spec", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_fifty_updates_equal_the_numpy_oracle(precision, spec, tiny_model, sft_batch):
    """The oracle steps on the engine's own gradients: this is the optimizer's test, not the model's."""
    model = tiny_model(precision, optimizer=spec)
    weights = {name: value.astype(np.float64) for name, value in model.weights().items()}
    state, ema = initial_state(weights, spec=spec), weights
    tolerance = {"float32": 1e-6, "float64": 1e-13}[precision]
    for step in range(50):
        batch, learning_rate = sft_batch(seed=step % 3), 1e-3 * (1 + step % 2)
        gradients = model.gradients(SFT, batch)
        metrics = model.update(SFT, batch, learning_rate=learning_rate)
        weights, state, norm = optimizer_step(weights, gradients, state, spec=spec, learning_rate=learning_rate)
        ema = ema_step(ema, weights, decay=0.9)
        assert abs(metrics["grad_norm"] - norm) < tolerance * norm
        if step in (0, 49):
            found = model.weights()
            np.testing.assert_allclose(
                np.concatenate([found[n].ravel() for n in weights]),
                np.concatenate([weights[n].ravel() for n in weights]),
                rtol=0,
                atol={"float32": 1e-7 * (1 + step), "float64": 1e-13}[precision],
            )
            held = model.optimizer_state()
            assert held.step == step + 1
            assert _relative(held.first, state.first) < tolerance
            assert bool(held.second) == (spec.name == "adamw")
            assert not held.second or _relative(held.second, state.second) < tolerance
    if spec.ema_decay is not None:
        assert _relative(model.ema_weights(), ema) < tolerance
        assert _relative(model.ema_weights(), weights) > 1e-4  # canary: the average is not the weights
    if spec.max_grad_norm is not None:
        assert norm > spec.max_grad_norm  # the clip was at work


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.0}, {"eps": 1e-3}, {"beta2": 0.999}, {"beta1": 0.8}, {"max_grad_norm": None}],
    ids=lambda change: next(iter(change)),
)
def test_canary_every_setting_of_adamw_shows(change, tiny_config, hot_weights):
    """Two steps of the oracle with one setting changed are further away than the tolerance above."""
    weights = hot_weights(tiny_config(), "lm")
    results = []
    for spec in (ADAMW, dataclasses.replace(ADAMW, **change)):
        new, state = weights, initial_state(weights, spec=spec)
        for seed in (1, 2):
            draws = np.random.default_rng(seed)
            gradients = {name: draws.normal(0, 0.01 * seed, value.shape) for name, value in weights.items()}
            new, state, _ = optimizer_step(new, gradients, state, spec=spec, learning_rate=1e-3)
        results.append(new)
    assert max(np.abs(results[0][name] - results[1][name]).max() for name in weights) > 10 * 1e-7


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_micro_batches_change_nothing(precision, tiny_model, sft_batch):
    batch = sft_batch(num_rows=6)
    results = []
    for size in (8, 6, 2, 1):
        model = tiny_model(precision, optimizer=SGD, micro_batch_size=size)
        gradients = model.gradients(SFT, batch)
        evaluated = model.evaluate(SFT, batch)
        metrics = model.update(SFT, batch, learning_rate=0.1)
        assert evaluated["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        assert "grad_norm" not in evaluated
        results.append((metrics, gradients, model.weights()))
    tolerance = {"float32": 2e-6, "float64": 1e-13}[precision]
    for metrics, gradients, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=tolerance)
        assert _relative(gradients, results[0][1]) < 10 * tolerance
        assert _relative(weights, results[0][2]) < tolerance
    # Canary: one row's mask less is seen.
    fewer = dataclasses.replace(batch, arrays={"mask": batch.arrays["mask"] & (np.arange(6) < 5)[:, None]})
    assert abs(model.evaluate(SFT, fewer)["loss"] - model.evaluate(SFT, batch)["loss"]) > 1e-3


def _row_metrics(scores, *, weights, attention, num):
    per_row = (scores * attention).sum(axis=1)
    return (per_row * weights).sum() / num, {"sum": weights.sum(), "weight_max": weights.max()}


def test_metrics_are_summed_or_maximal(tiny_model, ragged_batch):
    tokens = ragged_batch(4, 12)
    arrays = {"weights": np.array([1.0, 5.0, -2.0, 3.0]), "attention": tokens.attention}
    batch = TrainBatch(tokens=tokens, arrays=arrays, denominators={"num": 2.0})
    loss = Loss(function=_row_metrics, reads="scores")
    model = tiny_model(head="scalar", optimizer=SGD, micro_batch_size=2)
    wanted = ((model.scores(tokens) * tokens.attention).sum(1) * arrays["weights"]).sum() / 2
    for metrics in (model.evaluate(loss, batch), model.update(loss, batch, learning_rate=0.0)):
        assert metrics["sum"] == 7.0
        assert metrics["weight_max"] == 5.0
        assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)
        assert all(type(value) is float for value in metrics.values())


def test_ppo_gradient_is_of_the_ratio_at_the_temperature(tiny_model, ragged_batch):
    """With old log-probabilities of the same weights and temperature the ratio is exactly 1; at another it is not."""
    tokens = ragged_batch(4, 12, first=5)
    mask = tokens.attention & (np.arange(12) >= 7)
    model = tiny_model(optimizer=ADAMW)
    arrays = {
        "old_logprobs": model.logprobs(tokens, temperature=0.7),
        "advantages": np.random.default_rng(0).normal(0, 1, mask.shape).astype(np.float32),
        "mask": mask,
    }
    batch = TrainBatch(tokens=tokens, arrays=arrays, denominators={"num_tokens": float(mask.sum())})
    deviations = []
    for temperature in (0.7, 1.0):
        loss = Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", 0.2),),
            temperature=temperature,
            entropy=True,
        )
        deviations.append(model.evaluate(loss, batch)["policy/ratio_deviation_max"])
    assert deviations[0] < 2e-6
    assert deviations[1] > 0.1


def test_values_compile_nothing(tiny_model, sft_batch, count_compilations):
    """A program is compiled once for a loss and a shape; denominators, rates, values and other models reuse it."""
    model = tiny_model(optimizer=ADAMW, micro_batch_size=2)
    batch = sft_batch()
    model.update(SFT, batch, learning_rate=1e-3)
    model.evaluate(SFT, batch)
    twin = tiny_model(optimizer=ADAMW, micro_batch_size=2)
    other = dataclasses.replace(sft_batch(seed=1), denominators={"num_tokens": 17.0})
    with count_compilations() as count:
        model.update(SFT, other, learning_rate=1e-4)
        model.evaluate(SFT, other)
        model.load_weights(model.weights())
        model.load_optimizer_state(model.optimizer_state())
        model.update(Loss(function=sft_loss, reads="logprobs"), other, learning_rate=1e-4)
        twin.update(SFT, other, learning_rate=1e-4)
        assert count() == 0
    with count_compilations() as count:
        model.update(dataclasses.replace(SFT, temperature=0.5), other, learning_rate=1e-4)
        assert count() == 1  # canary: another loss is counted


def test_optimizer_state_goes_out_and_in(tiny_model, sft_batch):
    """Weights and state moved by Hugging Face names to another model: both go on alike, to the last bit."""
    here, there = (tiny_model(optimizer=ADAMW) for _ in range(2))
    for seed in range(3):
        here.update(SFT, sft_batch(seed=seed), learning_rate=1e-3)
    state = here.optimizer_state()
    there.load_weights(here.weights())
    fresh = there.optimizer_state()
    there.load_optimizer_state(state)
    assert there.optimizer_state().step == 3
    assert fresh.step == 0
    for model in (here, there):
        model.update(SFT, sft_batch(seed=3), learning_rate=1e-3)
    _assert_equal(here.weights(), there.weights())
    there.load_optimizer_state(fresh)  # canary: without the moments the next step differs
    for model in (here, there):
        model.update(SFT, sft_batch(seed=4), learning_rate=1e-3)
    assert _relative(here.weights(), there.weights()) > 1e-5


def test_wrong_optimizer_states_are_named(tiny_model):
    adamw, sgd = tiny_model(optimizer=ADAMW), tiny_model(optimizer=SGD)
    with pytest.raises(UserError, match="SGD has none"):
        sgd.load_optimizer_state(adamw.optimizer_state())
    with pytest.raises(UserError, match="second moments .* missing"):
        adamw.load_optimizer_state(sgd.optimizer_state())
    first = adamw.optimizer_state().first | {"model.norm.weight": np.zeros(3)}
    with pytest.raises(UserError, match="first moments: model.norm.weight has shape"):
        adamw.load_optimizer_state(OptimizerState(step=1, first=first, second=adamw.optimizer_state().second))


def test_float32_is_float32_whatever_x64_says(tiny_model, sft_batch):
    """A float64 engine switches x64 on for the process; a float32 engine goes on with the same bits."""
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            model = tiny_model(optimizer=ADAMW, micro_batch_size=2)
            metrics = [model.update(SFT, sft_batch(seed=seed), learning_rate=1e-3) for seed in range(3)]
            results.append((metrics, model.weights(), model.ema_weights()))
            assert all(value.dtype == np.float32 for value in model.weights().values())
    assert results[0][0] == results[1][0]
    _assert_equal(results[0][1], results[1][1])
    _assert_equal(results[0][2], results[1][2])


def _named_loss(logprobs):
    return logprobs.sum(), {"grad_norm": logprobs.sum()}


def test_mistakes_are_errors(tiny_model, sft_batch):
    model = tiny_model(optimizer=ADAMW, micro_batch_size=4)
    with pytest.raises(ValueError, match="6 rows does not divide into micro-batches of 4"):
        model.update(SFT, sft_batch(num_rows=6), learning_rate=1e-3)
    batch = sft_batch()
    with pytest.raises(ValueError, match="an array of the loss has 3 rows, the tokens have 4"):
        model.update(SFT, dataclasses.replace(batch, arrays={"mask": batch.arrays["mask"][:3]}), learning_rate=1e-3)
    with pytest.raises(ValueError, match="grad_norm"):
        bare = dataclasses.replace(batch, arrays={}, denominators={})
        model.update(Loss(function=_named_loss, reads="logprobs"), bare, learning_rate=1e-3)
    with pytest.raises(ValueError, match="share a name"):
        model.update(SFT, dataclasses.replace(batch, denominators={"mask": 1.0}), learning_rate=1e-3)
    with pytest.raises(ValueError, match="head='scalar'"):
        model.update(Loss(function=sft_loss, reads="scores"), batch, learning_rate=1e-3)
    model.update(SFT, batch, learning_rate=1e-3)  # no mistake has spoilt the model
    frozen = tiny_model()
    for call in (lambda: frozen.update(SFT, batch, learning_rate=1e-3), frozen.optimizer_state):
        with pytest.raises(ValueError, match="frozen"):
            call()
    with pytest.raises(ValueError, match="ema_decay"):
        tiny_model(optimizer=SGD).ema_weights()


def _assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
