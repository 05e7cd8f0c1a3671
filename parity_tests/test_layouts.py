"""Whole runs of the JAX engine on meshes of eight CPU devices against one device: sft, reward and rl for 20 updates
each in float64, every logged metric within 1e-9, every sampled token equal, nothing compiled after the second
iteration.
"""

from __future__ import annotations

import pytest

from diptych.parity.compare import metrics
from diptych.parity.tolerances import TOLERANCES
from parity_tests.runs import numbers, run

LIMIT = TOLERANCES["layout"].at("float64")
SETTINGS = [
    "precision=float64", "data.demonstrations.limit=200", "data.preferences.limit=200", "data.prompts.limit=100",
    "data.buckets=[8,16,32,64,128]", "model.new.hidden_size=32", "model.new.intermediate_size=64",
    "model.new.num_attention_heads=4", "model.new.num_key_value_heads=4", "model.new.num_hidden_layers=2",
    "sft.max_steps=20", "sft.batch_size=8", "sft.micro_batch_size=8", "sft.eval_every=20",
    "reward.max_steps=20", "reward.batch_size=4", "reward.micro_batch_size=4", "reward.eval_every=20",
    "rl.iterations=10", "rl.epochs=2", "rl.batch_size=8", "rl.micro_batch_size=8", "rl.mini_batches=1",
    "rl.eval_prompts=8", "rl.learning_rate=1e-3", "rollout.max_new_tokens=12",
]  # fmt: skip
LAYOUTS = {
    "fsdp 8, decode data 2, tensor 4": ("data: 1, fsdp: 8, tensor: 1", "data: 2, tensor: 4", []),
    "data 2, fsdp 2, tensor 2, decode data 4, tensor 2": (
        "data: 2, fsdp: 2, tensor: 2",
        "data: 4, tensor: 2",
        ["rl.micro_batch_size=4", "layout.offload=[reference,reward]", "layout.switch={chunk_mb: 1, check: logprobs}"],
    ),
    "data 8, decode data 8, rows refilled": (
        "data: 8, fsdp: 1, tensor: 1", "data: 8, tensor: 1", ["sft.micro_batch_size=1", "rollout.decode_rows=8"],
    ),
    "tensor 4, data 2, decode data 8, other roles elsewhere": (
        "data: 2, fsdp: 1, tensor: 4",
        "data: 8, tensor: 1",
        ["layout.critic={data: 1, fsdp: 8, tensor: 1}", "layout.reward={data: 4, fsdp: 1, tensor: 2}"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run("quickstart", "jax", tmp_path_factory.mktemp("one"), SETTINGS, quick=True)


@pytest.mark.slow
@pytest.mark.xdist_group("layouts")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_does_not_depend_on_its_layout(layout, one_device, tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_DEVICES", "8")
    train, decode, more = LAYOUTS[layout]
    settings = [*SETTINGS, f"layout.train={{{train}}}", f"layout.decode={{{decode}}}", *more]
    rows = run("quickstart", "jax", tmp_path, settings, quick=True)
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in one_device]
    found = []
    for here, there in zip(one_device, rows, strict=True):
        name = f"{here['stage']} {here['step']}"
        found += metrics(name, numbers(here), numbers(there), limit=LIMIT, floor=1e-12)
    assert not found, "\n".join(map(str, found[:20]))
    rollouts = [row for row in rows if "rollout/tokens_crc32" in row]
    assert len(rollouts) == 10
    assert [row["compilations"] for row in rollouts[2:]] == [0.0] * 8
    assert rollouts[0]["compilations"] > 0  # canary: it counts
    if "chunk_mb" in str(more):
        assert all(row["switch/logprob_gap_max"] < LIMIT for row in rollouts[2:])
    # Canary: the comparison sees a tenth of a millionth.
    last = {**numbers(rows[-1]), "objective/kl": numbers(rows[-1])["objective/kl"] + 1e-7}
    assert metrics("rl", numbers(one_device[-1]), last, limit=LIMIT, floor=1e-12)
