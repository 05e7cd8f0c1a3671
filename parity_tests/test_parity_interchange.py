"""Either engine takes what the other left: models between stages, optimizer state, checkpoints, transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diptych import cli
from diptych.parity.compare import tensors
from diptych.parity.tolerances import TOLERANCES
from diptych.run.metrics import read_metrics
from diptych.stages.checkpoints import Checkpoints
from diptych.weights.huggingface import read_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.demonstrations.limit=300",
    "data.preferences.limit=300",
    "data.prompts.limit=200",
    "sft.max_steps=6",
    "sft.batch_size=8",
    "sft.micro_batch_size=8",
    "sft.eval_every=3",
    "reward.max_steps=6",
    "reward.batch_size=8",
    "reward.micro_batch_size=8",
    "reward.eval_every=3",
    "rl.iterations=4",
    "rl.batch_size=8",
    "rl.micro_batch_size=8",
    "rl.mini_batches=1",
    "rl.eval_every=2",
    "rl.eval_prompts=8",
    "rollout.max_new_tokens=24",
    "model.new.hidden_size=64",
    "model.new.intermediate_size=96",
    "rl.ema_decay=0.9",
    "sft.optimizer.warmup_steps=2",
    "reward.optimizer.warmup_steps=2",
]


def run(engine: str, output: Path, *settings: str) -> None:
    code = cli.main(
        ["run", str(ROOT / "recipes/quickstart.yaml"), "--engine", engine, "--output", str(output), *SMALL, *settings]
    )
    assert code == 0


def rows_of(output: Path) -> list[dict]:
    clock = ("timing_s/", "switch/", "compilations", "time", "eps", "tokens_per_second")
    return [
        {key: value for key, value in row.items() if not key.startswith(clock)}
        for row in read_metrics(output / "metrics.jsonl")
    ]


@pytest.fixture
def interrupt_after(monkeypatch):
    """Let runs end when a stage has saved its checkpoint of a step."""
    save = Checkpoints.save

    def at(stage, step):
        def saved_and_gone(checkpoints, done, progress):
            save(checkpoints, done, progress)
            if (checkpoints._stage, done) == (stage, step):
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", saved_and_gone)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_an_interrupted_run_resumes_to_the_same_numbers_bit_for_bit(engine, tmp_path, interrupt_after):
    run(engine, tmp_path / "whole", "checkpoint.every=2")
    arguments = ["run", str(ROOT / "recipes/quickstart.yaml"), "--engine", engine]
    arguments += ["--output", str(tmp_path / "parts"), *SMALL, "checkpoint.every=2"]
    interrupt_after("reward", 4)
    assert cli.main(arguments) == 130
    interrupt_after("rl", 2)
    assert cli.main([*arguments, "--resume"]) == 130
    assert cli.main([*arguments, "--resume"]) == 0

    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    for name in ("sft", "reward", "rl", "rl-critic", "rl-ema"):
        a = read_checkpoint(tmp_path / "whole/models" / name, precision="float32").weights
        b = read_checkpoint(tmp_path / "parts/models" / name, precision="float32").weights
        assert all(np.array_equal(a[key], b[key]) for key in a)
    summaries = [json.loads((tmp_path / part / "summary.json").read_text()) for part in ("whole", "parts")]
    for stage in ("sft", "reward", "rl"):
        clean = [{k: v for k, v in s["stages"][stage].items() if k != "seconds"} for s in summaries]
        assert clean[0] == clean[1]


@pytest.mark.slow
def test_an_interrupted_run_resumes_at_other_zero_stages(tmp_path, interrupt_after):
    """In the middle, and after the last step of all."""
    few = ["precision=float64", "checkpoint.every=1", "sft.max_steps=2", "reward.max_steps=2", "rl.iterations=2"]
    few += [f"{stage}.optimizer.warmup_steps=1" for stage in ("sft", "reward")]
    run("torch", tmp_path / "whole", *few)
    arguments = ["run", str(ROOT / "recipes/quickstart.yaml"), "--engine", "torch", "--output", str(tmp_path / "parts")]
    arguments += [*SMALL, *few]
    interrupt_after("rl", 1)
    assert cli.main([*arguments, "layout.zero.stage=3"]) == 130
    interrupt_after("rl", 2)
    moved = ["layout.zero.stage=1", "layout.zero_critic.stage=2", "deepspeed={steps_per_print: 1000}"]
    assert cli.main([*arguments, *moved, "--resume"]) == 130
    assert cli.main([*arguments, "--resume"]) == 0

    limit = TOLERANCES["layout"].at("float64")
    parts, whole = (rows_of(tmp_path / name) for name in ("parts", "whole"))
    assert len(parts) == len(whole)
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=limit, abs=limit)
    for name in ("sft", "reward", "rl", "rl-critic", "rl-ema"):
        a, b = (
            dict(read_checkpoint(tmp_path / part / "models" / name, precision="float64").weights)
            for part in ("whole", "parts")
        )
        assert not tensors(name, a, b, limit=limit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("first", "second"), [("jax", "torch"), ("torch", "jax")])
def test_each_stage_can_change_engines(first, second, tmp_path):
    import transformers

    run(first, tmp_path / "a", "stages=[sft]")
    sft = tmp_path / "a/models/sft"
    run(second, tmp_path / "b", "stages=[reward]", f"reward.model_path={sft}")
    reward = tmp_path / "b/models/reward"
    run(first, tmp_path / "c", "stages=[rl]", f"rl.policy_path={sft}", f"rl.reward.model_path={reward}")
    for directory, auto in (
        (sft, "AutoModelForCausalLM"),
        (tmp_path / "c/models/rl", "AutoModelForCausalLM"),
        (tmp_path / "c/models/rl-ema", "AutoModelForCausalLM"),
        (reward, "AutoModelForSequenceClassification"),
        (tmp_path / "c/models/rl-critic", "AutoModelForSequenceClassification"),
    ):
        _, info = getattr(transformers, auto).from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), (directory, info)
        assert transformers.AutoTokenizer.from_pretrained(directory).chat_template
        assert (directory / "generation_config.json").is_file()


@pytest.mark.slow
def test_the_same_three_stages_give_the_same_models_in_float64(tmp_path):
    run("jax", tmp_path / "jax", "precision=float64")
    run("torch", tmp_path / "torch", "precision=float64")
    for name in ("sft", "reward", "rl", "rl-critic", "rl-ema"):
        a, b = (
            dict(read_checkpoint(tmp_path / engine / "models" / name, precision="float64").weights)
            for engine in ("jax", "torch")
        )
        assert not tensors(name, a, b, limit=1e-8)
        a["model.norm.weight"] = a["model.norm.weight"] * (1 + 1e-7)
        assert tensors(name, a, b, limit=1e-8)  # canary
