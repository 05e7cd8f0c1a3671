"""float64, free-running: both engines run all three stages of the quickstart model on their own, 100 steps each, and
every logged metric agrees to 1e-8 relative, every sampled token is equal. The runs are separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.parity.compare import metrics
from diptych.parity.tolerances import TOLERANCES
from diptych.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "precision=float64",
    "data.demonstrations.limit=1000",
    "data.preferences.limit=1000",
    "sft.batch_size=16",
    "sft.micro_batch_size=8",
    "reward.batch_size=16",
    "reward.micro_batch_size=8",
    "rl.batch_size=16",
    "rl.micro_batch_size=8",
    "rl.eval_prompts=16",
    "rl.eval_every=50",
    # A quarter of the batch wants calmer rates: else chaos multiplies rounding by ten every five iterations.
    "rl.learning_rate=3e-5",
    "rl.critic_learning_rate=1e-4",
    "rl.max_kl=null",
]
# Not numbers of the algorithm: how long things took.
TIMING = ("timing_s/", "time", "eps", "tokens_per_second")
# Values that are themselves differences of nearly equal numbers, i.e. rounding noise around 0.
NOISE = ("rollout/logprob_gap", "policy/first_ratio_deviation", "rollout/token_mult_prob_error")


def run(engine: str, output: Path, *settings: str) -> list[dict]:
    command = [sys.executable, "-m", "diptych.cli", "run", "recipes/quickstart.yaml", "--engine", engine]
    done = subprocess.run(
        [*command, "--output", str(output), *SETTINGS, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"DIPTYCH_PROGRESS": "off"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output / "metrics.jsonl")


def numbers(row: dict) -> dict[str, float]:
    skip = TIMING + NOISE
    return {k: v for k, v in row.items() if k not in ("stage", "step") and not k.startswith(skip)}


def compare(a: list[dict], b: list[dict]) -> list:
    assert [(r["stage"], r["step"]) for r in a] == [(r["stage"], r["step"]) for r in b]
    limit = TOLERANCES["trajectory_relative"].float64
    found = []
    for x, y in zip(a, b, strict=True):
        found += metrics(f"{x['stage']} {x['step']}", numbers(x), numbers(y), limit=limit, floor=1e-12)
    return found


@pytest.mark.slow
def test_a_hundred_steps_of_each_stage(tmp_path):
    steps = ["sft.max_steps=100", "reward.max_steps=100", "rl.iterations=100"]
    a = run("jax", tmp_path / "jax", *steps)
    b = run("torch", tmp_path / "torch", *steps)
    for stage in ("sft", "reward", "rl"):
        assert max(row["step"] for row in a if row["stage"] == stage) == 100
    assert sum("rollout/tokens_crc32" in row for row in a) == 100  # every rollout's tokens are compared
    found = compare(a, b)
    assert not found, "\n".join(map(str, found[:20]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "stage"),
    [("sft.optimizer.eps=1.1e-5", "sft"), ("reward.center_coef=0.0101", "reward"), ("rl.value_clip_range=0.21", "rl")],
)
def test_canary_a_small_change_of_one_side_is_seen(tmp_path, bug, stage):
    steps = ["sft.max_steps=3", "reward.max_steps=3", "rl.iterations=3"]
    steps += ["sft.optimizer.warmup_steps=1", "reward.optimizer.warmup_steps=1"]
    a = run("torch", tmp_path / "a", *steps)
    b = run("torch", tmp_path / "b", *steps, bug)
    found = compare(a, b)
    assert found
    assert found[0].name.startswith(stage)
