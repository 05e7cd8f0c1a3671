"""Dialects against values computed by the published systems' own code, to 1e-9, and against a case table of our own.

The golden files lie in the folder beside the repository; where it is absent those tests skip and `OWN` still holds
every dialect to numbers that were worked out by separate code.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.algorithms.advantages import Whitening, gae, whiten
from diptych.algorithms.dialects import DIALECTS, Dialect, experience
from diptych.algorithms.losses import ppo_policy_loss, ppo_value_loss
from diptych.algorithms.shaping import add_scores, clip_scores, kl_estimate, kl_penalty, only
from diptych.errors import InvariantError, UserError

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
TOLERANCE = 1e-9  # absolute: what the published values are reproduced to

# What the file calls a system -> our dialect.
NAMED = {
    "TRL 1.12": "trl",
    "OpenRLHF 0.11": "openrlhf",
    "verl 0.10.dev": "verl",
    "NeMo RL main": "verl",
    "DS-Chat pad==eos": "dschat",
    "DS-Chat pad!=eos": "dschat-pad",
    "torchtune 0.6+": "torchtune",
}
# Systems in the file that have no dialect. Strict: each must differ from *every* dialect, or it belongs in NAMED.
KNOWN_DIFFERENCES = {
    "trlx (last)": "whitens over padding too, per training micro-batch: the loss depends on padding and on the "
    "micro-batch size, which law 4 rules out",
}


def golden(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"{path.name}: the folder of golden values is not beside the repository")
    return json.loads(path.read_text())


def rollout(data, dtype=np.float64):
    """The inputs of `experience` and of the losses. A full row has neither a stop token nor a slot after."""
    lengths = np.array(data["response_lengths"])
    arrays = {key: np.array(data[key], dtype=dtype) for key in ("logprobs", "ref_logprobs", "values", "scores")}
    new = arrays["logprobs"].shape[1]
    inputs = {
        **arrays,
        "mask": np.arange(new) < lengths[:, None],
        "ended": lengths < new,
        "kl_coef": data["kl_coef"],
        "kl_estimator": "k1",
        "gamma": data["gamma"],
        "lam": data["lam"],
        "whiten_rewards": False,
        "score_clip": None,
    }
    return inputs, np.array(data["new_logprobs"], dtype=dtype), np.array(data["new_values"], dtype=dtype)


def losses(data, dialect, *, clip=None, denominator=None):
    """(experience, policy loss, value loss) of a rollout under a dialect."""
    inputs, new_logprobs, new_values = rollout(data)
    exp = experience(dialect, **inputs)
    policy, _ = ppo_policy_loss(
        new_logprobs,
        entropy=np.zeros_like(new_logprobs),
        old_logprobs=inputs["logprobs"],
        advantages=exp.advantages,
        mask=exp.policy_mask,
        clip_range=data["clip"] if clip is None else clip,
        num_tokens=exp.num_policy_tokens if denominator is None else denominator,
    )
    value, _ = ppo_value_loss(
        new_values,
        columns=np.broadcast_to(np.arange(new_values.shape[1]), new_values.shape),
        old_values=exp.values,
        returns=exp.returns,
        mask=exp.value_mask,
        value_clip_range=data["value_clip"] if clip is None else clip,
        value_coef=1.0,
        num_tokens=exp.num_value_tokens if denominator is None else denominator,
    )
    return exp, float(policy), float(value)


def check_against(expected, data, dialect, **changes):
    exp, policy, value = losses(data, dialect, **changes)
    close(policy, expected["pg_loss"])
    close(value, expected["vf_loss"])
    if "adv_seq1" in expected:  # before whitening, on every slot
        close(gae(exp.rewards, exp.values, gamma=data["gamma"], lam=data["lam"])[0][1], expected["adv_seq1"])
        trained = exp.advantages[exp.policy_mask]
        close(trained.mean(), expected["adv_mean"])
        close(trained.std(), expected["adv_std"])


def close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance


@pytest.mark.parametrize("system", NAMED)
def test_published_values(system):
    data = golden("ppo_dialects.json")
    check_against(data["dialects"][system], data, NAMED[system])


def test_every_published_system_is_named_or_explained():
    data = golden("ppo_dialects.json")
    assert set(data["dialects"]) == set(NAMED) | set(KNOWN_DIFFERENCES)


@pytest.mark.parametrize("system", KNOWN_DIFFERENCES)
def test_known_differences_are_real(system):
    data = golden("ppo_dialects.json")
    for name in DIALECTS:
        with pytest.raises(AssertionError):
            check_against(data["dialects"][system], data, name)


def test_known_difference_of_trlx_is_the_stated_one():
    """Whitening over every slot, padding included, turns `verl` into trlx to 1e-9: the reason is the whole reason."""
    data = golden("ppo_dialects.json")
    expected = data["dialects"]["trlx (last)"]
    inputs, new_logprobs, _ = rollout(data)
    exp = experience(replace(DIALECTS["verl"], whitening=None), **inputs)
    everywhere, _ = gae(exp.rewards, exp.values, gamma=data["gamma"], lam=data["lam"])
    advantages = whiten(
        everywhere, np.ones_like(exp.policy_mask), whitening=Whitening(variance="bessel", eps=1e-8, eps_form="add")
    )
    policy, _ = ppo_policy_loss(
        new_logprobs,
        entropy=np.zeros_like(new_logprobs),
        old_logprobs=inputs["logprobs"],
        advantages=advantages,
        mask=exp.policy_mask,
        clip_range=data["clip"],
        num_tokens=exp.num_policy_tokens,
    )
    close(policy, expected["pg_loss"])
    close(losses(data, "verl")[2], expected["vf_loss"])


VERL = DIALECTS["verl"]
CANARIES = {
    "clip 0.3 for 0.2": (VERL, {"clip": 0.3}),
    "mean over every slot instead of the mask": (VERL, {"denominator": 32.0}),
    "population variance for Bessel's": (replace(VERL, whitening=replace(VERL.whitening, variance="population")), {}),
    "mean added back": (replace(VERL, whitening=replace(VERL.whitening, keep_mean=True)), {}),
    "no whitening": (replace(VERL, whitening=None), {}),
    "verl's 1e-8 in the count": (replace(VERL, whitening=replace(VERL.whitening, count_eps=0.0, eps=1e-6)), {}),
    "score slot shifted": (replace(VERL, score_slot="after"), {}),
    "stop token not trained": (replace(VERL, trains_stop=False), {}),
    "value mask one longer": (replace(VERL, value_mask="one_longer"), {}),
}


@pytest.mark.parametrize("bug", CANARIES)
def test_canary_published_values(bug):
    data = golden("ppo_dialects.json")
    dialect, changes = CANARIES[bug]
    with pytest.raises(AssertionError):
        check_against(data["dialects"]["verl 0.10.dev"], data, dialect, **changes)


# DeepSpeed-Chat's own trainer, executed in float32 by torch. Row 0: 3 unmasked tokens and a slot after; row 1: full
# length; row 2: 5 unmasked tokens and a slot after. With pad == eos the slot after *is* the stop token.
DSCHAT_READINGS = {
    "dschat": {"lengths": (4, 6, 6), "ended": (True, False, True)},
    "dschat-pad": {"lengths": (3, 6, 5), "ended": (True, False, True)},
}


def dschat_run(data, name, **changes):
    """(experience, advantages and returns of every slot) in float32, as DeepSpeed-Chat's arithmetic is."""
    first = data["prompt_len"] - 1  # column t of its arrays speaks about token t + 1
    response = {key: np.array(data[key], np.float32)[:, first:] for key in ("logprobs", "ref_logprobs", "values")}
    hyper, reading = data["hyper"], DSCHAT_READINGS[name]
    exp = experience(
        name,
        **response,
        scores=np.array(data["reward_score"], np.float32),
        mask=np.arange(response["logprobs"].shape[1]) < np.array(reading["lengths"])[:, None],
        ended=np.array(reading["ended"]),
        **{
            "kl_coef": hyper["kl_ctl"],
            "kl_estimator": "k1",
            "gamma": hyper["gamma"],
            "lam": hyper["lam"],
            "whiten_rewards": False,
            "score_clip": None,
            **changes,
        },
    )
    return exp, *gae(exp.rewards, exp.values, gamma=hyper["gamma"], lam=hyper["lam"])


def check_dschat_arrays(data, name, **changes):
    first = data["prompt_len"] - 1
    exp, advantages, returns = dschat_run(data, name, **changes)
    assert exp.rewards.dtype == advantages.dtype == np.float32
    close(exp.rewards, np.array(data["rewards"])[:, first:])
    close(exp.values, np.array(data["old_values_zeroed"])[:, first:])
    close(advantages, data["advantages"])
    close(returns, data["returns"])
    close(exp.advantages[exp.policy_mask], np.array(data["advantages"])[exp.policy_mask])
    close(exp.returns[exp.value_mask], np.array(data["returns"])[exp.value_mask])
    assert exp.num_clipped_scores == 2  # -7 and 9 at a limit of 5


@pytest.mark.parametrize("name", DSCHAT_READINGS)
def test_dschat_rewards_values_advantages_returns(name):
    check_dschat_arrays(golden("dschat_ppo.json"), name)


@pytest.mark.parametrize("changes", [{"score_clip": 6.0}, {"lam": 0.96}, {"kl_coef": 0.1001}, {"kl_estimator": "k3"}])
def test_canary_dschat_arrays(changes):
    with pytest.raises(AssertionError):
        check_dschat_arrays(golden("dschat_ppo.json"), "dschat", **changes)


def test_dschat_rewards_before_zeroing():
    """Over prompt columns too, and before anything after the end is set to zero: the two shaping functions alone."""
    data = golden("dschat_ppo.json")
    logprobs, ref = (np.array(data[key], np.float32) for key in ("logprobs", "ref_logprobs"))
    scores = clip_scores(np.array(data["reward_score"], np.float32), limit=float(data["hyper"]["clip_reward_value"]))
    penalty = kl_penalty(kl_estimate(logprobs, ref, estimator="k1"), kl_coef=data["hyper"]["kl_ctl"])
    ends = np.array(data["ends"])
    rewards = add_scores(penalty, scores, slots=np.minimum(ends, logprobs.shape[1]) - 1)
    close(rewards, data["rewards_before_zeroing"])
    live = np.arange(logprobs.shape[1]) < ends[:, None]
    close(only(rewards, live), data["rewards"])
    close(only(np.array(data["values"], np.float32), live), data["old_values_zeroed"])


@pytest.mark.parametrize("name", DSCHAT_READINGS)
def test_dschat_losses(name):
    """The two losses to the last float32 bit, under torch: its exp and its order of summation made the values."""
    torch = pytest.importorskip("torch", reason="the golden losses are float32 sums made by torch")
    data = golden("dschat_ppo.json")
    first, hyper = data["prompt_len"] - 1, data["hyper"]
    exp, _, _ = dschat_run(data, name)

    def tensor(key):
        return torch.tensor(data[key], dtype=torch.float32)[:, first:]

    policy, _ = ppo_policy_loss(
        tensor("new_logprobs"),
        entropy=torch.zeros(exp.rewards.shape),
        old_logprobs=tensor("logprobs"),
        advantages=torch.from_numpy(exp.advantages),
        mask=torch.from_numpy(exp.policy_mask),
        clip_range=hyper["cliprange"],
        num_tokens=exp.num_policy_tokens,
    )
    value, _ = ppo_value_loss(
        tensor("new_values"),
        columns=torch.arange(exp.rewards.shape[1]).expand(exp.rewards.shape),
        old_values=torch.from_numpy(exp.values),
        returns=torch.from_numpy(exp.returns),
        mask=torch.from_numpy(exp.value_mask),
        value_clip_range=hyper["cliprange_value"],
        value_coef=1.0,
        num_tokens=exp.num_value_tokens,
    )
    close(policy, data["actor_loss"])
    close(value, data["critic_loss"])


# --- a case table of our own -----------------------------------------------------------------------------------------
# Rows: full length without a stop token; stopped after 3 of 4; stopped at once. Losses worked out by separate code.

OWN = {
    "response_lengths": [4, 3, 1],
    "gamma": 0.9,
    "lam": 0.5,
    "kl_coef": 0.1,
    "clip": 0.2,
    "value_clip": 0.2,
    "logprobs": [[-1.0, -0.5, -2.0, -1.5], [-0.2, -1.2, -0.7, -3.0], [-0.9, -2.5, -1.1, -0.3]],
    "ref_logprobs": [[-1.5, -0.4, -2.2, -1.1], [-0.4, -1.0, -1.4, -2.5], [-0.3, -2.0, -1.7, -0.8]],
    "values": [[0.5, -0.2, 0.1, 0.7], [1.0, 0.4, -0.6, 0.3], [-0.1, 0.8, -0.9, 0.2]],
    "scores": [2.0, -1.0, 7.0],
    "new_logprobs": [[-0.8, -0.9, -2.05, -1.2], [-0.25, -0.7, -0.9, -1.0], [-0.6, -2.0, -3.0, -1.0]],
    "new_values": [[0.9, -0.25, 0.6, 0.3], [0.6, 0.9, -0.5, 0.0], [0.15, 0.5, 0.5, -2.0]],
}
OWN_LOSSES = {  # policy slots, value slots, policy loss, value loss
    "reference": (8, 8, -0.004561870519542599, 3.596563640589453),
    "openrlhf": (8, 8, -0.004561870523097311, 3.596563640589453),
    "verl": (8, 8, -0.00426723959601244, 3.596563640589453),
    "trl": (8, 10, 0.027034057074667772, 3.156610467260625),
    "dschat": (6, 6, 0.037598242635857905, 0.7315431874526043),
    "dschat-pad": (8, 8, -0.49763152290143303, 0.8952379198887696),
    "torchtune": (8, 10, -0.638222717186187, 3.156610467260625),
}
ON_STOP = [[-0.05, 0.01, -0.02, 2.04], [-0.02, 0.02, -1.07, 0.0], [7.06, 0.0, 0.0, 0.0]]
ON_STOP_CLIPPED = [*ON_STOP[:2], [5.06, 0.0, 0.0, 0.0]]
AFTER = [ON_STOP[0], [-0.02, 0.02, -0.07, -1.0], [0.06, 7.0, 0.0, 0.0]]  # row 0 is full: the score stays on its last
AFTER_WITH_KL = [ON_STOP[0], [-0.02, 0.02, -0.07, -0.95], [0.06, 5.05, 0.0, 0.0]]
OWN_REWARDS = {
    "reference": ON_STOP,
    "openrlhf": ON_STOP,
    "verl": ON_STOP,
    "trl": AFTER,
    "dschat": ON_STOP_CLIPPED,
    "dschat-pad": AFTER_WITH_KL,
    "torchtune": AFTER,
}


def check_own(name, dialect: Dialect | str, **changes):
    exp, policy, value = losses(OWN, dialect, **changes)
    num_policy, num_value, expected_policy, expected_value = OWN_LOSSES[name]
    assert (exp.num_policy_tokens, exp.num_value_tokens) == (num_policy, num_value)
    close(exp.rewards, OWN_REWARDS[name], 1e-12)
    close(policy, expected_policy, 1e-12)
    close(value, expected_value, 1e-12)


@pytest.mark.parametrize("name", DIALECTS)
def test_own_table(name):
    check_own(name, name)


# Every switch of every dialect, thrown: each must turn the table red.
THROWN = {
    "score_slot": lambda d: replace(d, score_slot="after" if d.score_slot == "stop" else "stop"),
    "trains_stop": lambda d: replace(d, trains_stop=not d.trains_stop),
    "value_mask": lambda d: replace(d, value_mask="one_longer" if d.value_mask == "policy" else "policy"),
    "score_clip": lambda d: replace(d, score_clip=None if d.score_clip else 5.0),
    "whitening": lambda d: replace(d, whitening=None if d.whitening else Whitening(variance="population", eps=1e-8)),
    "variance": lambda d: _rewhitened(d, variance="bessel" if _is(d, "population") else "population"),
    "eps": lambda d: _rewhitened(d, eps=1e-5, eps_form="add"),
    "keep_mean": lambda d: _rewhitened(d, keep_mean=not (d.whitening and d.whitening.keep_mean)),
}


def _is(dialect, variance):
    return dialect.whitening is not None and dialect.whitening.variance == variance


def _rewhitened(dialect, **changes):
    return None if dialect.whitening is None else replace(dialect, whitening=replace(dialect.whitening, **changes))


@pytest.mark.parametrize("switch", THROWN)
@pytest.mark.parametrize("name", DIALECTS)
def test_canary_own_table(name, switch):
    changed = THROWN[switch](DIALECTS[name])
    if changed is None:
        assert DIALECTS[name].whitening is None  # the switch does not exist in a dialect that does not whiten
        return
    with pytest.raises(AssertionError):
        check_own(name, changed)


def test_canary_kl_on_the_slot_after():
    for name, changed in (("trl", True), ("dschat-pad", False)):
        with pytest.raises(AssertionError):
            check_own(name, replace(DIALECTS[name], kl_after=changed))


@pytest.mark.parametrize("name", [name for name, d in DIALECTS.items() if d.score_slot == "stop"])
def test_padding_changes_nothing_where_the_score_is_on_the_stop_token(name):
    inputs, _, _ = rollout(OWN)
    inputs["ended"] = np.array([True, True, True])
    wide = {
        key: np.pad(value, ((0, 0), (0, 3)), constant_values=_padding(value))
        if isinstance(value, np.ndarray) and value.ndim == 2
        else value
        for key, value in inputs.items()
    }
    narrow_exp, wide_exp = experience(name, **inputs), experience(name, **wide)
    for field in ("rewards", "advantages", "returns", "policy_mask", "value_mask", "kl", "values"):
        np.testing.assert_array_equal(getattr(wide_exp, field)[:, :4], getattr(narrow_exp, field), strict=True)
        assert not getattr(wide_exp, field)[:, 4:].any()


def _padding(array):
    return False if array.dtype == bool else 17.0


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept_and_nothing_lies_outside_the_masks(name, dtype):
    inputs, _, _ = rollout(OWN, dtype)
    exp = experience(name, **inputs)
    for field in ("rewards", "advantages", "returns", "kl", "kl_per_response", "values"):
        assert getattr(exp, field).dtype == dtype, field
    assert not exp.advantages[~exp.policy_mask].any()
    assert not exp.returns[~exp.value_mask].any()
    assert not exp.kl[~inputs["mask"]].any()
    close(exp.kl_per_response, [0.2, 0.7, -0.6], 1e-6)


def test_float32_and_float64_agree():
    for name in DIALECTS:
        double, single = (experience(name, **rollout(OWN, dtype)[0]) for dtype in (np.float64, np.float32))
        for field in ("rewards", "advantages", "returns", "kl"):
            close(getattr(single, field), getattr(double, field), 1e-6)


def test_whitened_rewards_keep_their_mean_and_get_unit_scale():
    inputs, _, _ = rollout(OWN)
    plain = experience("reference", **inputs).rewards
    whitened = experience("reference", **{**inputs, "whiten_rewards": True}).rewards
    inside = plain[inputs["mask"]]
    expected = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-8) + inside.mean()
    close(whitened[inputs["mask"]], expected, 1e-12)
    assert not whitened[~inputs["mask"]].any()
    after = experience("trl", **{**inputs, "whiten_rewards": True}).rewards  # the slot after is live there
    assert np.array_equal(after != 0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])


def test_recipe_score_clip_goes_before_the_dialects():
    inputs, _, _ = rollout(OWN)
    assert experience("dschat", **inputs).num_clipped_scores == 1
    assert experience("dschat", **{**inputs, "score_clip": 10.0}).num_clipped_scores == 0
    assert experience("reference", **{**inputs, "score_clip": 1.5}).num_clipped_scores == 2


def test_garbage_after_the_response_changes_nothing():
    inputs, _, _ = rollout(OWN)
    dirty = {**inputs, **{key: inputs[key].copy() for key in ("logprobs", "ref_logprobs", "values")}}
    for key in ("logprobs", "ref_logprobs", "values"):
        dirty[key][~inputs["mask"]] = np.nan
    for name in ("reference", "openrlhf", "verl", "dschat"):
        clean_exp, dirty_exp = experience(name, **inputs), experience(name, **dirty)
        for field in ("rewards", "advantages", "returns", "kl", "values"):
            np.testing.assert_array_equal(getattr(dirty_exp, field), getattr(clean_exp, field))


BAD = {
    "unknown dialect": ({"dialect": "ppo"}, UserError, "unknown dialect 'ppo'"),
    "nothing to whiten with": ({"dialect": "dschat", "whiten_rewards": True}, UserError, "no whitening"),
    "hole in the mask": ({"mask": np.array([[1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)}, ValueError, "slot 0"),
    "empty row": ({"mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)}, ValueError, "slot 0"),
    "mixed dtypes": ({"scores": np.zeros(3, np.float32)}, ValueError, "share"),
    # Under the run-time type checker of the tests the annotation itself refuses these two.
    "wrong shape": ({"scores": np.zeros(4)}, (ValueError, TypeError), "scores"),
    "mask of numbers": ({"mask": np.ones((3, 4))}, (ValueError, TypeError), "mask"),
    "unknown estimator": ({"kl_estimator": "k4"}, ValueError, "k4"),
    "only stop tokens": (
        {"dialect": "dschat", "mask": np.eye(1, 4, dtype=bool).repeat(3, 0), "ended": np.ones(3, bool)},
        InvariantError,
        "lone stop token",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, text = BAD[case]
    arguments = {"dialect": "reference", **rollout(OWN)[0], **changes}
    with pytest.raises(error, match=text):
        experience(arguments.pop("dialect"), **arguments)


# --- the documentation says what the code does -----------------------------------------------------------------------


def documented():
    """dialect -> (pg_loss, vf_loss, advantage mean, std) as docs/algorithms.md prints them."""
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    table = text.split("| dialect | pg_loss |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {name.strip("`"): [float(number) for number in numbers] for name, *numbers in cells}


def test_documented_numbers():
    data = golden("ppo_dialects.json")
    table = documented()
    assert set(table) == set(DIALECTS)
    for name, numbers in table.items():
        exp, policy, value = losses(data, name)
        trained = exp.advantages[exp.policy_mask]
        close([policy, value, trained.mean(), trained.std()], numbers, 0.6e-10)
