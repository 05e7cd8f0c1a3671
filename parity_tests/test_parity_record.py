"""Two traces recorded by separate processes and compared by a third: the same, and with a bug planted in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.parity.trace import Trace

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.demonstrations.limit=200",
    "data.preferences.limit=200",
    "data.prompts.limit=100",
    "sft.batch_size=16",
    "sft.micro_batch_size=8",
    "reward.batch_size=16",
    "reward.micro_batch_size=8",
    "rl.batch_size=8",
    "rl.micro_batch_size=4",
    "rl.eval_prompts=8",
    "rollout.max_new_tokens=24",
]


def diptych(*words, ok=(0,)):
    done = subprocess.run(
        [sys.executable, "-m", "diptych.cli", "parity", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"DIPTYCH_PROGRESS": "off", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode in ok, done.stderr[-3000:] + done.stdout[-2000:]
    return done


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What the torch side records of two steps of each stage."""
    work = tmp_path_factory.mktemp("record")
    diptych(
        "record",
        "recipes/quickstart.yaml",
        "--engine",
        "torch",
        "--steps",
        2,
        "--every",
        1,
        "-o",
        work / "a",
        *SETTINGS,
    )
    return work / "a"


@pytest.fixture(scope="module")
def replayed(recorded):
    words = ("--engine", "jax", "--steps", 2, "--replay", recorded)
    diptych("record", "recipes/quickstart.yaml", *words, "-o", recorded.parent / "b", *SETTINGS)
    return recorded.parent / "b"


@pytest.mark.slow
@pytest.mark.xdist_group("record")
def test_the_two_engines_are_the_same_and_every_report_says_so(recorded, replayed, tmp_path):
    done = diptych(
        "compare", recorded, replayed, "--truth", "--html", tmp_path / "r.html", "--json", tmp_path / "r.json",
        "--junit", tmp_path / "r.xml",
    )  # fmt: skip
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["same"]
    assert found["replay"] == "B replays A"
    assert "policy log-probs" in done.stdout
    assert (tmp_path / "r.html").stat().st_size > 20_000
    trace = Trace(replayed)
    assert trace.provenance["replay"]["trace"] == Trace(recorded).fingerprint()
    assert {stage for stage, _ in trace.steps} == {"sft", "reward", "rl"}


BUGS = {  # what the replaying side is told otherwise -> the first red rung
    "rl.value_clip_range=0.21": "loss",
    "rl.lam=0.94": "returns",
    "rl.optimizer.betas=[0.9, 0.999]": "optimizer",
}


@pytest.mark.slow
@pytest.mark.xdist_group("record")
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_planted_in_one_of_them_is_the_first_red_rung(bug, recorded, tmp_path):
    words = ("--engine", "torch", "--steps", 2, "--stage", "rl", "--replay", recorded)
    diptych("record", "recipes/quickstart.yaml", *words, "-o", tmp_path / "b", *SETTINGS, bug)
    done = diptych("compare", recorded, tmp_path / "b", "--truth", "--json", tmp_path / "r.json", ok=(1,))
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["first"]["rung"] == BUGS[bug], done.stdout
    assert "B is wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("record")
def test_what_cannot_be_replayed_or_compared_is_exit_code_2(recorded, replayed, tmp_path):
    words = ("--engine", "torch", "--steps", 2, "--stage", "rl", "--replay", recorded)
    for knob in (("--every", 2), ("--depth", "metrics")):
        done = diptych("record", "recipes/quickstart.yaml", *words, *knob, "-o", tmp_path / "b", *SETTINGS, ok=(2,))
        assert "no effect with --replay" in done.stderr
    other = [*SETTINGS, "data.buckets=[48, 128]"]
    done = diptych("record", "recipes/quickstart.yaml", *words, "-o", tmp_path / "b", *other, ok=(2,))
    assert "replay it with the recipe and data" in done.stderr
    assert diptych("compare", recorded, tmp_path / "none", ok=(2,)).returncode == 2
    assert "is there already" in diptych(
        "record", "recipes/quickstart.yaml", "--engine", "torch", "-o", recorded, ok=(2,)
    ).stderr  # fmt: skip
