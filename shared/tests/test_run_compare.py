"""Two runs that agree are said to agree; a planted difference is found at its metric and step."""

import dataclasses
import json
import re

import pytest

from diptych.errors import UserError
from diptych.recipe.schema import Recipe
from diptych.run.compare import compare_runs, format_table, is_timing, write_comparison
from diptych.run.directory import RunDirectory
from diptych.run.metrics import MetricsLogger

RECIPE = Recipe(name="demo")


def make_run(path, engine="jax", *, recipe=RECIPE, planted=None, steps=20, seconds=1.0, extra=()):
    """planted: (stage, step, metric) -> added to the value there."""
    run = RunDirectory.create(path, recipe, engine=engine, environment={}, resume=False, stages=("sft",))
    for stage in ("sft", "rl"):
        run.begin(stage)
        with MetricsLogger(run, stage) as logger:
            for step in range(1, steps + 1):
                metrics = {"loss": 1.0 / step, "lr": 1e-6 * step, "noise": 0.0, "timing_s/step": seconds * step}
                if step % 5 == 0:
                    metrics["eval/loss"] = 2.0 / step
                metrics |= dict.fromkeys(extra, 1.0)
                for (at_stage, at_step, metric), value in (planted or {}).items():
                    if (at_stage, at_step) == (stage, step):
                        metrics[metric] += value
                logger.log(step, metrics)
    run.finish("sft", {"eval_loss_first": 2.0, "eval_loss_last": 0.1, "seconds": seconds})
    run.finish(
        "rl", {"eval_score_before": 0.25, "eval_score_after": 0.5, "kl": 1.0, "seconds": seconds, "generated_tokens": 9}
    )
    return run.path


def test_runs_that_agree(tmp_path):
    comparison = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", "torch", seconds=3.0))
    assert comparison.labels == ("jax", "torch")
    assert all(one.max_absolute == 0 and one.max_relative == 0 for one in comparison.metrics)
    assert all(one.parted_at is None for one in comparison.metrics)
    assert {one.metric for one in comparison.metrics} == {"loss", "lr", "noise", "eval/loss"}
    assert comparison.only_in == {}
    assert comparison.recipe == []
    assert [one.difference for one in comparison.results if one.key != "seconds"] == [0.0] * 6
    assert [one.difference for one in comparison.results if one.key == "seconds"] == [None, None]


@pytest.mark.parametrize(
    ("stage", "step", "metric", "size", "parted"),
    [
        ("rl", 13, "loss", 1e-3, True),
        ("sft", 7, "loss", 9e-5, False),  # below 1e-4 of the largest loss, 1.0
        ("sft", 7, "loss", 1.1e-4, True),
        ("rl", 20, "eval/loss", -1e-2, True),
        ("sft", 2, "lr", 1e-8, True),  # small numbers are not close because they are small
        ("sft", 5, "noise", 1e-30, True),
    ],
)
def test_a_planted_difference_is_found_at_its_metric_and_step(tmp_path, stage, step, metric, size, parted):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", "torch", planted={(stage, step, metric): size})
    comparison = compare_runs(a, b)
    found = [one for one in comparison.metrics if one.max_absolute > 0]
    assert [(one.stage, one.metric) for one in found] == [(stage, metric)]
    assert found[0].max_absolute == pytest.approx(abs(size), rel=1e-6)
    assert found[0].max_absolute_step == found[0].max_relative_step == step
    assert found[0].parted_at == (step if parted else None)
    assert comparison.largest() == found[0]
    (line,) = (line for line in format_table(comparison).splitlines() if f"{abs(size):.1e}" in line)
    assert metric in line
    assert line.split()[-1] == (str(step) if parted else "never")


def test_the_largest_and_the_first_difference_are_not_confused(tmp_path):
    planted = {("rl", 3, "loss"): 1e-3, ("rl", 9, "loss"): 5e-3, ("rl", 19, "loss"): 4.9e-3}
    comparison = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", "torch", planted=planted))
    (one,) = (one for one in comparison.metrics if one.max_absolute > 0)
    assert (one.parted_at, one.max_absolute_step, one.max_relative_step) == (3, 9, 19)
    assert one.max_relative == pytest.approx(4.9e-3 / (1 / 19 + 4.9e-3))
    assert comparison.largest("sft").max_absolute == 0


def test_runs_of_other_lengths_recipes_and_metrics_are_told_apart(tmp_path):
    a = make_run(tmp_path / "a", extra=("only/a",))
    b = make_run(tmp_path / "b", steps=12, recipe=dataclasses.replace(RECIPE, seed=4, stages=("sft",)))
    comparison = compare_runs(a, b)
    assert comparison.labels == ("a", "b")  # the same engine: the directories' names
    assert comparison.num_steps == {"sft": (12, 20, 12), "rl": (12, 20, 12)}
    assert comparison.only_in == {"sft only/a": "a", "rl only/a": "a"}
    assert comparison.recipe == [("seed", 0, 4)]
    text = format_table(comparison)
    for piece in (
        "12 common steps of 20 (a) and 12 (b)",
        "recipes differ: seed is 0 (a) and 4 (b)",
        "only in a: sft only/a",
    ):
        assert piece in text


def test_a_missing_stage_is_a_gap_and_not_an_error(tmp_path):
    a = make_run(tmp_path / "a")
    b = RunDirectory.create(tmp_path / "b", RECIPE, engine="torch", environment={}, resume=False, stages=("sft",)).path
    text = format_table(compare_runs(a, b))
    assert "no step was logged by both runs" in text
    assert re.search(r"held-out loss, first +2\.000000 +-\s", text + " ")
    write_comparison(a, b, tmp_path / "page.html")
    with pytest.raises(UserError, match="not a run directory"):
        compare_runs(a, tmp_path)


def test_the_table_is_aligned(tmp_path):
    comparison = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", "torch"))
    lines = format_table(comparison).splitlines()
    assert lines[0].split() == ["stage", "result", "jax", "torch", "difference"]
    assert {len(line) for line in lines[1:3]} == {len(lines[0])}
    assert all(line == line.rstrip() for line in lines)


def test_times_are_not_compared():
    assert is_timing("timing_s/rollout")
    assert is_timing("tokens_per_second")
    assert is_timing("rollout/seconds")
    assert not is_timing("tokens")
    assert not is_timing("response_length/mean")


def test_the_page_has_both_curves_the_difference_and_no_reference(tmp_path):
    a = make_run(tmp_path / "a", recipe=dataclasses.replace(RECIPE, name="<script>x</script>"))
    b = make_run(tmp_path / "b", "torch", planted={("rl", 13, "loss"): 1e-3, ("sft", 7, "loss"): 1e-3})
    text = write_comparison(a, b, tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'(src|href)=|https?:|url\(|\son[a-z]+="', text)
    assert len(re.findall(r'<path class="curve c1 wide"', text)) == len(re.findall(r'<path class="curve c2"', text)) > 4
    assert "equal at 19 of 20 steps" in text
    assert "step 13" in text
    assert "The recipes differ" in text
    assert text.count("<figure") == text.count("</figure>") > 8


def test_numbers_are_read_as_written(tmp_path):
    """The comparison is of full-precision values: the last bit is seen."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "torch")
    lines = (b / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[2])
    row["loss"] = row["loss"] * (1 + 2**-52)
    (b / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")
    (one,) = (one for one in compare_runs(a, b).metrics if one.max_absolute > 0)
    assert (one.metric, one.max_absolute_step) == ("loss", 3)
    assert 0 < one.max_relative < 1e-15


def test_token_checksums_are_equal_or_not_and_no_difference_of_a_metric(tmp_path):
    name = "rollout/tokens_crc32"
    a = make_run(tmp_path / "a", extra=(name,))
    b = make_run(tmp_path / "b", "torch", extra=(name,), planted={("rl", 4, name): 3e9, ("rl", 9, name): 1.0})
    comparison = compare_runs(a, b)
    assert comparison.largest("rl").metric != name
    brief = format_table(comparison, every_metric=False)
    assert "every sampled token equal in 20 of 20 rollouts" in brief  # sft's row comes first and agrees
    b = make_run(tmp_path / "c", "torch", extra=(name,), planted={("sft", 4, name): 3e9, ("sft", 9, name): 1.0})
    assert "equal in 18 of 20 rollouts, first different at step 4" in format_table(compare_runs(a, b))
