"""float64, free-running: both engines run all three stages of the quickstart model on their own, 100 steps each, and
every logged metric agrees to 1e-8 relative, every sampled token is equal. The runs are separate processes."""

from __future__ import annotations

import pytest

from parity_tests.runs import compare, run

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


@pytest.mark.slow
def test_a_hundred_steps_of_each_stage(tmp_path):
    steps = ["sft.max_steps=100", "reward.max_steps=100", "rl.iterations=100"]
    a = run("quickstart", "jax", tmp_path / "jax", SETTINGS + steps)
    b = run("quickstart", "torch", tmp_path / "torch", SETTINGS + steps)
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
    stages = ["sft", "reward", "rl"]
    steps.append(f"stages=[{','.join(stages[: stages.index(stage) + 1])}]")
    a = run("quickstart", "torch", tmp_path / "a", SETTINGS + steps)
    b = run("quickstart", "torch", tmp_path / "b", [*SETTINGS, *steps, bug])
    found = compare(a, b)
    assert found
    assert found[0].name.startswith(stage)
