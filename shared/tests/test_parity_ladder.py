"""The ladder: a healthy pair is green, every seeded difference turns its own rung red, and nothing fools it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.cli import main
from diptych.engine import Precision
from diptych.errors import UserError
from diptych.parity.comparison.clips import turned_clips
from diptych.parity.comparison.ladder import RungResult, climb, compare_traces, tolerances_of
from diptych.parity.steps import LADDER, Rung
from diptych.parity.trace import Recorded, Step, Trace
from shared.tests.parity_steps import TENSORS, change, elsewhere, healthy, put, trace, without

Q = "model.layers.1.self_attn.q_proj.weight"


def red(a: Step, b: Step, *, precision: Precision = "float32", **options: Any) -> list[str]:
    return [one.rung.name for one in climb(a, b, precision=precision, **options) if one.status == "red"]


def of(name: str, a: Step, b: Step, **options: Any) -> RungResult:
    return next(one for one in climb(a, b, precision="float32", **options) if one.rung.name == name)


def test_a_healthy_pair_is_green_and_every_rung_is_reached():
    a = healthy()
    found = climb(a, elsewhere(a), precision="float32")
    assert [one.rung for one in found] == list(LADDER)
    assert all(one.status == "green" and one.count > 0 for one in found)
    everything = {one.name for rung in found for one in rung.findings}
    left_out = (a.tensors.keys() | a.metrics.keys()) - everything
    assert left_out == {"response/margins", "timing_s/update"}  # margins serve the tokens, times are listed
    assert any("timing_s/update" in note for note in found[-1].notes)


@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm(seed):
    a = healthy(seed, seed=seed)
    assert not red(a, elsewhere(a, seed=seed))
    wide = healthy(seed, seed=seed, dtype=np.float64)
    assert not red(wide, elsewhere(wide, noise=1e-15, seed=seed), precision="float64")


SEEDED: dict[str, tuple[str, Callable[[Step], Step]]] = {
    "rows": ("tokens", lambda s: put(s, "rows", 0, 99)),
    "a prompt token": ("tokens", lambda s: put(s, "prompts/tokens", (0, 0), 8)),
    "an attention bit": ("tokens", lambda s: put(s, "prompts/attention", (1, 0), True)),
    "a used token": ("tokens", lambda s: put(s, "used/tokens", (0, 1), 2)),
    "a far flip": ("tokens", lambda s: put(s, "response/tokens", (0, 1), 2)),
    "an end": ("tokens", lambda s: put(s, "response/finish", 0, 1)),
    "a given weight": ("tokens", lambda s: put(s, f"policy/start/weights/{Q}", (0, 0), 0.5)),
    "a given moment's last bit": (
        "tokens",
        lambda s: put(
            s,
            f"critic/start/second/{Q}",
            (0, 0),
            np.nextafter(s.array(f"critic/start/second/{Q}")[0, 0], np.float32(9)),
        ),
    ),
    "a probe array": ("tokens", lambda s: put(s, "policy/probe/arrays/old_logprobs", (0, 0), 0.5)),
    "sampler": ("sampler", lambda s: put(s, "response/logprobs", (0, 0), -3)),
    "score": ("rewards", lambda s: put(s, "scores", 2, 7)),
    "reference": ("reference", lambda s: put(s, "ref_logprobs", (2, 1), -9)),
    "policy": ("policy", lambda s: change(s, "logprobs", s.array("logprobs") + np.float32(1e-4))),
    "outputs": ("policy", lambda s: put(s, "policy/outputs", (0, 4), -9)),
    "value": ("values", lambda s: put(s, "values", (1, 3), 7)),
    "critic outputs": ("values", lambda s: put(s, "critic/outputs", (0, 4), -9)),
    "kl": ("kl", lambda s: change(s, "kl", -s.array("kl"))),
    "return": ("returns", lambda s: put(s, "returns", (0, 0), 9)),
    "advantage": ("advantages", lambda s: change(s, "advantages", s.array("advantages") * np.float32(1.001))),
    "loss": ("loss", lambda s: replace(s, metrics=s.metrics | {"policy/loss": 0.1001})),
    "gradient": ("gradients", lambda s: put(s, f"policy/gradient/{Q}", (1, 1), 1.0)),
    "norm": ("norm", lambda s: replace(s, metrics=s.metrics | {"critic/grad_norm": 0.7001})),
    "first moment": ("optimizer", lambda s: put(s, f"policy/first/{Q}", (1, 1), 1.0)),
    "second moment": ("optimizer", lambda s: put(s, f"policy/second/{Q}", (1, 1), 1.0)),
    "update count": ("optimizer", lambda s: replace(s, metrics=s.metrics | {"policy/step": 3.0})),
    "learning rate": ("optimizer", lambda s: replace(s, metrics=s.metrics | {"policy/learning_rate": 1.001e-3})),
    "weight": ("weights", lambda s: put(s, f"policy/weights/{Q}", (1, 1), 9.0)),
    "next": ("next", lambda s: put(s, "policy/next_outputs", (0, 4), -9)),
    "a metric": ("metrics", lambda s: replace(s, metrics=s.metrics | {"objective/kl": 0.2501})),
    "a checksum off by little": (
        "metrics",
        lambda s: replace(s, metrics=s.metrics | {"rollout/tokens_crc32": 9e8 + 1}),
    ),
}


@pytest.mark.parametrize("case", SEEDED)
def test_every_seeded_difference_turns_its_rung_red_alone(case):
    rung, seed = SEEDED[case]
    a = healthy()
    assert red(a, seed(elsewhere(a))) == [rung]
    assert red(seed(elsewhere(a)), a) == [rung]


# One parameter stands for all of them, and the policy for the critic.
COMPARED = sorted(
    name
    for name in healthy().tensors
    if not name.startswith("critic/") and name != "response/margins" and ("model." not in name or name.endswith(Q))
)


@pytest.mark.parametrize("name", COMPARED)
def test_a_lost_array_is_red_on_either_side(name):
    a = healthy()
    b = elsewhere(a)
    assert red(a, without(b, name))
    assert red(without(a, name), b)


@pytest.mark.parametrize("name", sorted(healthy().metrics))
def test_a_lost_scalar_is_red_unless_it_is_not_compared(name):
    a = healthy()
    assert bool(red(a, without(elsewhere(a), name))) == (name != "timing_s/update")


def floats() -> list[str]:
    return [name for name in COMPARED if healthy().array(name).dtype.kind == "f"]


@pytest.mark.parametrize(("sides", "value"), [("a", math.nan), ("b", math.inf), ("both", math.nan), ("both", math.inf)])
@pytest.mark.parametrize("name", floats())
def test_what_is_not_finite_is_red_even_on_both_sides(name, sides, value):
    a = healthy()
    mask = a.tensors[name].mask
    seen = np.ones(a.array(name).shape, bool) if mask is None else a.array(mask)
    index = tuple(int(i) for i in np.argwhere(seen)[0])
    b = elsewhere(a)
    assert red(put(a, name, index, value) if sides != "b" else a, put(b, name, index, value) if sides != "a" else b)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ["policy/loss", "policy/grad_norm", "objective/kl", "policy/step"])
def test_scalars_that_are_not_finite_are_red(name, sides):
    a = healthy()
    steps = [
        replace(s, metrics=s.metrics | {name: math.nan}) if bad else s for s, bad in zip((a, a), sides, strict=True)
    ]
    assert red(*steps)


def test_padding_may_hold_anything():
    a = healthy()
    assert not a.array("used/mask")[1, 4]
    assert not red(put(a, "logprobs", (1, 4), math.nan), put(elsewhere(a), "logprobs", (1, 4), 55))


@pytest.mark.parametrize("name", ["logprobs", "scores", f"policy/gradient/{Q}", "rows", "response/tokens", "used/mask"])
def test_shapes_are_never_broadcast(name):
    a = healthy()
    b = elsewhere(a)
    values = b.array(name)
    for other in (values[:1], values[None], values.reshape(-1)[:0], values[..., :1]):
        assert red(a, change(b, name, other))
    assert red(a, change(b, name, np.asarray(values.reshape(-1)[0])))


@pytest.mark.parametrize("name", ["logprobs", f"policy/weights/{Q}", "rows", "response/tokens", "used/mask"])
def test_another_dtype_is_red_but_for_floats_of_producers_of_different_precision(name):
    a = healthy()
    b = elsewhere(a)
    wider = np.float64 if b.array(name).dtype.kind == "f" else np.int16
    other = change(b, name, b.array(name).astype(wider))
    assert red(a, other)
    assert bool(red(a, other, mixed=True)) == (wider is np.int16)
    if wider is np.float64:
        rungs = climb(a, other, precision="float32", mixed=True)
        one = next(one for rung in rungs for one in rung.findings if one.name == name)
        assert "float32 in A, float64 in B" in one.detail


def test_masks_must_be_the_same_and_there():
    a = healthy()
    b = elsewhere(a)
    assert "policy" in red(a, put(b, "used/mask", (0, 4), False))
    assert red(a, change(b, "logprobs", mask=None)) == ["policy"]
    assert red(a, change(b, "logprobs", mask="policy_mask")) == ["policy"]
    assert red(a, change(b, "logprobs", layout="new rows")) == ["policy"]
    assert "policy" in red(without(a, "used/mask"), without(b, "used/mask"))
    short = [change(s, "used/mask", s.array("used/mask")[:, :1]) for s in (a, b)]
    assert "policy" in red(*short)  # [4, 1] does not stretch over [4, 5]


def test_nothing_to_compare_is_red():
    a = healthy()
    empty = [change(s, "used/mask", np.zeros_like(s.array("used/mask"))) for s in (a, elsewhere(a))]
    assert {"reference", "policy"} <= set(red(*empty))
    assert all("nothing to compare" in one.detail for one in of("reference", *empty).red)
    no_rows = [change(s, "scores", np.zeros(0, np.float32)) for s in (a, elsewhere(a))]
    assert red(*no_rows) == ["rewards"]
    silent = [change(s, "response/mask", np.zeros_like(s.array("response/mask"))) for s in (a, elsewhere(a))]
    assert "tokens" in red(*silent)


def test_a_rung_that_neither_side_has_is_skipped_with_a_reason():
    a = healthy()
    names = [name for name in a.tensors if "/gradient/" in name]
    one = of("gradients", without(a, *names), without(elsewhere(a), *names))
    assert (one.status, one.reason) == ("skipped", "neither side recorded it")
    assert of("gradients", a, without(elsewhere(a), *names)).status == "red"


def test_a_name_that_means_nothing_is_red_on_one_side_and_compared_on_both():
    a = healthy()
    extra = Recorded(values=np.ones(3, np.float32), layout="rows")
    with_one = replace(a, tensors=a.tensors | {"policy/typo": extra})
    assert red(a, with_one) == ["metrics"]
    assert not red(with_one, with_one)
    other = change(with_one, "policy/typo", np.full(3, 2, np.float32))
    assert red(with_one, other) == ["metrics"]


def flipped(step: Step, margin: float) -> Step:
    """Row 0 parts at its second token: another token, and what follows is another text."""
    mine = put(step, "response/tokens", (0, slice(1, None)), 44)
    mine = put(mine, "response/logprobs", (0, slice(1, None)), -7.5)
    mine = put(mine, "response/finish", 0, 1)
    mine = replace(mine, metrics=mine.metrics | {"rollout/tokens_crc32": 1.0})
    return put(mine, "response/margins", (0, 1), margin)


def test_a_near_tie_is_recorded_and_not_red():
    a = healthy()
    b = flipped(elsewhere(a), 1e-7)
    assert not red(a, b)
    tokens = of("tokens", a, b)
    (tie,) = tokens.near_ties
    assert (tie.row, tie.position, tie.tokens[1], tie.margin) == (0, 1, 44, pytest.approx(1e-7))
    assert of("sampler", a, b).findings[0].count == a.array("response/mask").sum() - 4
    assert any("near-ties change a checksum" in note for note in of("metrics", a, b).notes)


@pytest.mark.parametrize(("kind", "rung", "share"), [("gradient", "gradients", 1e-3), ("first", "optimizer", 1e-3)])
def test_a_gradient_that_cancels_is_measured_against_a_share_of_all(kind, rung, share):
    """Its own norm says nothing of the terms that cancelled in it; a larger tensor has no such excuse."""
    a = healthy()
    name = f"policy/{kind}/{Q}"
    whole = math.sqrt(sum(float(np.linalg.norm(one)) ** 2 for one in a.under(f"policy/{kind}").values()))

    def with_norm(size: float) -> Step:
        values = a.array(name)
        return change(a, name, (values * (size / np.linalg.norm(values))).astype(np.float32))

    def off(step: Step) -> Step:
        return change(elsewhere(step), name, step.array(name) * np.float32(1 + 4e-4))

    small, larger = with_norm(1e-2 * share * whole), with_norm(2 * share * whole)
    assert rung not in red(small, off(small), replay=False)
    assert rung in red(larger, off(larger), replay=False)
    assert rung in red(small, change(elsewhere(small), name, small.array(name) * np.float32(1.5)), replay=False)


@pytest.mark.parametrize("margin", [1e-3, math.nan, math.inf])
def test_any_other_flip_is_red(margin):
    a = healthy()
    a = put(a, "response/margins", (0, 1), math.nan if math.isnan(margin) else 0.01)
    found = of("tokens", a, flipped(elsewhere(a), margin))
    assert found.status == "red"
    assert found.red[0].index == (0, 1)
    assert found.near_ties == ()


def test_a_near_tie_needs_both_sides_margins():
    a = healthy()
    assert red(without(a, "response/margins"), flipped(elsewhere(a), 1e-7))[0] == "tokens"


def test_limits():
    a = healthy()
    b = change(elsewhere(a), "response/logprobs", a.array("response/logprobs") + np.float32(3e-5))
    assert not red(a, b)  # two decodes: twice the limit
    assert red(a, b, limits={"sampler": 1e-5}) == ["sampler"]
    c = change(elsewhere(a), f"policy/second/{Q}", a.array(f"policy/second/{Q}") * np.float32(1 + 7e-5))
    assert not red(a, c)  # quadratic in the gradient: twice the limit
    d = change(elsewhere(a), f"policy/first/{Q}", a.array(f"policy/first/{Q}") * np.float32(1 + 7e-5))
    assert red(a, d) == ["optimizer"]
    assert not red(a, d, limits={"optimizer": 1e-4})
    tiny = replace(a, metrics=a.metrics | {"policy/loss": 1e-7})
    assert not red(tiny, replace(tiny, metrics=tiny.metrics | {"policy/loss": -3e-7}))  # below the floor
    small = replace(a, metrics=a.metrics | {"policy/grad_norm": 1e-7})
    assert red(small, replace(small, metrics=small.metrics | {"policy/grad_norm": 2e-7})) == ["norm"]  # has none


def test_gradients_that_vanish_are_measured_against_all_and_their_weights_are_listed():
    a = healthy()
    name = "model.norm.weight"
    noise = [np.full(6, value, np.float32) for value in (1e-9, -1e-9)]
    a, b = (
        change(change(s, f"policy/gradient/{name}", n), f"policy/first/{name}", n)
        for s, n in zip((a, elsewhere(a)), noise, strict=True)
    )
    a, b = (change(s, f"policy/second/{name}", np.full(6, 1e-12, np.float32)) for s in (a, b))
    b = put(b, f"policy/weights/{name}", 0, 5.0)
    assert red(a, b) == ["weights"]  # so small a gradient is measured against a share of all anyway
    vanishing = {"policy": {name}}
    assert red(a, b, vanishing=vanishing) == []
    assert any(name in note for note in of("weights", a, b, vanishing=vanishing).notes)
    real = put(b, f"policy/gradient/{name}", 0, 0.5)  # a gradient that should vanish and does not
    assert red(a, real, vanishing=vanishing) == ["gradients"]


def test_bfloat16_has_no_limits_of_its_own():
    a = healthy()
    with pytest.raises(UserError, match="no tolerance in bfloat16"):
        climb(a, elsewhere(a), precision="bfloat16")


def test_free_runs_stand_on_weights_of_their_own():
    a = healthy()
    name = f"policy/start/weights/{Q}"
    b = change(elsewhere(a), name, a.array(name) * np.float32(1 + 1e-6))
    assert red(a, b) == ["tokens"]
    assert red(a, b, replay=False) == []
    assert red(a, put(b, name, (0, 0), 50), replay=False) == ["tokens"]


# Whole traces.


def pair(tmp_path: Path, change_b=lambda s: s, *, steps: int = 3, replay: bool = True) -> tuple[Trace, Trace]:
    a = trace(tmp_path / "a", [healthy(i) for i in range(steps)], name="jax")
    b = [change_b(elsewhere(healthy(i))) for i in range(steps)]
    return a, trace(tmp_path / "b", b, name="torch", replay=a if replay else None)


def test_two_healthy_traces_are_the_same(tmp_path):
    found = compare_traces(*pair(tmp_path))
    assert (found.code, found.first, found.replay, found.differences) == (0, None, "B replays A", ())
    assert len(found.steps) == 3
    assert found.count > 3000


def test_the_first_red_rung_is_the_lowest_of_a_replay_and_the_earliest_of_free_runs(tmp_path):
    def bug(step: Step) -> Step:
        return {0: lambda s: s, 1: lambda s: put(s, f"policy/weights/{Q}", 0, 5), 2: lambda s: put(s, "scores", 0, 9)}[
            step.step
        ](step)

    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for where, replay, expected in (("x", True, (2, "rewards")), ("y", False, (1, "weights"))):
        found = compare_traces(*pair(tmp_path / where, bug, replay=replay))
        assert found.code == 1
        assert found.first is not None
        assert (found.first[0].step, found.first[1].rung.name) == expected


def test_a_step_or_stage_of_one_side_is_a_difference(tmp_path):
    a = trace(tmp_path / "a", [healthy(0), healthy(1), replace(healthy(0), stage="sft")])
    b = trace(tmp_path / "b", [healthy(0)])
    found = compare_traces(a, b)
    assert found.code == 1
    assert found.differences == ("only A has rl step 1", "only A has stage sft")
    assert not any(step.red for step in found.steps)


def test_a_replay_passes_over_steps_without_arrays(tmp_path):
    bare = [Step(stage="rl", step=i, metrics={"objective/kl": 1.0}) for i in (1, 2)]
    a = trace(tmp_path / "a", [healthy(0), *bare])
    assert compare_traces(a, trace(tmp_path / "b", [healthy(0)], replay=a)).code == 0
    assert compare_traces(a, trace(tmp_path / "c", [healthy(0)])).code == 1


def test_where_one_side_has_no_arrays_what_both_logged_is_compared(tmp_path):
    bare = {"objective/kl": 0.25, "policy/clipfrac_avg": 0.5}
    a = trace(tmp_path / "a", [healthy(0)])
    same = compare_traces(a, trace(tmp_path / "b", [Step(stage="rl", step=0, metrics=bare)]))
    assert same.code == 0
    assert not same.steps[0].is_deep
    assert any("no step has arrays" in note for note in same.notes)
    other = trace(tmp_path / "c", [Step(stage="rl", step=0, metrics=bare | {"objective/kl": 0.26})])
    assert compare_traces(a, other).code == 1


def test_what_cannot_be_compared_is_an_error(tmp_path):
    a = trace(tmp_path / "a", [healthy(0)])
    with pytest.raises(UserError, match="no step in common"):
        compare_traces(a, trace(tmp_path / "b", [healthy(1)]))
    with pytest.raises(UserError, match="no step in common.*no step at all"):
        compare_traces(a, trace(tmp_path / "c", []))
    times = [Step(stage="rl", step=0, metrics={"timing_s/update": 1.0})]
    with pytest.raises(UserError, match="not one number"):
        compare_traces(trace(tmp_path / "d", times), trace(tmp_path / "e", times))
    with pytest.raises(UserError, match=r"producer.precision is 'half'"):
        compare_traces(a, trace(tmp_path / "f", [healthy(0)], precision="half"))
    with pytest.raises(UserError, match="not the same step"):
        climb(healthy(0), healthy(1), precision="float32")


def test_producers_of_different_precision_are_compared_in_the_coarser(tmp_path):
    a = trace(tmp_path / "a", [healthy(0, dtype=np.float64)], precision="float64")
    narrow = {
        name: replace(one, values=one.values.astype(np.float32)) if one.values.dtype.kind == "f" else one
        for name, one in healthy(0, dtype=np.float64).tensors.items()
    }
    b = trace(tmp_path / "b", [replace(healthy(0, dtype=np.float64), tensors=narrow)], replay=a)
    found = compare_traces(a, b)
    assert (found.code, found.precision) == (0, "float32")
    assert any("A computed in float64, B in float32" in note for note in found.notes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy", "write RUNG=LIMIT"),
        ("polcy=1e-4", "no rung 'polcy'"),
        ("policy=0", "positive number"),
        ("policy=-1", "positive number"),
        ("policy=nan", "positive number"),
        ("policy=inf", "positive number"),
        ("policy=small", "positive number"),
        ("tokens=1", "equal or not"),
    ],
)
def test_bad_tolerances(setting, message):
    with pytest.raises(UserError, match=message):
        tolerances_of([setting])


def test_the_command(tmp_path, capsys):
    pair(tmp_path, lambda s: put(s, "logprobs", (0, 0), -9) if s.step == 1 else s)
    sides = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["parity", "compare", *sides]) == 1
    assert main(["parity", "compare", sides[0], sides[0]]) == 0
    assert main(["parity", "compare", *sides, "--tolerance", "policy=20"]) == 0
    assert main(["parity", "compare", *sides, "--tolerance", "polcy=20"]) == 2
    assert main(["parity", "compare", sides[0], str(tmp_path)]) == 2
    assert "no rung 'polcy'" in capsys.readouterr().err


def test_the_tensors_of_the_hand_made_step_belong_to_rungs():
    assert len(TENSORS) == 5
    assert all(isinstance(rung, Rung) for rung in LADDER)


# Clip flags that rounding turns.

CLIPS = {"policy": 0.2, "critic": 0.2}


def at_the_edge(step: Step, log_ratio: float) -> Step:
    """The first counted token of the policy's probe batch has this log-ratio and a positive advantage; the share of
    clipped tokens and one gradient are what follows."""
    mask = step.array("policy/probe/arrays/mask").astype(bool)
    index = tuple(int(i) for i in np.argwhere(mask)[0])
    step = put(step, "policy/probe/arrays/advantages", index, 1.0)
    step = put(step, "policy/probe/arrays/old_logprobs", index, -1.0)
    step = put(step, "policy/outputs", index, -1.0 + log_ratio)
    beyond = log_ratio > math.log(1.2)
    step = replace(step, metrics=step.metrics | {"policy/loss/policy/clipfrac_avg": 0.25 + 0.1 * beyond})
    return put(step, f"policy/gradient/{Q}", (0, 0), 0.5 + 0.1 * beyond)


def test_a_clip_flag_within_rounding_of_its_edge_is_told_of_and_not_red():
    edge = math.log(1.2)
    a, b = at_the_edge(healthy(), edge - 1e-6), at_the_edge(elsewhere(healthy()), edge + 1e-6)
    assert red(a, b) == ["loss", "gradients"]
    assert red(a, b, clips=CLIPS) == []
    assert any("clip flags" in note for note in of("loss", a, b, clips=CLIPS).notes)
    assert of("gradients", a, b, clips=CLIPS).count > 0  # the critic's are compared all the same


def test_canary_a_wrong_clip_range_is_red():
    """Equal outputs, other flags: the range is wrong, however near the edge a token lies."""
    a = at_the_edge(healthy(), math.log(1.2) - 1e-6)
    b = replace(elsewhere(a), metrics=a.metrics | {"policy/loss/policy/clipfrac_avg": 0.3})
    b = change(b, "policy/outputs", a.array("policy/outputs"))
    assert red(a, b, clips=CLIPS) == ["loss"]
    far = [at_the_edge(healthy(), math.log(1.2) + by) for by in (-0.1, 0.1)]
    assert {"policy", "loss", "gradients"} <= set(red(*far, clips=CLIPS))


@pytest.mark.parametrize(
    ("values", "returns", "turned"),
    [
        ((0.2 - 1e-6, 0.2 + 1e-6), 5.0, 1),  # at the edge of the range
        ((0.4, 0.4 + 1e-6), 0.3000002, 1),  # the return between the value and its clipped self
        ((0.1, 0.1 + 1e-6), 5.0, 0),
        ((0.1, 0.3), 5.0, 0),  # a flip, and no near-tie
    ],
)
def test_flags_of_the_value_loss(values, returns, turned):
    def side(value: float) -> Step:
        def one(array: float, dtype: Any = np.float64) -> Recorded:
            return Recorded(values=np.array([[array]], dtype), layout="batch time", phase="given")

        start = "critic/probe/arrays"
        tensors = {"critic/outputs": one(value), f"{start}/old_values": one(0.0), f"{start}/returns": one(returns)}
        tensors |= {f"{start}/mask": one(1.0), f"{start}/columns": one(0, np.int64)}
        return Step(stage="rl", step=0, tensors=tensors)

    found = turned_clips(side(values[0]), side(values[1]), CLIPS, noise=2e-5)
    assert found.get("critic", 0) == turned
