"""Every ZeRO stage in one process and in two real ones (gloo) against the JAX engine on one device.

float64, running free: sft, reward and rl for 20 updates each, every logged metric within 1e-8 and every token equal,
whatever the micro-batch; then adapters, a mixture of experts, an RNN. float32: PPO in lockstep, two steps of it at each
stage. bfloat16: it trains, and sees the same loss. Seeded bugs of data parallelism are each seen.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diptych.parity.tolerances import TOLERANCES
from diptych.run.metrics import read_metrics
from parity_tests.runs import compare
from parity_tests.zero_runs import BUGS, SPLIT_ALL, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("zero")]

DATA = [
    "data.demonstrations.limit=120", "data.preferences.limit=120", "data.prompts.limit=120", "data.too_long=truncate",
    "data.max_response_tokens=24", "data.buckets=[64]", "model.new.vocab_size=300", "rollout.max_new_tokens=8",
]  # fmt: skip
MODEL = [
    "model.new.hidden_size=16", "model.new.intermediate_size=24", "model.new.num_attention_heads=4",
    "model.new.num_key_value_heads=2", "model.new.num_hidden_layers=1",
]  # fmt: skip
TRAINING = [
    "precision=float64", "sft.batch_size=8", "sft.micro_batch_size=4", "sft.optimizer.warmup_steps=0",
    "reward.batch_size=4", "reward.micro_batch_size=4", "reward.optimizer.warmup_steps=0",
    "rl.batch_size=8", "rl.micro_batch_size=4", "rl.mini_batches=1", "rl.eval_prompts=8", "rl.learning_rate=1e-3",
    *(f"{stage}.optimizer.max_grad_norm=0.3" for stage in ("sft", "reward", "rl")),  # clipping is at work
]  # fmt: skip
SMALL = [*DATA, *MODEL, *TRAINING]
TWENTY = [
    *SMALL, "sft.max_steps=20", "sft.eval_every=20", "reward.max_steps=20", "reward.eval_every=20", "rl.iterations=10",
    "rl.epochs=2",
]  # fmt: skip
RULE = "rl.reward.function=diptych.data.tasks.postcards:score"
PPO = [
    *SMALL, "stages=[rl]", "rl.iterations=1", "rl.epochs=2", "rl.batch_size=4", "rl.micro_batch_size=2",
    "rl.eval_prompts=4", RULE,
]  # fmt: skip
SFT = [*DATA, *TRAINING, "stages=[sft]", "sft.max_steps=3"]
ADAPTER = "{rank: 2, alpha: 4, targets: [q_proj, v_proj, mlp.up_proj]}"
MIXTRAL = (
    "{model_type: mixtral, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 4, max_position_embeddings: 128, tie_word_embeddings: false, rms_norm_eps: "
    "1.0e-5, rope_theta: 10000.0, num_local_experts: 4, num_experts_per_tok: 2}"
)
# The quickstart's settings of a Llama, taken back.
NO_LLAMA = [f"model.new.{name}=null" for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")]
NOTHING = [f"model.new.{name}=null" for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings")]
# What is run, by the JAX engine on one device as it stands here.
RECIPES = {
    "twenty updates": TWENTY,
    "adapters": [*PPO, f"rl.adapter={ADAPTER}", f"rl.critic_adapter={ADAPTER}"],
    "experts": [*SFT, "model.balance_coef=0.1", f"model.new.config={MIXTRAL}", *NO_LLAMA, *NOTHING],
    "rnn": [*SFT, "model.new.family=rnn", "model.new.hidden_size=16", *NO_LLAMA],
    "bfloat16": [*SFT, *MODEL, "sft.max_steps=1", "precision=bfloat16"],
}
# (recipe, stage, micro-batch) of the torch engine, in one process and in two. Two processes fill up a micro-batch of 1.
FREE_RUNS = {
    1: [("twenty updates", 0, 1), ("twenty updates", 1, 2), ("twenty updates", 2, 4), ("twenty updates", 3, 4)],
    2: [
        ("twenty updates", 0, 4), ("twenty updates", 1, 1), ("twenty updates", 2, 2), ("twenty updates", 3, 4),
        ("adapters", 0, 2), ("adapters", 1, 2), ("adapters", 2, 1), ("adapters", 3, 2),
        ("experts", 2, 1), ("experts", 3, 1), ("rnn", 1, 4), ("rnn", 3, 4),
    ],
}  # fmt: skip
BFLOAT16 = (1, 2, 3)
# Where each bug is seeded (stage, micro-batch), and a metric of sft that shows it; None: the run itself stops in rl.
CANARIES = {
    "the mean of gradients over processes": (1, 4, "grad_norm"),
    "filler rows count": (0, 1, "loss"),
    "a denominator of one process": (0, 4, "loss"),
    "metrics of one process": (0, 4, "loss"),
    "Adam's dummy step": (0, 4, "loss"),
    "clipping by one process": (2, 4, "loss"),
    "rows in another order": (0, 2, None),
}
LOCKSTEP_STAGES, LOCKSTEP_STEPS = (1, 2, 3), 2


def settings(recipe: str, stage: int, micro_batch: int) -> list[str]:
    sizes = [f"{name}.micro_batch_size={micro_batch}" for name in ("sft", "reward", "rl")]
    return [*RECIPES[recipe], *sizes, f"layout.zero.stage={stage}", SPLIT_ALL]


def name(recipe: str, stage: int, micro_batch: int) -> str:
    return f"{recipe}, stage {stage}, micro-batch {micro_batch}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, each in its folder: jax/RECIPE, PROCESSES/NAME, canaries/BUG, bfloat16/STAGE."""
    root = tmp_path_factory.mktemp("zero")
    reference = [{"output": str(root / "jax" / one), "settings": chosen} for one, chosen in RECIPES.items()]
    cases = {
        count: [{"output": str(root / str(count) / name(*case)), "settings": settings(*case)} for case in found]
        for count, found in FREE_RUNS.items()
    }
    for stage in BFLOAT16:
        chosen = [*settings("bfloat16", stage, 4), "stages=[sft,rl]", "rl.iterations=2", RULE]
        cases[2].append({"output": str(root / "bfloat16" / str(stage)), "settings": chosen})
    for bug, (stage, micro_batch, metric) in CANARIES.items():
        chosen = settings("adapters" if metric is None else "twenty updates", stage, micro_batch)
        output = str(root / "canaries" / bug)
        cases[2].append({"output": output, "settings": [*chosen, *(["stages=[sft]"] if metric else [])], "bug": bug})
    with ThreadPoolExecutor() as pool:  # one process each
        alone = [pool.submit(launch, *work, processes=1) for work in (("jax", reference), ("torch", cases[1]))]
        for one in alone:
            one.result()
    launch("torch", cases[2], processes=2)
    return root


def rows_of(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.parametrize(
    ("processes", "case"),
    [(count, case) for count, cases in FREE_RUNS.items() for case in cases],
    ids=lambda value: name(*value) if isinstance(value, tuple) else f"processes {value}",
)
def test_zero_changes_no_number(processes, case, runs):
    recipe, stage, _ = case
    expected, found = rows_of(runs / "jax" / recipe), rows_of(runs / str(processes) / name(*case))
    differences = compare(expected, found)
    assert not differences, "\n".join(map(str, differences[:20]))
    environment = json.loads((runs / str(processes) / name(*case) / "environment.json").read_text())
    assert environment["engine_environment"]["processes"] == str(processes)
    assert environment["engine_environment"]["zero/policy"] == f"stage {stage}"
    if recipe == "twenty updates":
        assert {one: max(row["step"] for row in found if row["stage"] == one) for one in ("sft", "reward", "rl")} == {
            "sft": 20, "reward": 20, "rl": 10,
        }  # fmt: skip
        assert sum("rollout/tokens_crc32" in row for row in found) == 10
    if recipe == "experts":
        assert all(row["router/balance_loss"] > 0 for row in found if "loss" in row)


@pytest.mark.parametrize("bug", CANARIES)
def test_canary_a_bug_of_data_parallelism_is_seen(bug, runs):
    """The same recipes without the bug differ in nothing: above."""
    assert CANARIES.keys() == BUGS.keys()
    metric, run = CANARIES[bug][2], runs / "canaries" / bug
    if metric is None:
        assert all("what generates is not what is trained" in (run / f"stopped-{rank}").read_text() for rank in (0, 1))
        return
    expected = [row for row in rows_of(runs / "jax" / "twenty updates") if row["stage"] == "sft"]
    differences = compare(expected, rows_of(run))
    assert any(one.name.endswith(f"/{metric}") for one in differences), list(map(str, differences[:20]))


def test_zero_in_bfloat16_generates_what_it_trains(runs):
    """The first batch's loss, before any update, is what JAX sees in bfloat16, the same at every stage; it goes down
    from there; and the sampler's log-probabilities are the training forward's up to the precision."""
    limit = TOLERANCES["sampler_gap"].at("bfloat16")
    (expected,) = (row["loss"] for row in rows_of(runs / "jax" / "bfloat16") if "loss" in row)
    firsts = set()
    for stage in BFLOAT16:
        run = runs / "bfloat16" / str(stage)
        rows = rows_of(run)
        firsts.add(next(row["loss"] for row in rows if "loss" in row))
        held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
        assert held_out[-1] < held_out[0]
        gaps = [row["rollout/logprob_gap_max"] for row in rows if "rollout/logprob_gap_max" in row]
        assert len(gaps) == 2
        assert 0 < max(gaps) < limit  # 0 would be another precision; the gate has stopped what is worse
    assert len(firsts) == 1
    assert 0 < abs(firsts.pop() - expected) < limit


def test_zero_in_lockstep_at_float32(hot_models, tmp_path):
    """PPO, each process with a JAX engine of its own: tokens, log-probabilities, gradients, moments, new weights."""
    chosen = [
        *DATA, "data.max_prompt_tokens=32", "stages=[rl]", "model.new=null", f"model.path={hot_models['policy']}",
        f"rl.reward.model_path={hot_models['reward']}", "rl.batch_size=8", "rl.micro_batch_size=4", "rl.epochs=1",
        "rl.mini_batches=1", "rl.iterations=6", "rollout.temperature=0.8",
    ]  # fmt: skip
    case = {"output": str(tmp_path), "settings": chosen, "stages": LOCKSTEP_STAGES, "lockstep": LOCKSTEP_STEPS}
    launch("torch", [case], processes=2)
    for stage in LOCKSTEP_STAGES:
        for rank in (0, 1):
            report = json.loads((tmp_path / f"{stage}-{rank}.json").read_text())
            assert not report["differences"], "\n".join(report["differences"][:20])
            assert report["tokens"] > 50
            assert len(report["near_ties"]) <= 1, report["near_ties"]
