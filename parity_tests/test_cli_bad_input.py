"""Bad input: one clear line (what, where, what to do), exit code 2, and nothing half-written. Both engines where the
engine matters, else the JAX engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diptych import cli, engine
from diptych.data.tokenizer import Tokenizer
from diptych.weights.huggingface import initial_checkpoint, write_checkpoint

TEXTS = [f"the {a} {b} is {c}" for a in ("red", "old", "big") for b in ("cat", "dog", "car") for c in ("here", "there")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tokenizer_directory = root / "tokenizer"
    tokenizer_directory.mkdir()
    tokenizer = Tokenizer.train(TEXTS, vocab_size=280, directory=tokenizer_directory)
    config = {
        "model_type": "llama",
        "vocab_size": 280,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_checkpoint(root / "m", initial_checkpoint(config, seed=0), tokenizer_directory=tokenizer_directory)
    return root / "m"


@pytest.fixture
def work(tmp_path, model, monkeypatch):
    """A working directory with a recipe that runs, to be broken in one place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    rows = [{"prompt": f"say {i}", "response": TEXTS[i % len(TEXTS)]} for i in range(40)]
    write(tmp_path / "demos.jsonl", rows)
    write(
        tmp_path / "pairs.jsonl", [{"prompt": f"p {i}", "chosen": "good cat", "rejected": "bad dog"} for i in range(40)]
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


RECIPE = """\
name: small
model: {path: model}
data:
  demonstrations: {path: demos.jsonl}
  preferences: {path: pairs.jsonl}
  prompts: {path: demos.jsonl}
  max_prompt_tokens: 32
  max_response_tokens: 32
  buckets: [32, 64]
sft: {max_steps: 1, batch_size: 4, micro_batch_size: 4}
reward: {max_steps: 1, batch_size: 4, micro_batch_size: 4}
rl: {iterations: 1, batch_size: 4, micro_batch_size: 4, eval_prompts: 4}
rollout: {max_new_tokens: 8}
"""


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def edit_tensors(work: Path) -> None:
    tensors = load_file(work / "model/model.safetensors")
    tensors["model.norm.weight"] = np.ones(17, np.float32)
    save_file(tensors, work / "model/model.safetensors")


def edit_config(work: Path, **changes) -> None:
    path = work / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_run(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out/recipe.yaml").write_text("name: another\n")


LONG = json.dumps({"prompt": "say " * 200, "response": "ok"})
# name: (what breaks it, extra arguments, what the line must say)
CASES = {
    "typo": (None, ["sft.learnin_rate=1"], ["sft.learnin_rate", "sft.learning_rate"]),
    "typo in the file": (
        lambda w: replace_line(w / "recipe.yaml", 10, "sft: {max_step: 1}"), [], ["recipe.yaml:10", "max_steps"],
    ),
    "wrong type": (None, ["sft.learning_rate=fast"], ["sft.learning_rate", "fast"]),
    "impossible": (None, ["rl.reward.function=a.py:f", "rl.reward.model_path=model"], ["rl.reward"]),
    "missing recipe": (lambda w: (w / "recipe.yaml").unlink(), [], ["recipe.yaml"]),
    "missing data": (None, ["data.demonstrations.path=nowhere.jsonl"], ["nowhere.jsonl"]),
    "missing model": (None, ["model.path=nowhere"], ["nowhere"]),
    "malformed line": (lambda w: replace_line(w / "demos.jsonl", 7, '{"prompt": '), [], ["demos.jsonl:7"]),
    "empty response": (
        lambda w: replace_line(w / "demos.jsonl", 3, '{"prompt": "a", "response": ""}'), [], ["demos.jsonl:3"],
    ),
    "identical pair": (
        lambda w: replace_line(w / "pairs.jsonl", 5, '{"prompt": "a", "chosen": "b", "rejected": "b"}'),
        [], ["pairs.jsonl:5"],
    ),
    "long prompt": (lambda w: replace_line(w / "demos.jsonl", 2, LONG), [], ["demos.jsonl:2", "max_prompt_tokens"]),
    "other shape": (edit_tensors, [], ["model.norm.weight", "[17]", "[16]"]),
    "vocabulary": (lambda w: edit_config(w, vocab_size=200), [], ["200"]),
    "another run": (other_run, [], ["out"]),
    "no pad token": (
        lambda w: (
            edit_config(w, pad_token_id=None),
            (w / "model/generation_config.json").unlink(),
            (w / "model/tokenizer_config.json").write_text('{"eos_token": "<|end|>"}'),
        ),
        [], ["pad_token"],
    ),
    "reward function": (None, ["rl.reward.function=gone.py:f"], ["gone.py"]),
    "offload without ZeRO": (None, ["layout.zero.offload_optimizer=cpu"], ["layout.zero.offload_optimizer", "stage 1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_code_2_and_nothing_written(name, work, capsys):
    break_it, overrides, needles = CASES[name]
    if break_it:
        break_it(work)
    before = sorted(path for path in work.rglob("*"))
    code = cli.main(["run", "recipe.yaml", "--engine", "jax", "--output", "out", *overrides])
    error = capsys.readouterr().err
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("diptych: error:")]
    assert len(lines) == 1
    for needle in needles:
        assert needle in lines[0], lines[0]
    assert sorted(path for path in work.rglob("*")) == before


@pytest.mark.parametrize(
    ("engine_name", "variables", "needle"),
    [
        ("torch", {}, "nothing says which processes belong together: start them with torchrun, deepspeed or srun"),
        ("jax", {"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID is set, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not"),
    ],
)
def test_processes_that_cannot_be_are_refused(engine_name, variables, needle, work, capsys, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = cli.main(["run", "recipe.yaml", "--engine", engine_name, "--output", "out", "--distributed"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert f"diptych: error: --distributed: {needle}" in error
    assert not (work / "out").exists()


def test_the_unbroken_recipe_runs(work, capsys):  # canary: the cases above fail for their own reason
    assert cli.main(["run", "recipe.yaml", "--engine", "jax", "--output", "out"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["stages"]) == {"sft", "reward", "rl"}
    assert (work / "out/report.html").is_file()


def test_an_engine_that_is_not_installed_names_its_extra(work, capsys, monkeypatch):
    monkeypatch.setattr(engine, "_is_installed", lambda package: package != "deepspeed")
    assert cli.main(["run", "recipe.yaml", "--engine", "torch", "--output", "out"]) == 2
    assert "pip install 'diptych[torch]'" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_long_rows_are_counted_when_the_recipe_says_so(work, capsys):
    replace_line(work / "demos.jsonl", 2, LONG)
    arguments = ["run", "recipe.yaml", "--engine", "jax", "--output", "out", "--stage", "sft", "data.too_long=drop"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)["stages"]["sft"]["data"]
    assert report["dropped"] == 1


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--max-new-tokens", "100"], "positions"),
        (["--temperature", "-1"], "--temperature"),
    ],
)
def test_generate_refuses_what_it_cannot_do(work, capsys, arguments, needle):
    assert cli.main(["generate", "model", "--engine", "jax", "--prompt", "the cat", *arguments]) == 2
    assert needle in capsys.readouterr().err


def test_arguments_that_are_no_settings_are_refused(work):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "recipe.yaml", "--engine", "jax", "--ouput", "x"])
    assert stop.value.code == 2
