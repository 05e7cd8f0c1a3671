"""What the script says: two processes with four devices each equal one with eight (JAX); ZeRO in one process and in two
equals JAX (torch); and their checkpoints go on elsewhere.

Canaries: one number that is 1e-7 off, one token that differs and a step that is missing are each seen.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.run.compare import compare_runs

SCRIPT = Path(__file__).parents[1] / "scripts" / "two_process_cpu.py"


@pytest.mark.slow
def test_two_processes_and_another_layout_change_no_number(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--engine", "jax", "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("tokens of 2 rollouts: equal") == 2
    assert "DIFFERS" not in done.stdout

    environment = json.loads((tmp_path / "moved" / "environment.json").read_text())
    assert environment["engine_environment"]["processes"] == "2"
    later = environment["later_starts"][-1]
    assert later["layout.train.fsdp"] == 8
    assert later["engine_environment"]["processes"] == "1"

    script = load_script()
    assert not list(script.differences(compare_runs(tmp_path / "two", tmp_path / "one")))
    for change, seen in (
        (lambda row: row | {"objective/kl": row["objective/kl"] * (1 + 1e-7)}, "rl objective/kl"),
        (lambda row: row | {"rollout/tokens_crc32": row["rollout/tokens_crc32"] + 1}, "rl rollout/tokens_crc32"),
        (lambda row: row | {"step": 3}, "rl: 3 and 3 steps, 2 of them in both"),
    ):
        shutil.copytree(tmp_path / "two", tmp_path / "canary", dirs_exist_ok=True)
        lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(change(json.loads(lines[-1])))
        (tmp_path / "canary" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        found = list(script.differences(compare_runs(tmp_path / "canary", tmp_path / "one")))
        assert any(line.startswith(seen) for line in found), (seen, found)


@pytest.mark.slow
def test_processes_with_other_settings_stop_together_before_anything_is_written(tmp_path):
    script = load_script()
    environment = {name: value for name, value in os.environ.items() if name != "DIPTYCH_DEVICES"} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{script.free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "diptych.cli", "run", str(script.RECIPE), "--engine", "jax", "--distributed"]
    command += ["--output", str(tmp_path / "run"), "--stage", "sft", *script.SETTINGS.split()]
    started = [
        subprocess.Popen(
            [*command, f"sft.epochs={1 + index}"],
            env=environment | {"JAX_PROCESS_ID": str(index)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        assert "not the same in process 0 and process 1" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_zero_in_two_processes_changes_no_number_and_its_checkpoint_goes_on(tmp_path):
    """Stage 3 through torchrun, and then at stage 1 in one process; the other stages: test_zero.py."""
    command = [sys.executable, str(SCRIPT), "--engine", "torch", "--stages", "3", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("tokens of 2 rollouts: equal") == 3
    assert "DIFFERS" not in done.stdout
    environment = json.loads((tmp_path / "stage-3-to-1" / "environment.json").read_text())
    first, later = environment["engine_environment"], environment["later_starts"][-1]["engine_environment"]
    assert (first["processes"], first["zero/policy"]) == ("2", "stage 3")
    assert (later["processes"], later["zero/policy"]) == ("1", "stage 1")

    script = load_script()
    comparison = compare_runs(tmp_path / "stage-3-2", tmp_path / "jax")
    assert list(script.differences(comparison, limit=0.0))  # canary: they are not the same run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "jax", "--stages", "3"], "--stages: ZeRO is the torch engine's"),
        (["--engine", "torch", "--stages", "4"], "invalid choice"),
        (["--engine", "torch", "--stage-3"], "unrecognized arguments: --stage-3"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(arguments, message):
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def load_script():
    specification = importlib.util.spec_from_file_location("two_process_cpu", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
