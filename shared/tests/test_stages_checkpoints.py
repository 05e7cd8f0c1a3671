"""A stage's checkpoints count once they are on disk, and never before; several processes leave what one leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.engine import Engine, Model
from diptych.recipe.load import load_recipe
from diptych.run.directory import RunDirectory
from diptych.run.metrics import MetricsLogger
from diptych.run.progress import Progress
from diptych.stages.checkpoints import Checkpoints
from diptych.stages.context import Datasets, StageContext
from diptych.world import SINGLE, World

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


class Slow(Model):
    """A model that writes when it is waited for. fails: then the disk is full."""

    def __init__(self, value=0, fails=False):
        self.value, self.fails, self.events = value, fails, []

    def save_checkpoint(self, directory):
        held = self.value
        self.events.append(f"copied {held}")

        def wait():
            if self.fails:
                raise OSError("disk full")
            (directory / "value").write_text(str(held))
            self.events.append(f"written {held}")

        return wait

    def load_checkpoint(self, directory):
        self.value = int((directory / "value").read_text())


class NoEngine(Engine):
    pass


def make(tmp_path, models, *, resume=False, world=SINGLE):
    recipe = load_recipe(QUICKSTART, ["checkpoint.keep=2"])
    run = RunDirectory.create(
        tmp_path / "run", recipe, engine="numpy", environment={}, resume=resume, stages=("sft",), world=world
    )
    context = StageContext(
        recipe=recipe, engine=NoEngine(), run=run, tokenizers={}, tokenizer_directories={}, datasets=Datasets(),
        resume=resume,
    )  # fmt: skip
    return run, Checkpoints(context, "sft", models)


def steps(run):
    return [step for step, _ in run.checkpoints("sft")]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    model = Slow(value=10)
    run, checkpoints = make(tmp_path, {"model": model})
    with checkpoints:
        checkpoints.save(1, {"seconds": 1.0})
        assert model.events == ["copied 10"]
        assert steps(run) == []  # not yet
        model.value = 20
        checkpoints.save(2, {"seconds": 2.0})
        assert model.events == ["copied 10", "written 10", "copied 20"]
        assert steps(run) == [1]
        model.value = 30
    assert steps(run) == [1, 2]
    resumed = Slow()
    assert make(tmp_path, {"model": resumed}, resume=True)[1].load() == (2, {"seconds": 2.0})
    assert resumed.value == 20
    assert make(tmp_path, {"model": resumed}, resume=True)[0].latest_checkpoint("sft")[0] == 2  # type: ignore[index]


def test_an_error_in_the_stage_still_finishes_the_checkpoint_before_it(tmp_path):
    model = Slow(value=10)
    run, checkpoints = make(tmp_path, {"model": model})

    def interrupted():
        with checkpoints:
            checkpoints.save(1, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps(run) == [1]


@pytest.mark.parametrize("broken", ["a", "b"])
def test_a_checkpoint_that_could_not_be_written_does_not_count(tmp_path, broken):
    models = {"a": Slow(value=1), "b": Slow(value=1)}
    run, checkpoints = make(tmp_path, models)

    def trained():
        with checkpoints:
            checkpoints.save(1, {})
            models[broken].fails = True
            checkpoints.save(2, {})

    with pytest.raises(OSError, match="disk full"):
        trained()
    assert steps(run) == []  # the wait for step 1 failed
    assert [path.name for path in (run.path / "checkpoints" / "sft").iterdir()] == []

    models[broken].fails = False
    with checkpoints:
        checkpoints.save(3, {})
        models[broken].fails = True
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save(4, {})
        models[broken].fails = False
        checkpoints.save(5, {})
    assert steps(run) == [5]


def test_other_processes_write_nothing(tmp_path):
    """A process that is told what the first one did (nothing, here) leaves no byte of its own."""
    run, _ = make(tmp_path, {})
    before = sorted(run.path.rglob("*"))
    other = RunDirectory(run.path, World(index=1, count=2, gather=Told()))
    with MetricsLogger(other, "sft") as logger, Progress(2, "sft", silent=not other.world.is_main) as bar:
        logger.log(1, {"loss": 1.0})
        bar.advance()
    other.begin("sft")
    other.add_samples("sft", "before", [])
    assert sorted(run.path.rglob("*")) == before
    assert json.loads((run.path / "state.json").read_text()) == {}
    assert run.status("sft") is None
    with MetricsLogger(run, "sft") as logger:  # canary: the first does write
        logger.log(1, {"loss": 1.0})
    assert sorted(run.path.rglob("*")) != before


class Told:
    """The gather of a process whose process 0 always answers that all went well."""

    def __call__(self, message):
        import pickle

        import numpy as np

        answer = pickle.dumps((True, None))
        if len(message) == 8:
            row = np.frombuffer(len(answer).to_bytes(8, "little"), np.uint8)
        else:
            row = np.zeros_like(message)
            row[: len(answer)] = np.frombuffer(answer, np.uint8)
        return np.stack([row, message])
