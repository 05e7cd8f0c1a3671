"""Every loss against a plain-Python oracle, in three namespaces, with gradients, micro-batches and seeded bugs.

Truth is a loop over scalars (`ORACLES`), written from the formula and sharing no code with the package.
"""

import math

import numpy as np
import pytest
from array_api_compat import array_namespace
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from diptych.algorithms import losses
from diptych.algorithms.importance import importance_metrics, importance_weights

FRAMEWORKS = ("numpy", "jax", "torch")
VALUE_TOLERANCE = {np.float64: 1e-12, np.float32: 1e-6}  # absolute and relative
GRADIENT_TOLERANCE = {np.float64: 1e-12, np.float32: 1e-6}


# --- one case per loss: outputs, arrays, options ---------------------------------------------------------------------


def ragged(rng, rows, time):
    """A 0/1 mask of a run of columns in each row, of different starts and lengths; float as often as bool."""
    start = rng.integers(0, 3, rows)
    length = rng.integers(1, time - 3, rows)
    columns = np.arange(time)
    return (columns >= start[:, None]) & (columns < (start + length)[:, None])


def make_case(name, dtype=np.float64, rows=6, time=9):
    """(function, outputs, arrays, options, denominator name). Ratios and values lie on both sides of the clips."""
    rng = np.random.default_rng(7)

    def normal(scale=1.0):
        return (scale * rng.standard_normal((rows, time))).astype(dtype)

    mask = ragged(rng, rows, time)
    if name == "sft":
        return losses.sft_loss, normal() - 2, {"mask": mask}, {}, "num_tokens"
    if name.startswith("policy"):
        logprobs = normal(0.5) - 2
        old = logprobs + normal(0.3)
        old[1, 3:6] = logprobs[1, 3:6]  # ratio exactly 1
        mask[1, 3:6] = True
        arrays = {"entropy": abs(normal()), "old_logprobs": old, "advantages": normal(), "mask": mask.astype(dtype)}
        if name == "policy, weighted":  # of truncated importance sampling; nothing is said about slots outside the mask
            weights = importance_weights(logprobs, logprobs - normal(), np.ones_like(mask), cap=1.5)
            arrays["weights"] = np.where(mask, weights, np.nan).astype(dtype)
        return losses.ppo_policy_loss, logprobs, arrays, {"clip_range": 0.2}, "num_tokens"
    if name == "value":
        # The critic reads longer rows than the policy; states share columns (gradients add up), and some have none.
        columns = np.sort(rng.integers(0, 6, (rows, time)), axis=1)
        scores = np.concatenate([normal(), normal()], axis=1)
        at = np.take_along_axis(scores, columns, axis=1)
        old = at + normal(0.3)
        arrays = {"columns": columns, "old_values": old, "returns": old + normal(), "mask": mask}
        options = {"value_clip_range": 0.2, "value_coef": 0.1}
        return losses.ppo_value_loss, scores, arrays, options, "num_tokens"
    end = np.zeros((rows, time), dtype)
    end[np.arange(rows), rng.integers(4, time, rows)] = 1
    scores = normal(2.0)
    if name == "pairwise":
        return losses.pairwise_reward_loss, scores, {"end_mask": end}, {"center_coef": 0.01}, "num_pairs"
    span = np.repeat(ragged(rng, rows // 2, time), 2, axis=0)
    arrays = {"end_mask": end, "span_mask": span}
    return losses.dschat_reward_loss, scores, arrays, {"center_coef": 0.03}, "num_pairs"


CASES = ("sft", "policy", "policy, weighted", "value", "pairwise", "dschat")


def denominator(name, arrays):
    """Counted as the host does it: from the masks."""
    return float(np.asarray(arrays["mask"]).sum()) if "mask" in arrays else float(arrays["end_mask"].any(1).sum() / 2)


# --- the scalar oracle -----------------------------------------------------------------------------------------------


def sft_oracle(x, *, mask, num_tokens):
    total = sum(-x[b][t] / num_tokens for b, t in slots(mask))
    return total, {"loss/nll": total}


def policy_oracle(x, *, entropy, old_logprobs, advantages, mask, clip_range, num_tokens, weights=None):
    keys = ("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/clamped_avg", "policy/entropy_avg")
    out = dict.fromkeys((*keys, "val/ratio", "val/ratio_excess_square", "policy/ratio_deviation_max"), 0.0)
    for b, t in slots(mask):
        log_ratio = x[b][t] - old_logprobs[b][t]
        ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
        advantage = advantages[b][t]
        first, second = -advantage * ratio, -advantage * min(max(ratio, 1 - clip_range), 1 + clip_range)
        weight = 1 if weights is None else weights[b][t]
        out["loss/policy_avg"] += weight * max(first, second) / num_tokens
        out["policy/approxkl_avg"] += 0.5 * log_ratio**2 / num_tokens
        out["policy/clipfrac_avg"] += (second > first) / num_tokens
        out["policy/clamped_avg"] += (abs(log_ratio) > 20) / num_tokens
        out["policy/entropy_avg"] += entropy[b][t] / num_tokens
        out["val/ratio"] += ratio / num_tokens
        out["val/ratio_excess_square"] += (ratio - 1) ** 2 / num_tokens
        out["policy/ratio_deviation_max"] = max(out["policy/ratio_deviation_max"], abs(ratio - 1))
    return out["loss/policy_avg"], out


def value_oracle(x, *, columns, old_values, returns, mask, value_clip_range, value_coef, num_tokens):
    loss = clipped = 0.0
    for b, t in slots(mask):
        v, old, target = x[b][int(columns[b][t])], old_values[b][t], returns[b][t]
        limited = min(max(v, old - value_clip_range), old + value_clip_range)
        loss += 0.5 * max((v - target) ** 2, (limited - target) ** 2) / num_tokens
        clipped += ((limited - target) ** 2 > (v - target) ** 2) / num_tokens
    return value_coef * loss, {"loss/value_avg": loss, "val/clipfrac_avg": clipped}


def pairwise_oracle(x, *, end_mask, num_pairs, center_coef, span_mask=None):
    out = dict.fromkeys(("reward/accuracy", "reward/margin", "reward/chosen", "reward/rejected"), 0.0)
    loss = 0.0
    for b in range(0, len(x), 2):
        ends = [[t for t in range(len(x[0])) if end_mask[row][t]] for row in (b, b + 1)]
        if not all(ends):
            continue
        chosen, rejected = x[b][ends[0][0]], x[b + 1][ends[1][0]]
        margins = [chosen - rejected]
        if span_mask is not None:
            margins = [x[b][t] - x[b + 1][t] for t in range(len(x[0])) if span_mask[b][t]]
        loss += sum(math.log1p(math.exp(-m)) for m in margins) / len(margins) / num_pairs
        loss += center_coef * (chosen + rejected) ** 2 / num_pairs
        out["reward/accuracy"] += (chosen > rejected) / num_pairs
        out["reward/margin"] += (chosen - rejected) / num_pairs
        out["reward/chosen"] += chosen / num_pairs
        out["reward/rejected"] += rejected / num_pairs
    return loss, out


def slots(mask):
    return [(b, t) for b in range(len(mask)) for t in range(len(mask[0])) if mask[b][t]]


ORACLES = {
    "sft": sft_oracle,
    "policy": policy_oracle,
    "policy, weighted": policy_oracle,
    "value": value_oracle,
    "pairwise": pairwise_oracle,
    "dschat": pairwise_oracle,
}


# --- running a loss in a framework -----------------------------------------------------------------------------------


def evaluate(framework, function, outputs, arrays, scalars):
    """(loss, metrics, gradient by `outputs`) as NumPy; the gradient is None for NumPy. JAX runs under jit."""
    if framework == "numpy":
        loss, metrics = function(outputs, **arrays, **scalars)
        return np.asarray(loss), {key: np.asarray(value) for key, value in metrics.items()}, None
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diptych[torch]'")
        leaf = torch.tensor(outputs, requires_grad=True)
        loss, metrics = function(leaf, **{key: torch.tensor(value) for key, value in arrays.items()}, **scalars)
        loss.backward()
        return (
            loss.detach().numpy(),
            {key: value.detach().numpy() for key, value in metrics.items()},
            leaf.grad.numpy(),
        )
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'diptych[jax]'")
    with jax.enable_x64(outputs.dtype == np.float64), jax.numpy_dtype_promotion("strict"):
        step = jax.jit(jax.value_and_grad(lambda x, a: function(x, **a, **scalars), has_aux=True))
        (loss, metrics), gradient = step(
            jax.numpy.asarray(outputs), {key: jax.numpy.asarray(value) for key, value in arrays.items()}
        )
        return (
            np.asarray(loss),
            {key: np.asarray(value) for key, value in metrics.items()},
            np.asarray(gradient),
        )


def assert_close(actual, expected, tolerance, what=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    assert (np.abs(actual - expected) <= tolerance * (1 + np.abs(expected))).all(), (what, actual, expected)


def assert_metrics(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_close(actual[key], expected[key], tolerance, key)


def check_values(name, framework, dtype, function=None, options=None):
    published, outputs, arrays, case_options, count = make_case(name, dtype)
    scalars = {count: denominator(name, arrays)}
    loss, metrics, gradient = evaluate(
        framework, function or published, outputs, arrays, {**case_options, **scalars, **(options or {})}
    )
    expected, expected_metrics = ORACLES[name](
        outputs.astype(np.float64).tolist(),
        **{key: value.astype(np.float64).tolist() for key, value in arrays.items()},
        **case_options,
        **scalars,
    )
    assert loss.dtype == dtype
    assert all(value.dtype == dtype and value.shape == () for value in metrics.values())
    assert gradient is None or gradient.dtype == dtype
    assert_close(loss, expected, VALUE_TOLERANCE[dtype], "loss")
    assert_metrics(metrics, expected_metrics, VALUE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_values(name, framework, dtype):
    check_values(name, framework, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_between_frameworks(name, dtype):
    function, outputs, arrays, options, count = make_case(name, dtype)
    scalars = {**options, count: denominator(name, arrays)}
    gradients = [evaluate(framework, function, outputs, arrays, scalars)[2] for framework in ("jax", "torch")]
    assert np.abs(gradients[0]).max() > 1e-3  # there is something to compare
    assert_close(gradients[0], gradients[1], GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_derivative(name):
    """Against central differences of the scalar oracle, in float64."""
    function, outputs, arrays, options, count = make_case(name)
    scalars = {**options, count: denominator(name, arrays)}
    _, _, gradient = evaluate("torch", function, outputs, arrays, scalars)
    step = 1e-6
    lists = {key: value.tolist() for key, value in arrays.items()}
    for b, t in np.ndindex(outputs.shape):
        low, high = outputs.copy(), outputs.copy()
        low[b, t] -= step
        high[b, t] += step
        ends = [ORACLES[name](x.tolist(), **lists, **scalars)[0] for x in (low, high)]
        assert_close(gradient[b, t], (ends[1] - ends[0]) / (2 * step), 1e-7, (b, t))


# --- canaries: each seeded bug must turn `check_values` red ----------------------------------------------------------


def mean_over_everything(logprobs, *, mask, num_tokens):
    loss = -logprobs.mean()
    return loss, {"loss/nll": loss}


def weights_forgotten(logprobs, *, weights, **arrays):
    return losses.ppo_policy_loss(logprobs, **arrays)


def weights_in_the_denominator(logprobs, *, weights, mask, num_tokens, **arrays):
    total = np.nansum(np.where(mask, weights, 0))
    return losses.ppo_policy_loss(logprobs, weights=weights, mask=mask, num_tokens=total, **arrays)


def no_value_clip(scores, *, value_clip_range, **arrays):
    return losses.ppo_value_loss(scores, value_clip_range=1e9, **arrays)


def column_off_by_one(scores, *, columns, **arrays):
    return losses.ppo_value_loss(scores, columns=columns + 1, **arrays)


def own_columns(scores, *, columns, **arrays):
    return losses.ppo_value_loss(scores, columns=columns * 0 + np.arange(columns.shape[1]), **arrays)


def swapped_pairs(scores, *, end_mask, **scalars):
    order = [1, 0, 3, 2, 5, 4]
    return losses.pairwise_reward_loss(scores[order], end_mask=end_mask[order], **scalars)


def shifted_end(scores, *, end_mask, **scalars):
    return losses.pairwise_reward_loss(scores, end_mask=np.roll(end_mask, 1, axis=1), **scalars)


def last_token_only(scores, *, span_mask, end_mask, **scalars):
    return losses.pairwise_reward_loss(scores, end_mask=end_mask, **scalars)


CANARIES = {
    "sft: mean over every slot": ("sft", mean_over_everything, {}),
    "sft: one token too many in the denominator": ("sft", None, {"num_tokens": 40.0}),
    "policy: clip 0.3 for 0.2": ("policy", None, {"clip_range": 0.3}),
    "policy: weights forgotten": ("policy, weighted", weights_forgotten, {}),
    "policy: divided by the sum of weights": ("policy, weighted", weights_in_the_denominator, {}),
    "value: clip 0.3 for 0.2": ("value", None, {"value_clip_range": 0.3}),
    "value: no clip": ("value", no_value_clip, {}),
    "value: column off by one": ("value", column_off_by_one, {}),
    "value: the policy's columns for the critic's": ("value", own_columns, {}),
    "value: coefficient forgotten": ("value", None, {"value_coef": 1.0}),
    "pairwise: chosen and rejected swapped": ("pairwise", swapped_pairs, {}),
    "pairwise: score slot shifted": ("pairwise", shifted_end, {}),
    "pairwise: no centering": ("pairwise", None, {"center_coef": 0.0}),
    "dschat: last token for the span": ("dschat", last_token_only, {}),
}


@pytest.mark.parametrize("bug", CANARIES)
def test_canary_values(bug):
    name, function, options = CANARIES[bug]
    with pytest.raises(AssertionError):
        check_values(name, "numpy", np.float64, function, options)


# --- edges -----------------------------------------------------------------------------------------------------------

ONE = np.ones((1, 4))


def policy_edge_gradients(clip, framework):
    """Gradients where the ratio is *exactly* 0.5 or 1.5 at clip_range 0.5, both signs of the advantage."""
    ratios = np.array([[0.5, 0.5, 1.5, 1.5]])
    advantages = np.array([[1.0, -1.0, 1.0, -1.0]])

    def loss(x, *, advantages, num_tokens):
        clipped = clip(array_namespace(x), x, 0.5, 1.5)
        xp = array_namespace(x)
        return xp.sum(xp.maximum(-advantages * x, -advantages * clipped)) / num_tokens, {}

    return evaluate(framework, loss, ratios, {"advantages": advantages}, {"num_tokens": 1.0})[2]


def test_gradient_at_a_clip_edge_is_the_same():
    for framework in ("jax", "torch"):
        np.testing.assert_array_equal(policy_edge_gradients(losses._clip, framework), [[-1.0, 1.0, -1.0, 1.0]])


def test_canary_the_frameworks_own_clips_differ_at_an_edge():
    own = [policy_edge_gradients(lambda xp, x, low, high: xp.clip(x, low, high), f) for f in ("jax", "torch")]
    assert np.abs(own[0] - own[1]).max() > 0.2


def test_gradient_at_an_edge_of_the_losses_themselves():
    """Ratio exactly 1 with clip_range 0 (both edges at once), value exactly at its clip, and a tie of a pair."""
    arrays = {"entropy": ONE, "old_logprobs": -ONE, "advantages": ONE * [[1, -1, 2, -2]], "mask": ONE}
    value_arrays = {
        "columns": np.arange(4)[None],
        "old_values": 0 * ONE,
        "returns": ONE * [[1, -1, 2, -2]],
        "mask": ONE,
    }
    ends = np.array([[0, 0, 0, 1.0], [0, 0, 1.0, 0]])
    for framework in ("jax", "torch"):
        *_, gradient = evaluate(framework, losses.ppo_policy_loss, -ONE, arrays, {"clip_range": 0.0, "num_tokens": 4.0})
        assert_close(gradient, [[-0.25, 0.25, -0.5, 0.5]], 1e-15)
        options = {"value_clip_range": 0.25, "value_coef": 1.0, "num_tokens": 1.0}
        *_, gradient = evaluate(framework, losses.ppo_value_loss, 0.25 * ONE, value_arrays, options)
        assert_close(gradient, [[-0.75, 1.25, -1.75, 2.25]], 1e-15)
        options = {"center_coef": 0.0, "num_pairs": 1.0}
        *_, gradient = evaluate(framework, losses.pairwise_reward_loss, np.ones((2, 4)), {"end_mask": ends}, options)
        assert_close(gradient, [[0, 0, 0, -0.5], [0, 0, 0.5, 0]], 1e-15)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_fully_masked_micro_batch_is_zero_even_over_garbage(name, framework):
    function, outputs, arrays, options, count = make_case(name)
    outputs = np.full_like(outputs, np.nan)
    arrays = {
        key: np.zeros_like(value) if key.endswith(("mask", "columns")) else np.full_like(value, np.nan)
        for key, value in arrays.items()
    }
    loss, metrics, gradient = evaluate(framework, function, outputs, arrays, {**options, count: 5.0})
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_exp_cannot_overflow_and_the_clamp_is_counted(framework, dtype):
    logprobs = np.array([[-1.0, -900.0, 0.0, -2.0]], dtype)
    old = np.array([[-900.0, -1.0, 0.0, -2.0]], dtype)
    ones = np.ones_like(old)
    arrays = {"entropy": ones, "old_logprobs": old, "advantages": -ones, "mask": ones}
    loss, metrics, gradient = evaluate(
        framework, losses.ppo_policy_loss, logprobs, arrays, {"clip_range": 0.2, "num_tokens": 4.0}
    )
    assert np.isfinite(loss)
    assert metrics["policy/clamped_avg"] == 0.5
    assert_close(metrics["policy/ratio_deviation_max"], math.exp(20) - 1, VALUE_TOLERANCE[dtype])
    assert gradient is None or (np.isfinite(gradient).all() and not gradient[0, :2].any())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_large_margins_do_not_overflow(framework):
    scores = np.array([[1e4, 0], [-1e4, 0], [-1e4, 0], [1e4, 0]], np.float32)
    ends = np.tile(np.array([[1.0, 0.0]], np.float32), (4, 1))
    loss, metrics, gradient = evaluate(
        framework, losses.pairwise_reward_loss, scores, {"end_mask": ends}, {"center_coef": 0.0, "num_pairs": 2.0}
    )
    assert_close(loss, 1e4, 1e-6)
    assert metrics["reward/accuracy"] == 0.5
    assert gradient is None or np.isfinite(gradient).all()


def test_odd_number_of_rows_is_an_error():
    with pytest.raises(ValueError, match="even"):
        losses.pairwise_reward_loss(np.zeros((3, 2)), end_mask=np.ones((3, 2)), num_pairs=1.0, center_coef=0.0)


# --- law 4: micro-batches, padding rows and padding columns change nothing --------------------------------------------


def split_step(name, sizes, function=None, local_denominator=False):
    """Loss, metrics and gradient of a step cut into micro-batches of `sizes` pairs of rows, under torch."""
    published, outputs, arrays, options, count = make_case(name)
    count_of = denominator(name, arrays)
    loss, metrics, gradients, first = 0.0, {}, [], 0
    for size in sizes:
        rows = slice(first, first + 2 * size)
        first += 2 * size
        part = {key: value[rows] for key, value in arrays.items()}
        number = denominator(name, part) * len(sizes) if local_denominator else count_of
        part_loss, part_metrics, part_gradient = evaluate(
            "torch", function or published, outputs[rows], part, {**options, count: number}
        )
        loss += part_loss
        for key, value in part_metrics.items():
            before = metrics.get(key, 0.0)
            metrics[key] = max(before, value) if key.endswith("_max") else before + value
        gradients.append(part_gradient)
    return loss, metrics, np.concatenate(gradients)


def check_micro_batches(name, sizes, **changes):
    whole, parts = split_step(name, [3]), split_step(name, sizes, **changes)
    assert_close(parts[0], whole[0], 1e-12)
    assert_metrics(parts[1], whole[1], 1e-12)
    np.testing.assert_allclose(parts[2], whole[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [1, 2], [2, 1]])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name, sizes):
    check_micro_batches(name, sizes)


@pytest.mark.parametrize("name", ["sft", "policy", "value"])
def test_canary_mean_of_micro_batch_means(name):
    with pytest.raises(AssertionError):
        check_micro_batches(name, [1, 1, 1], local_denominator=True)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(CASES),
    pairs=st.integers(0, 3),
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    garbage=st.floats(-1e6, 1e6),
)
def test_padding_changes_nothing(name, pairs, left, right, garbage):
    """More rows and columns, masked out and full of garbage: the same loss and metrics to rounding."""
    function, outputs, arrays, options, count = make_case(name)
    scalars = {**options, count: denominator(name, arrays)}
    widths = ((0, 2 * pairs), (left, right))
    padded = {
        key: np.pad(value, widths, constant_values=0 if key.endswith(("mask", "columns")) else garbage)
        for key, value in arrays.items()
    }
    if "columns" in padded:
        padded["columns"] += left  # the critic's rows moved, too
    wide = np.pad(outputs, widths, constant_values=-garbage)
    loss, metrics = function(outputs, **arrays, **scalars)
    padded_loss, padded_metrics = function(wide, **padded, **scalars)
    assert_close(padded_loss, loss, 1e-12)
    assert_metrics(padded_metrics, metrics, 1e-12)


def test_canary_padding_pairs_count():
    """A padding pair has margin 0, so a loss that forgot to leave it out would add ln 2."""
    zeros = np.zeros((2, 3))
    loss, _ = losses.pairwise_reward_loss(zeros, end_mask=zeros, num_pairs=1.0, center_coef=0.0)
    assert loss == 0
    counted, _ = losses.pairwise_reward_loss(zeros, end_mask=zeros + np.eye(1, 3), num_pairs=1.0, center_coef=0.0)
    assert_close(counted, math.log(2), 1e-15)


# --- annotations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_shape_annotations_hold(name, framework):
    function, outputs, arrays, options, count = make_case(name)
    checked = jaxtyped(typechecker=beartype)(function)
    evaluate(framework, checked, outputs, arrays, {**options, count: 3.0})


def test_canary_shape_annotations():
    checked = jaxtyped(typechecker=beartype)(losses.sft_loss)
    with pytest.raises(TypeError):
        checked(np.zeros((2, 3)), mask=np.zeros((2, 4)), num_tokens=1.0)


# --- truncated importance sampling -----------------------------------------------------------------------------------

# By hand: p / q = 2, 1/2, 4, 1 and one slot outside the mask; cap 2.
TRAINER = np.log(np.array([[0.4, 0.1, 0.8], [0.3, 0.9, 0.5]]))
SAMPLER = np.log(np.array([[0.2, 0.2, 0.2], [0.3, 1e-9, 0.5]]))
LIVE = np.array([[True, True, True], [True, False, True]])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_importance_weights_by_hand(dtype):
    weights = importance_weights(TRAINER.astype(dtype), SAMPLER.astype(dtype), LIVE, cap=2.5)
    assert weights.dtype == dtype
    assert_close(weights, np.array([[2, 0.5, 2.5], [1, 0, 1]]), VALUE_TOLERANCE[dtype])
    found = importance_metrics(weights, LIVE, cap=2.5)
    by_hand = {
        "importance/weight_mean": 7 / 5,
        "importance/weight_max": 2.5,
        "importance/truncated": 1 / 5,
        "importance/effective_sample_size": 7**2 / (5 * (4 + 0.25 + 6.25 + 1 + 1)),
    }
    assert_metrics(found, by_hand, VALUE_TOLERANCE[dtype])


def test_importance_weights_cannot_overflow_and_ignore_what_is_masked():
    trainer = np.array([[-1.0, np.nan, -1.0]], np.float32)
    weights = importance_weights(trainer, np.array([[-1e5, -1.0, 1e5]], np.float32), LIVE[1:], cap=3.0)
    np.testing.assert_array_equal(weights, np.array([[3, 0, 0]], np.float32))
    # Where sampler and trainer agree the weights are 1, and the cap is not felt.
    equal = importance_weights(TRAINER, TRAINER, LIVE, cap=1.5)
    assert importance_metrics(equal, LIVE, cap=1.5)["importance/effective_sample_size"] == 1
    assert importance_metrics(equal, LIVE, cap=1.5)["importance/truncated"] == 0
