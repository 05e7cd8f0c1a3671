"""Curves with a known truth: how often the verdict is right, and what it refuses to judge."""

import argparse
import json
import re

import numpy as np
import pytest

from diptych.errors import UserError
from diptych.parity.curves.bands import MAX_SEEDS, band, holm, judge, overall
from diptych.parity.curves.curves import CODES, command, compare, conclusion, describe, read_run
from diptych.parity.trace import Step, TraceWriter
from diptych.recipe.load import dump_recipe
from diptych.recipe.schema import DataRecipe, ModelRecipe, Recipe, RewardSource, RLRecipe, Source
from diptych.run.directory import RunDirectory
from diptych.run.metrics import MetricsLogger

STEPS = 12


def simulated(rng, n, *, shift=0.0, shared=0.0, metrics=1, spread=1.0, seeds_b=None):
    """metric -> (side A, side B) of n seeds: seed effects of deviation `spread`, of whose variance the share `shared`
    is common to both sides (as with equal data order), and noise of a step. shift: of side B, in seed deviations."""
    curves = {}
    for index in range(metrics):
        common = rng.normal(size=n) * np.sqrt(shared)
        sides = []
        for side in range(2):
            effect = (common + rng.normal(size=n) * np.sqrt(1 - shared)) * spread + shift * side * spread
            noise = rng.normal(size=(n, STEPS)) * 0.1 * spread
            seeds = range(n) if side == 0 or seeds_b is None else seeds_b
            sides.append(dict(zip(seeds, effect[:, None] + noise, strict=True)))
        curves[f"rl metric {index}"] = tuple(sides)
    return curves


def outcomes(count, n, **options):
    """How often each verdict comes over `count` repeats."""
    rng = np.random.default_rng(7)
    found = {"same within noise": 0, "different": 0, "cannot tell": 0}
    for _ in range(count):
        curves = simulated(rng, n, **options)
        found[overall(judge(curves, dict.fromkeys(curves, range(STEPS))))[0]] += 1
    return {name: value / count for name, value in found.items()}


OTHER_SEEDS = range(100, 200)


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (3, {}),
        (10, {}),
        (5, {"shared": 0.9}),
        (6, {"metrics": 6}),
        (5, {"seeds_b": OTHER_SEEDS[:5]}),
    ],
    ids=["three", "ten", "correlated", "six metrics", "other seeds"],
)
def test_equal_sides_are_rarely_called_different(n, options):
    """At most 5 of 100, however many metrics (2 to 3.5 measured over 2000 repeats)."""
    assert outcomes(200, n, **options)["different"] <= 0.08


def test_the_false_alarms_are_not_bought_by_blindness():
    """A test that never alarms would pass the one above."""
    assert outcomes(300, 10)["different"] >= 0.01
    assert outcomes(100, 10, shift=4.0)["different"] == 1.0


@pytest.mark.parametrize(("n", "shared"), [(12, 0.0), (23, 0.0), (6, 0.8)])
def test_a_difference_is_found_as_often_as_is_stated(n, shared):
    """`detectable` is what is found in 8 of 10 cases: plant just that, in units of the true deviation, and count."""
    rng = np.random.default_rng(1)
    stated = []
    for _ in range(60):
        curves = simulated(rng, n, shared=shared)
        (verdict,) = judge(curves, dict.fromkeys(curves, range(STEPS)))
        stated.append(verdict.tests[0].detectable)
    power = outcomes(250, n, shift=float(np.mean(stated)), shared=shared)["different"]
    assert 0.7 <= power <= 0.97  # Holm gives back a little of what the statement takes for granted


def test_one_deviation_with_few_seeds_is_missed_and_with_many_found():
    """Textbook: Welch at 2.5 % needs about 21 a side for one deviation at 80 %."""
    assert outcomes(200, 4, shift=1.0)["different"] < 0.4
    assert outcomes(200, 24, shift=1.0)["different"] > 0.75


def test_equivalence_needs_seeds_and_then_is_shown():
    assert outcomes(100, 3)["same within noise"] < 0.1
    assert outcomes(100, 24)["same within noise"] > 0.75
    assert outcomes(100, 6, shared=0.95)["same within noise"] > 0.75  # pairing is worth seeds


@pytest.mark.parametrize(("n", "shared"), [(8, 0.0), (24, 0.0), (8, 0.8)])
def test_sides_that_are_a_margin_apart_are_rarely_called_the_same(n, shared):
    """The error that matters most; the margin is itself estimated from the seeds, hence the allowance."""
    assert outcomes(250, n, shift=1.0, shared=shared)["same within noise"] <= 0.1


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_the_seeds_that_it_asks_for_are_enough(shared):
    rng = np.random.default_rng(3)
    asked = []
    for _ in range(60):
        curves = simulated(rng, 6, shared=shared)
        outcome, more = overall(judge(curves, dict.fromkeys(curves, range(STEPS))))
        if outcome == "cannot tell" and more is not None:
            asked.append(6 + more)
    assert len(asked) > 20
    needed = next(n for n in range(3, 60) if outcomes(40, n, shared=shared)["same within noise"] >= 0.8)
    assert needed / 2 <= np.median(asked) <= needed * 2
    assert outcomes(200, int(np.median(asked)), shared=shared)["same within noise"] >= 0.65
    assert outcomes(200, int(np.median(asked)), shared=shared, shift=1.0)["different"] >= 0.65


def test_bit_equal_curves_are_the_same_and_constant_ones_are_told_apart():
    rng = np.random.default_rng(0)
    curves = {"rl m": (simulated(rng, 3)["rl metric 0"][0],) * 2}
    assert overall(judge(curves, {"rl m": range(STEPS)}))[0] == "same within noise"
    flat = {seed: np.ones(STEPS) for seed in range(3)}
    curves["rl flat"] = (flat, {seed: curve + 1e-3 for seed, curve in flat.items()})
    assert overall(judge(curves, {"rl m": range(STEPS), "rl flat": range(STEPS)}))[0] == "different"


def test_significant_rounding_is_no_difference():
    """Paired runs that differ by 1e-5 of the seeds' deviation, every one upwards."""
    rng = np.random.default_rng(0)
    a = simulated(rng, 5)["rl metric 0"][0]
    b = {seed: curve + 1e-5 + 1e-7 * rng.normal() for seed, curve in a.items()}
    (verdict,) = judge({"rl m": (a, b)}, {"rl m": range(STEPS)})
    assert verdict.tests[0].p_raw is not None
    assert verdict.tests[0].p_raw < 1e-6
    assert verdict.outcome == "same within noise"
    larger = {seed: curve + 0.5 + 1e-3 * rng.normal() for seed, curve in a.items()}
    assert judge({"rl m": (a, larger)}, {"rl m": range(STEPS)})[0].outcome == "different"


def test_swapped_sides_turn_the_sign_and_nothing_else():
    curves = simulated(np.random.default_rng(5), 6, shift=3.0)["rl metric 0"]
    one, other = (judge({"m": pair}, {"m": range(STEPS)})[0] for pair in (curves, curves[::-1]))
    assert one.tests[0].difference > 0 > other.tests[0].difference
    assert one.tests[0].difference == -other.tests[0].difference
    assert one.tests[0].p_different == pytest.approx(other.tests[0].p_different)


def test_the_seeds_are_paired_by_their_numbers():
    """Equal but for a small shift: seen only where every seed meets itself."""
    a, b = simulated(np.random.default_rng(2), 6, shared=0.9999, shift=0.3)["rl metric 0"]
    assert judge({"m": (a, dict(reversed(b.items())))}, {"m": range(STEPS)})[0].outcome == "different"
    wrong = dict(zip(b, [b[(seed + 1) % 6] for seed in b], strict=True))
    assert judge({"m": (a, wrong)}, {"m": range(STEPS)})[0].outcome != "different"
    unpaired = {seed + 50: curve for seed, curve in b.items()}
    assert judge({"m": (a, unpaired)}, {"m": range(STEPS)})[0].outcome != "different"


def test_the_last_quarter_is_the_last_and_a_quarter():
    a = {seed: np.zeros(8) + 0.01 * seed for seed in range(4)}
    b = {seed: curve + np.array([0.0] * 6 + [1.0] * 2) for seed, curve in a.items()}
    last, whole = judge({"m": (a, b)}, {"m": range(8)})[0].tests
    assert (last.difference, whole.difference) == pytest.approx((1.0, 0.25))


def test_holm_against_its_definition():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_band_is_the_t_interval():
    drawn = band({seed: np.array([value]) for seed, value in enumerate([1.0, 2.0, 3.0])})
    assert drawn.mean == pytest.approx([2.0])
    assert drawn.half_width == pytest.approx([4.302652 / np.sqrt(3)])


# Runs on disk.

RECIPE = Recipe(
    name="demo",
    stages=("rl",),
    model=ModelRecipe(path="somewhere"),
    data=DataRecipe(prompts=Source(path="task:postcards", limit=64)),
    rl=RLRecipe(batch_size=8, reward=RewardSource(function="reward.py:score")),
)


def write_run(path, engine, seed, *, level=0.0, recipe=RECIPE, steps=8, broken=None):
    recipe = Recipe(**{**vars(recipe), "seed": seed})
    run = RunDirectory.create(path, recipe, engine=engine, environment={}, resume=False, stages=("rl",))
    noise = np.random.default_rng(seed).normal(size=steps)
    with MetricsLogger(run, "rl") as logger:
        for step in range(1, steps + 1):
            logger.log(step, {"objective/scores": level + seed + 0.01 * noise[step - 1], "objective/kl": 0.1 * seed})
    if broken is not None:
        file = run.metrics_path
        file.write_text(broken(file.read_text()))
    return path


def write_trace(path, producer, seed, *, level=0.0, **more):
    recipe = dump_recipe(Recipe(**{**vars(RECIPE), "seed": seed}))
    provenance = {"recipe": recipe, "seed": seed, "replay": None, **more}
    seed = seed or 0
    noise = np.random.default_rng(seed).normal(size=8)
    with TraceWriter(path, producer={"name": producer, "precision": "float32"}, provenance=provenance) as trace:
        for step in range(1, 9):
            metrics = {"objective/scores": level + seed + 0.01 * noise[step - 1], "objective/kl": 0.1 * seed}
            trace.add(Step(stage="rl", step=step, metrics=metrics))
    return path


def call(*runs, metric=(), json_file=None, html=None):
    return command(argparse.Namespace(runs=list(runs), metric=list(metric), json=json_file, html=html, margin=None))


def six(tmp_path, **planted):
    return [
        write_run(tmp_path / f"{engine}-{seed}", engine, seed, **(planted if engine == "torch" else {}))
        for engine in ("jax", "torch")
        for seed in (1, 2, 3)
    ]


def test_runs_on_disk_get_each_verdict_its_exit_code(tmp_path, capsys):
    assert call(*six(tmp_path / "same")) == CODES["same within noise"] == 0
    assert "same within noise" in capsys.readouterr().out
    runs = six(tmp_path / "different", level=2.0)
    assert call(*runs) == 1
    assert "different: rl objective/scores is higher on torch by 2" in capsys.readouterr().out
    assert call(*runs[3:], *runs[:3]) == 1
    assert "rl objective/scores is lower on jax by 2" in capsys.readouterr().out
    assert call(*reversed(runs)) == 1
    assert call(runs[0], runs[3]) == 2
    assert "cannot tell: one seed a side" in capsys.readouterr().out
    assert call(*runs, metric=["objective/kl"]) == 0


def test_few_unpaired_seeds_ask_for_more(tmp_path):
    runs = [write_run(tmp_path / f"j{seed}", "jax", seed) for seed in (1, 3, 6)]
    runs += [write_run(tmp_path / f"t{seed}", "torch", seed) for seed in (2, 4, 5)]
    result = compare([read_run(path) for path in runs], metrics=["objective/scores"])
    outcome, more = overall(result.verdicts)
    assert outcome == "cannot tell"
    assert more is not None
    assert 3 <= more <= MAX_SEEDS
    assert f"cannot tell: {more} more seeds a side" in conclusion(result)
    assert "unpaired" in describe(result)


def test_runs_and_traces_are_the_same_to_it(tmp_path):
    runs = [write_run(tmp_path / f"j{seed}", "jax", seed) for seed in (1, 2, 3)]
    traces = [write_trace(tmp_path / f"t{seed}", "torch", seed) for seed in (1, 2, 3)]
    assert call(*runs, *traces) == 0


def test_json_and_page_hold_what_the_screen_says(tmp_path):
    call(*six(tmp_path, level=2.0), json_file=tmp_path / "o/c.json", html=tmp_path / "o/c.html")
    told = json.loads((tmp_path / "o/c.json").read_text())
    assert told["outcome"] == "different"
    assert [one["outcome"] for one in told["metrics"]] == ["different", "same within noise"]
    assert len(told["metrics"][0]["bands"]["torch"]["mean"]) == 8
    text = (tmp_path / "o/c.html").read_text()
    assert text.count('<polygon class="band') == 4
    assert "<script" not in text
    assert "different" in text


def nan_at_line_4(text):
    lines = text.splitlines(keepends=True)
    lines[3] = re.sub(r'"objective/scores": [^,]+', '"objective/scores": NaN', lines[3])
    return "".join(lines)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (nan_at_line_4, r"metrics\.jsonl:4: rl objective/scores is nan at step 4"),
        (
            lambda text: "".join(text.splitlines(keepends=True)[:5]),
            r"metrics\.jsonl:5: .* lacks step 6 and 2 more, which",
        ),
        (
            lambda text: "".join(text.splitlines(keepends=True)[1:]),
            r"metrics\.jsonl:1: .* lacks step 1, which .*:1 has",
        ),
        (
            lambda text: text + text.splitlines(keepends=True)[2],
            r"metrics\.jsonl:9: .* of step 3 is there twice \(first at .*:3\)",
        ),
        (lambda text: text.replace('"step": 2', '"step": two'), r"metrics\.jsonl:2: not a row of metrics"),
        (lambda text: "", r"holds no metric"),
    ],
    ids=["nan", "short", "late", "twice", "malformed", "empty"],
)
def test_a_broken_curve_is_an_error_with_its_line(tmp_path, broken, message):
    runs = [write_run(tmp_path / f"{side}{seed}", side, seed) for side in ("jax", "torch") for seed in (1, 2)]
    runs.append(write_run(tmp_path / "bad", "torch", 3, broken=broken))
    runs.append(write_run(tmp_path / "good", "jax", 3))
    with pytest.raises(UserError, match=message):
        call(*runs)


def test_unequal_recipes_are_named(tmp_path):
    other = Recipe(**{**vars(RECIPE), "rl": RLRecipe(**{**vars(RECIPE.rl), "kl_coef": 0.1})})
    runs = [write_run(tmp_path / "a", "jax", 1), write_run(tmp_path / "b", "torch", 1, recipe=other)]
    with pytest.raises(UserError, match=r"b/recipe\.yaml:\d+: rl\.kl_coef is 0\.1, and 0\.05 at .*a/recipe\.yaml:\d+"):
        call(*runs)


def test_other_places_and_names_are_no_other_recipe(tmp_path):
    renamed = Recipe(**{**vars(RECIPE), "name": "other", "logprob_chunk": 99})
    runs = [write_run(tmp_path / "a", "jax", 1), write_run(tmp_path / "b", "torch", 1, recipe=renamed)]
    assert call(*runs) == 2  # compared, and too few to tell


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [write_run(p / "a", "jax", 1), write_run(p / "b", "jax", 2)], "there are 1: jax: .*a, .*b"),
        (
            lambda p: [write_run(p / str(index), side, 1) for index, side in enumerate(("jax", "torch", "trl"))],
            "there are 3: jax",
        ),
        (
            lambda p: [write_run(p / "a", "jax", 1), write_run(p / "b", "jax", 1), write_run(p / "c", "torch", 1)],
            r"seed 1 of jax is there already \(.*a\)",
        ),
        (
            lambda p: [write_run(p / "a", "jax", 1), write_trace(p / "b", "torch", 1, replay={"trace": "0"})],
            "b: is a replay of another trace",
        ),
        (
            lambda p: [write_run(p / "a", "jax", 1), write_trace(p / "b", "trl", None, recipe=None)],
            "does not say its seed",
        ),
    ],
    ids=["one side", "three sides", "a seed twice", "a replay", "no seed"],
)
def test_what_is_no_comparison_is_an_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        call(*make(tmp_path))


def test_a_foreign_trace_is_compared_by_its_settings(tmp_path):
    ours = write_run(tmp_path / "a", "jax", 1)
    theirs = write_trace(tmp_path / "b", "trl", 1, recipe=None, settings={"adam_epsilon": 1e-8})
    with pytest.raises(UserError, match=r"b/trace\.json:\d+: eps is 1e-08, and 1e-05"):
        call(ours, theirs)


def test_an_unknown_metric_names_the_nearest(tmp_path):
    runs = [write_run(tmp_path / "a", "jax", 1), write_run(tmp_path / "b", "torch", 1)]
    with pytest.raises(UserError, match="did you mean objective/scores"):
        call(*runs, metric=["objective/score"])
