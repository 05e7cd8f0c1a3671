"""Metrics: full precision, no non-finite number, and a resume that leaves no row twice."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diptych.errors import InvariantError, UserError
from diptych.recipe.schema import Recipe
from diptych.run.directory import RunDirectory
from diptych.run.metrics import MetricsLogger, by_stage, read_metrics


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(
        tmp_path / "out", Recipe(name="x"), engine="jax", environment={}, resume=False, stages=("sft",)
    )


def log(run, stage, steps, *, resume_from=0, scale=1.0):
    with MetricsLogger(run, stage, resume_from=resume_from) as logger:
        for step in steps:
            logger.log(step, {"loss": scale * step})


def rows(run):
    return [(row["stage"], row["step"], row["loss"]) for row in read_metrics(run.metrics_path)]


def test_rows_keep_every_bit(run):
    values = {"a": 0.1 + 0.2, "b": np.float32(0.1), "c": np.float64(1) / 3, "d": 3, "e": -0.0, "f": 5e-324}
    with MetricsLogger(run, "sft") as logger:
        logger.log(1, values)
        (row,) = read_metrics(run.metrics_path)  # already on disk while the stage goes on
    assert {name: row[name] for name in values} == {name: float(value) for name, value in values.items()}
    assert row["b"] == 0.10000000149011612
    assert (row["stage"], row["step"]) == ("sft", 1)
    assert row["time"] > 1.6e9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_is_not_written(run, value):
    with MetricsLogger(run, "rl") as logger:
        logger.log(6, {"loss": 1.0})
        with pytest.raises(InvariantError, match="^rl step 7: metric 'val/ratio' is .*must be finite"):
            logger.log(7, {"loss": 1.0, "val/ratio": value})
    assert rows(run) == [("rl", 6, 1.0)]


def test_bookkeeping_names_are_no_metrics(run):
    with MetricsLogger(run, "rl") as logger, pytest.raises(ValueError, match="'step' is not a name for a metric"):
        logger.log(1, {"step": 1.0})


def test_resume_cuts_only_this_stage_and_only_beyond_the_checkpoint(run):
    log(run, "sft", range(4))
    log(run, "reward", range(6))
    log(run, "reward", range(4, 6), resume_from=3, scale=10.0)
    expected = [("sft", step, step) for step in range(4)] + [("reward", step, step) for step in range(4)]
    assert rows(run) == [*expected, ("reward", 4, 40.0), ("reward", 5, 50.0)]


def test_a_stage_that_starts_over_leaves_no_row_of_its_first_try(run):
    log(run, "sft", range(2))
    log(run, "reward", range(3))
    log(run, "reward", range(2), scale=10.0)
    assert rows(run) == [("sft", 0, 0), ("sft", 1, 1), ("reward", 0, 0), ("reward", 1, 10.0)]


def test_a_row_cut_off_by_a_crash_is_left_out_and_then_removed(run):
    log(run, "sft", range(1, 3))
    with run.metrics_path.open("a") as file:
        file.write('{"stage": "sft", "step": 3, "lo')
    assert [row[1] for row in rows(run)] == [1, 2]
    log(run, "sft", [3], resume_from=2)
    assert [row[1] for row in rows(run)] == [1, 2, 3]
    assert all(json.loads(line) for line in run.metrics_path.read_text().splitlines())


def test_a_damaged_row_is_named(run):
    log(run, "sft", range(2))
    text = run.metrics_path.read_text()
    run.metrics_path.write_text(text + "nonsense\n" + text)
    with pytest.raises(UserError, match=r"metrics.jsonl:3: not a row of metrics"):
        read_metrics(run.metrics_path)


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_rows_by_stage_are_joined_by_step():
    some = [
        {"stage": "rl", "step": 2, "time": 0.0, "a": 1.0},
        {"stage": "rl", "step": 1, "time": 0.0, "a": 2.0},
        {"stage": "rl", "step": 2, "time": 0.0, "b": 3.0},
    ]
    assert by_stage(some) == {"rl": {1: {"a": 2.0}, 2: {"a": 1.0, "b": 3.0}}}
    assert list(by_stage(some)["rl"]) == [1, 2]


def scalars(run, stage, tag):
    events = EventAccumulator(str(run.tensorboard_path(stage)))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_the_same_numbers_and_forgets_redone_steps(run):
    log(run, "sft", range(6))
    assert scalars(run, "sft", "loss") == [(step, step) for step in range(6)]
    log(run, "sft", range(4, 6), resume_from=3, scale=10.0)
    assert scalars(run, "sft", "loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
