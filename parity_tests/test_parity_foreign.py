"""Traces of other trainers against our engines: a plain transformers loop, and real recordings of TRL and Tunix.

The loop is scripts/parity/transformers_loop.py itself. What was recorded is gone through again on both engines
(`foreign_replay`) and walked up the ladder; a mistake planted in the loop must turn the right rung red first.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from diptych.cli import main
from diptych.errors import UserError
from diptych.parity.comparison.rungs import climb
from diptych.parity.foreign.replay import replay
from diptych.parity.trace import Recorded, Trace
from parity_tests.family_checks import engine, quick_compilation

ROOT = Path(__file__).parents[1]
REAL = ROOT / "shared" / "tests" / "foreign_traces"
ENGINES = (pytest.param("jax", marks=pytest.mark.slow), "torch")  # programs of three models are compiled
SIZE = {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "time": 16, "seed": 0}
CLIMBED = {"tokens", "policy", "loss", "gradients", "norm", "optimizer", "weights", "next"}


@pytest.fixture(autouse=True)
def compilation():
    with quick_compilation():
        yield


@cache
def loop():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("transformers_loop", ROOT / "scripts/parity/transformers_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(folder, *, bug=None, steps=1):
    model = loop().random_model(**SIZE).eval()
    data = loop().batches(rows=4, time=SIZE["time"], vocab=SIZE["vocab"], steps=steps, seed=1)
    with loop().open_recording(folder, model, lr=1e-3, rows=4, seed=0) as recording:
        loop().train(model, data, recording, lr=1e-3, bug=bug)
    return Trace(folder)


def both(trace, recorded, name):
    """What the trainer recorded of a step, and what the engine makes of it. What was only logged is left out."""
    own = replay(trace, recorded, engine(name, "float32"))
    return replace(recorded, metrics={key: recorded.metrics[key] for key in own.metrics}), own


def rungs_of(theirs, own):
    return {result.rung.name: result for result in climb(theirs, own, precision="float32")}


def climbed(trace, name):
    """The rungs of every step."""
    return [rungs_of(*both(trace, recorded, name)) for recorded in trace]


def red(rungs):
    return [name for name, result in rungs.items() if result.status == "red"]


@pytest.mark.parametrize("name", ENGINES)
def test_a_plain_loop_computes_what_our_engines_compute(tmp_path, name):
    """Two steps: the second starts from moments."""
    for rungs in climbed(record(tmp_path / "trace", steps=2), name):
        assert red(rungs) == [], [str(one) for result in rungs.values() for one in result.red]
        assert {key for key, result in rungs.items() if result.status == "green"} == CLIMBED


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("bug", "first"),
    [("mean_over_all", "loss"), ("unshifted", "policy"), ("pads_attended", "policy")],
)
def test_a_bug_in_the_loop_turns_its_rung_red_first(tmp_path, name, bug, first):
    (rungs,) = climbed(record(tmp_path / "trace", bug=bug), name)
    assert red(rungs)[0] == first
    assert "gradients" in red(rungs)


def test_the_script_as_a_user_runs_it(tmp_path, monkeypatch, capsys):
    size = ["--layers", "1", "--width", "8", "--heads", "2", "--vocab", "32", "--rows", "2", "--time", "8"]
    monkeypatch.setattr(
        "sys.argv", ["transformers_loop.py", "--output", str(tmp_path / "trace"), "--steps", "2", *size]
    )
    loop().main()
    assert "step 1: loss" in capsys.readouterr().out
    trace = Trace(tmp_path / "trace")
    assert trace.steps == [("sft", 0), ("sft", 1)]
    assert red(climbed(trace, "torch")[1]) == []


@pytest.mark.parametrize("script", ["trl_ppo", "tunix_ppo"])
def test_help_teaches_without_the_other_trainer(script):
    """Neither trainer is installed where ours are; their scripts say how to get them."""
    command = [sys.executable, str(ROOT / f"scripts/parity/{script}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pip install torch" in shown
    assert "--output trl-trace" in shown or "--output tunix-trace" in shown


def test_clipped_gradients_are_refused_by_the_recording(tmp_path):
    with pytest.raises(UserError, match="read them before clipping"):
        record(tmp_path / "trace", bug="clip_before")


@pytest.mark.parametrize("name", ENGINES)
def test_trl(name):
    """TRL 1.12's PPO, two iterations: every rung that it recorded, from tokens to new weights."""
    for rungs in climbed(Trace(REAL / "trl-1.12.0"), name):
        assert red(rungs) == [], [str(one) for result in rungs.values() for one in result.red]
        green = {key for key, result in rungs.items() if result.status == "green"}
        assert (CLIMBED - {"next"}) | {"rewards", "reference", "values", "kl", "returns", "advantages"} <= green


@pytest.mark.parametrize("name", ENGINES)
def test_tunix(name):
    """Tunix 0.1.7's PPO agrees everywhere but where it truncates rewards to integers."""
    for rungs in climbed(Trace(REAL / "tunix-0.1.7"), name):
        assert red(rungs) == ["returns", "advantages"]
        assert rungs["returns"].red[0].name == "shaped"


def off(array, by):
    return Recorded(values=array.values * np.float32(1 + by), layout=array.layout, mask=array.mask, phase=array.phase)


@pytest.mark.parametrize(
    ("name", "rung"),
    [
        ("ref_logprobs", "reference"),
        ("logprobs", "policy"),
        ("values", "values"),
        ("kl", "kl"),
        ("returns", "returns"),
        ("advantages", "advantages"),
        ("critic/gradient/score.weight", "gradients"),
        ("policy/second/model.norm.weight", "optimizer"),
        ("policy/weights/lm_head.weight", "weights"),
    ],
)
def test_a_thousandth_is_seen(name, rung):
    """Each array of the real recording, off by 1e-3, turns its own rung red and no other."""

    def change(step):
        return replace(step, tensors=step.tensors | {name: off(step.tensors[name], 1e-3)})

    theirs, own = last_of_trl()
    assert red(rungs_of(change(theirs), own)) == [rung]


@cache
def last_of_trl():
    trace = Trace(REAL / "trl-1.12.0")
    return both(trace, trace.read(*trace.steps[-1]), "torch")


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "code", "says"), [("trl-1.12.0", 0, "the same"), ("tunix-0.1.7", 1, "A is wrong")])
def test_a_real_recording_is_replayed_and_judged_from_the_command_line(trainer, code, says, tmp_path, capsys):
    """Tunix truncated its rewards to integers: the truth of its own formulas says so."""
    words = ["parity", "record", "--replay", str(REAL / trainer), "--engine", "torch", "-o", str(tmp_path / "ours")]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["parity", "compare", str(REAL / trainer), str(tmp_path / "ours"), "--truth"]) == code
    assert says in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "again"), "--steps", "2"]) == 2
    assert "from its own settings" in capsys.readouterr().err
