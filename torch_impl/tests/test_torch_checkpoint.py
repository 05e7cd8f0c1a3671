"""Checkpoints: going on from one is not having stopped, on any number of processes and at any ZeRO stage.

Canaries: a checkpoint read with one of its parts wrong is seen.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.engine import AdapterSpec, OptimizerSpec
from diptych.errors import UserError
from diptych.layout import Zero
from diptych.parity.tolerances import TOLERANCES
from diptych_torch import checkpoint
from diptych_torch.shards_on_disk import StoredShards
from diptych_torch.zero import Shards
from torch_impl.tests.checkpoint_cases import (
    ADAMW,
    ADAPTER,
    CASES,
    SGD,
    UPDATES,
    Case,
    build,
    resumed,
    started,
    state,
    updates,
)

ROOT = Path(__file__).parents[2]


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)


def is_near(one: dict[str, Any], other: dict[str, Any], case: Case) -> bool:
    """Equal but for the order of sums. In bfloat16 that is too much to be told from an error: there always."""
    return case.precision == "bfloat16" or furthest(one, other) < TOLERANCES["model"].at(case.precision)


ALONE = {
    "stage 0": Case(saved=Zero(stage=0), loaded=Zero(stage=2)),
    "stage 1": Case(saved=Zero(stage=1), loaded=Zero(stage=0), optimizer=SGD),
    "stage 2": Case(saved=Zero(stage=2), loaded=Zero(stage=3), precision="float32", tied=True),
    "stage 3": Case(saved=Zero(stage=3), loaded=Zero(stage=1), adapter=ADAPTER),
    "bfloat16, stage 1": Case(saved=Zero(stage=1), loaded=Zero(stage=2), precision="bfloat16"),
}


@pytest.mark.parametrize("name", ALONE)
def test_going_on_is_not_having_stopped(tmp_path, name):
    """Bit for bit where it was saved; the same state, and the same numbers but for rounding, at another stage."""
    case = ALONE[name]
    straight = started(case, tmp_path / "saved", distributed=False)
    saved = state(straight)
    expected = updates(straight, UPDATES)
    again = resumed(case, case.saved, tmp_path / "saved", distributed=False)
    assert furthest(state(again), saved) == 0
    assert updates(again, UPDATES) == expected
    assert furthest(state(again), state(straight)) == 0
    assert furthest(state(again), {**saved, "step": saved["step"] + UPDATES}) > 1e-3  # canary: training moves them
    moved = resumed(case, case.loaded, tmp_path / "saved", distributed=False)
    assert furthest(state(moved), saved) == 0
    losses = updates(moved, UPDATES)
    assert is_near(state(moved), state(straight), case)
    assert case.precision == "bfloat16" or losses == pytest.approx(
        expected, rel=TOLERANCES["trajectory_relative"].at(case.precision)
    )
    straight.load_checkpoint(tmp_path / "saved")  # back in the same model
    assert updates(straight, UPDATES) == expected


@pytest.mark.parametrize("stage", [0, 3])
def test_averages_are_given_by_name(stage):
    """What an export asks for a part at a time."""
    model = build(Case(saved=Zero(stage=stage), loaded=Zero(stage=stage)), Zero(stage=stage), distributed=False)
    updates(model, 0)
    whole = model.ema_weights()
    names = [*whole][3:0:-1]
    some = model.ema_weights(names)
    assert list(some) == names
    assert furthest(some, {name: whole[name] for name in names}) == 0
    assert furthest(some, model.weights(names)) > 0


@pytest.mark.slow
def test_checkpoints_move_between_one_process_and_two(tmp_path):
    """Every case in `checkpoint_cases`, both ways; and a full disk of one process stops both."""
    for name, case in CASES.items():
        started(case, tmp_path / name / "one", distributed=False)
    torchrun(tmp_path)
    for name, case in CASES.items():
        folder = tmp_path / name
        two = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
        assert furthest(two["resumed"], two["saved"]) == 0, name
        assert furthest(two["resumed and went on"], two["went on"]) == 0, name
        one = resumed(case, case.saved, folder / "one", distributed=False)
        assert furthest(two["moved"], state(one)) == 0, name
        one = resumed(case, case.loaded, folder / "two", distributed=False)
        assert furthest(state(one), two["saved"]) == 0, name
        updates(one, UPDATES)
        assert is_near(state(one), two["went on"], case), name
        assert is_near(two["moved and went on"], two["went on"], case), name
    assert (tmp_path / "said 1").read_text() == "OSError: disk full (at once)"
    assert (tmp_path / "said 0").read_text() == "RuntimeError: process 1: OSError: disk full (at once)"


def torchrun(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "torch_impl.tests.checkpoint_cases", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("bug", ["the average", "the step", "an offset", "another tensor", "what is computed with"])
def test_canary_what_is_read_wrong_is_seen(tmp_path, monkeypatch, bug):
    case = Case(saved=Zero(stage=2), loaded=Zero(stage=1))
    straight = started(case, tmp_path / "saved", distributed=False)
    saved, expected = state(straight), updates(straight, UPDATES)
    read, flat = StoredShards.read, StoredShards._flat
    if bug == "the average":
        monkeypatch.setattr(
            StoredShards, "read", lambda self, name, key, *more: key == "average" or read(self, name, key, *more)
        )
    if bug == "the step":
        monkeypatch.setattr(Shards, "set_step", lambda self, step: None)
    if bug == "an offset":
        monkeypatch.setattr(
            StoredShards, "_flat", lambda self, one, place, key: flat(self, one, place, key).roll(1)  # type: ignore[union-attr]
        )  # fmt: skip
    if bug == "another tensor":
        monkeypatch.setattr(
            StoredShards, "_flat", lambda self, one, place, key: flat(self, one, place, key and "exp_avg")
        )  # fmt: skip
    if bug == "what is computed with":
        monkeypatch.setattr(checkpoint.Shards, "read", lambda self, parameter: 0 * parameter)
    model = build(case, case.loaded, distributed=False, seed=1)
    model.load_checkpoint(tmp_path / "saved")
    monkeypatch.undo()
    is_seen = furthest(state(model), saved) > 0
    losses = updates(model, UPDATES)
    assert is_seen or losses != pytest.approx(expected, rel=TOLERANCES["trajectory_relative"].at("float64"))
    if bug == "the step":  # the number that is logged is right; the bias correction is not
        assert losses[1] != pytest.approx(expected[1], rel=TOLERANCES["trajectory_relative"].at("float64"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_reads_its_own_files(tmp_path, stage):
    """What is left is a checkpoint of DeepSpeed's, for its own tools too."""
    case = Case(saved=Zero(stage=stage), loaded=Zero(stage=stage), precision="float32")
    straight = started(case, tmp_path / "saved", distributed=False)
    saved = state(straight)
    other: Any = build(case, case.saved, distributed=False, seed=1)
    loaded, _ = other._deepspeed.load_checkpoint(str(tmp_path / "saved"), tag="deepspeed")
    assert loaded is not None
    assert furthest({**state(other), "step": saved["step"]}, saved) == 0


OTHERS = {
    "another optimizer": ({"optimizer": SGD}, "optimizer = 'adamw', this run has 'sgd'"),
    "another precision": ({"precision": "float32"}, "precision = 'float64', this run has 'float32'"),
    "no average": ({"optimizer": OptimizerSpec(name="adamw")}, "has_ema = True, this run has False"),
    "an adapter": ({"adapter": ADAPTER}, "adapter = None, this run has {'rank': 3, 'alpha': 6.0}"),
    "another model": ({"tied": True}, r"lm_head.weight has shape \[37, 12\] in the checkpoint, None in the model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_something_else_are_refused(tmp_path, name):
    changes, message = OTHERS[name]
    case = Case(saved=Zero(stage=1), loaded=Zero(stage=0))
    started(case, tmp_path / "saved", distributed=False)
    other = build(Case(**{**vars(case), **changes}), case.loaded, distributed=False)
    before = state(other)
    with pytest.raises(UserError, match=message):
        other.load_checkpoint(tmp_path / "saved")
    assert furthest(state(other), before) == 0


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    case = Case(saved=Zero(stage=0), loaded=Zero(stage=0), adapter=ADAPTER)
    started(case, tmp_path / "saved", distributed=False)
    changed = Case(**{**vars(case), "adapter": AdapterSpec(rank=3, alpha=6.0, targets=("k_proj",))})
    with pytest.raises(
        UserError, match=r"up_proj.lora_A.weight has shape \[3, 12\] in the checkpoint, None in the mod"
    ):
        build(changed, case.loaded, distributed=False).load_checkpoint(tmp_path / "saved")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _edit(path: Path, change: Any) -> None:
    """Change what a JSON file holds, and let the manifest say the new size: damage that no size tells."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    manifest = path.with_name("diptych.json")
    files = json.loads(manifest.read_text())
    files["files"]["pieces.json"] = path.stat().st_size
    manifest.write_text(json.dumps(files))


def _shift(found: Any) -> None:
    found[0]["places"]["model.norm.weight"][1] += 10_000


SHARD = "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"
DAMAGE = {
    "no manifest": (lambda at: (at / "diptych.json").unlink(), r"not a checkpoint of the torch engine \(no diptych.js"),
    "half a manifest": (lambda at: _cut(at / "diptych.json"), r"diptych.json:\d+: not valid JSON"),
    "no shard": (lambda at: (at / SHARD).unlink(), "optim_states.pt: missing: the checkpoint is incomplete"),
    "half a shard": (lambda at: _cut(at / SHARD), r"optim_states.pt: damaged: \d+ bytes, \d+ were written"),
    "a scrambled shard": (lambda at: _scramble(at / SHARD), "optim_states.pt: damaged: "),
    "half the pieces": (lambda at: _cut(at / "pieces.json"), r"pieces.json: damaged: \d+ bytes"),
    "scrambled pieces": (lambda at: _scramble(at / "pieces.json"), "pieces.json: damaged: JSONDecodeError"),
    "a piece too few": (
        lambda at: _edit(at / "pieces.json", lambda found: found[0]["places"].pop("model.norm.weight")),
        r"model.norm.weight is not whole in the checkpoint \(0 of 12 elements\)",
    ),
    "a piece beyond the end": (lambda at: _edit(at / "pieces.json", _shift), "damaged: lacks weights of model.norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_anything_is_changed(tmp_path, name):
    damage, message = DAMAGE[name]
    case = Case(saved=Zero(stage=2), loaded=Zero(stage=0))
    started(case, tmp_path / "saved", distributed=False)
    other = build(case, case.loaded, distributed=False, seed=1)
    before = state(other)
    damage(tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        other.load_checkpoint(tmp_path / "saved")
    assert furthest(state(other), before) == 0


def test_a_half_written_checkpoint_is_none(tmp_path, monkeypatch):
    """The manifest comes last: where writing stops before it, there is no checkpoint."""
    model = build(Case(saved=Zero(stage=2), loaded=Zero(stage=2)), Zero(stage=2), distributed=False)

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="disk full"):
        model.save_checkpoint(tmp_path / "half")
    assert (tmp_path / "half" / "deepspeed").is_dir()
    with pytest.raises(UserError, match="not a checkpoint"):
        model.load_checkpoint(tmp_path / "half")
    monkeypatch.undo()
    with pytest.raises(UserError, match="not empty; checkpoints are not written over"):
        model.save_checkpoint(tmp_path / "half")
    model.save_checkpoint(tmp_path / "whole")  # DeepSpeed's own writer is in its place again


def test_nothing_but_tensors_and_what_deepspeed_needs_is_unpickled(tmp_path):
    """A file that would run code is refused."""
    import torch

    case = Case(saved=Zero(stage=1), loaded=Zero(stage=1), optimizer=ADAMW)
    model = started(case, tmp_path / "saved", distributed=False)
    path = tmp_path / "saved" / SHARD
    found = torch.load(path, weights_only=False)
    torch.save({**found, "more": Path("evil")}, path)
    manifest = json.loads((tmp_path / "saved/diptych.json").read_text())
    manifest["files"][SHARD] = path.stat().st_size
    (tmp_path / "saved/diptych.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged: UnpicklingError"):
        model.load_checkpoint(tmp_path / "saved")
