"""The smallest failing case: what goes into it, and that its scripts run and give the recorded numbers again."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.cli import main
from diptych.errors import UserError
from diptych.parity.comparison.repro import write_repro
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter
from diptych.recipe.load import dump_recipe, load_recipe
from shared.tests.parity_steps import change, elsewhere, healthy, put, trace, without

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
Q = "model.layers.1.self_attn.q_proj.weight"


def run(script: Path) -> dict[str, float]:
    """What a script prints: "recorded" (A against B), "A" and "B" (here against them), and the numbers at the worst."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {"recorded": float(re.findall(r"A and B differ by (\S+)", done.stdout)[0])}
    found |= {side: float(value) for side, value in re.findall(r"here against recorded ([AB]): (\S+)", done.stdout)}
    return found | {"lines": float(len(script.read_text(encoding="utf-8").splitlines()))}


def pair(tmp_path: Path, bug, **provenance) -> tuple[Trace, Trace]:
    a = trace(tmp_path / "a", [healthy(0)], name="one", **provenance)
    return a, trace(tmp_path / "b", [bug(elsewhere(healthy(0)))], name="other", replay=a, **provenance)


def about(directory: Path, side: str = "a") -> dict:
    return json.loads(str(np.load(directory / "case.npz")["about_" + side]))


def test_numbers_alone_cut_to_the_row_that_shows_it(tmp_path):
    a, b = pair(tmp_path, lambda s: put(s, "scores", 2, 5))
    case = write_repro(a, b, tmp_path / "case")
    assert case is not None
    assert (case.kind, case.rows) == ("numbers", "row 2 of 4")
    held = np.load(tmp_path / "case" / "case.npz", allow_pickle=False)
    assert held["recorded_b"].tolist() == [5]
    gap = abs(5 - float(healthy(0).array("scores")[2]))
    found = run(tmp_path / "case" / "side_a.py")
    assert found["recorded"] == found["B"] == pytest.approx(gap)
    assert found["A"] == 0
    text = (tmp_path / "case" / "README.txt").read_text(encoding="utf-8")
    assert "only print the recorded numbers" in text
    assert "rewards" in text


def rl_recipe(**settings: str) -> str:
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return dump_recipe(load_recipe(QUICKSTART, overrides))


def with_finish(step: Step) -> Step:
    """A step with what formulas need, in the layout of real traces: values at the states before each token."""
    finish = Recorded(values=step.array("response/finish"), layout="rows")
    values = Recorded(values=step.array("values")[:, :-1].copy(), layout="rows new", mask="used/mask")
    return replace(step, tensors=step.tensors | {"used/finish": finish, "values": values})


@pytest.mark.parametrize(("whiten", "rows"), [("false", "row"), ("true", "all rows")])
def test_a_formula_is_computed_again_from_the_fewest_rows_by_each_sides_settings(tmp_path, whiten, rows):
    """B discounts with another lambda: each script gives its own side's numbers."""
    from diptych.algorithms.dialects import experience

    sides = []
    for name, lam in (("a", "0.95"), ("b", "0.8")):
        text = rl_recipe(rl__lam=lam, rl__whiten_rewards=whiten)
        rl = load_recipe(QUICKSTART, [f"rl.lam={lam}", f"rl.whiten_rewards={whiten}"]).rl
        step = with_finish(healthy(0))
        ended = step.array("used/finish") == 1
        wide = {one: step.array(one).astype(np.float64) for one in ("logprobs", "ref_logprobs", "values", "scores")}
        wide["scores"] = wide["scores"] - rl.missing_eos_penalty * ~ended
        made = experience(
            rl.dialect, **wide, mask=step.array("used/mask"), ended=ended, kl_coef=rl.kl_coef,
            kl_estimator=rl.kl_estimator, gamma=rl.gamma, lam=rl.lam, whiten_rewards=rl.whiten_rewards,
            score_clip=rl.score_clip,
        )  # fmt: skip
        for one in ("returns", "advantages"):
            array = Recorded(values=np.asarray(getattr(made, one), np.float32), layout="rows new", mask="used/mask")
            step = replace(step, tensors=step.tensors | {one: array})
        sides.append(
            trace(tmp_path / name, [step], name=name, recipe=text, replay=sides[0] if sides else None)
        )  # fmt: skip
    case = write_repro(sides[0], sides[1], tmp_path / "case")
    assert case is not None
    assert (case.kind, case.name) == ("formula", "returns")
    assert case.rows.startswith(rows)
    assert about(tmp_path / "case")["settings"]["lam"] == 0.95
    assert about(tmp_path / "case", "b")["settings"]["lam"] == 0.8
    found = {side: run(tmp_path / "case" / f"side_{side.lower()}.py") for side in "AB"}
    assert found["A"]["A"] < 1e-6 < found["A"]["B"]
    assert found["B"]["B"] < 1e-6 < found["B"]["A"]


def test_an_update_is_computed_again_from_each_sides_moments(tmp_path):
    settings = ["rl.optimizer.betas=[0.9,0.95]", "rl.optimizer.weight_decay=0.1"]
    text = dump_recipe(load_recipe(QUICKSTART, settings))
    name = f"policy/weights/{Q}"
    a, b = pair(tmp_path, lambda s: change(s, name, s.array(name) + np.float32(1e-2)), recipe=text)
    case = write_repro(a, b, tmp_path / "case")
    assert case is not None
    assert (case.kind, case.name) == ("update", name)
    found = run(tmp_path / "case" / "side_b.py")
    assert found["recorded"] == pytest.approx(1e-2, rel=1e-3)
    assert found["A"] < 1e-6
    assert found["B"] == pytest.approx(1e-2, rel=1e-3)  # B's weights are not what its moments say


def test_second_moments_are_computed_again(tmp_path):
    text = dump_recipe(load_recipe(QUICKSTART, ["rl.optimizer.betas=[0.9,0.95]"]))
    name = f"policy/second/{Q}"
    a, b = pair(tmp_path, lambda s: put(s, name, (4, 1), 0.5), recipe=text)
    case = write_repro(a, b, tmp_path / "case")
    assert case is not None
    assert (case.kind, case.rows) == ("moment", "row 4 of 6")
    found = run(tmp_path / "case" / "side_b.py")
    assert found["A"] < 1e-6
    assert found["B"] == pytest.approx(found["recorded"], rel=1e-4)


def test_where_there_is_nothing_to_reproduce(tmp_path, capsys):
    a, b = pair(tmp_path, lambda s: s)
    assert write_repro(a, b, tmp_path / "case") is None
    assert not (tmp_path / "case").exists()
    assert main(["parity", "repro", str(a.directory), str(b.directory), "-o", str(tmp_path / "case")]) == 0
    assert "nothing to reproduce" in capsys.readouterr().out
    lost = trace(tmp_path / "c", [without(elsewhere(healthy(0)), "scores")], replay=a)
    with pytest.raises(UserError, match="no number to reproduce"):
        write_repro(a, lost, tmp_path / "case")
    fewer = trace(tmp_path / "d", [healthy(0), healthy(1)])
    with pytest.raises(UserError, match="which steps there are"):
        write_repro(a, fewer, tmp_path / "case")
    with pytest.raises(UserError, match="is there already"):
        write_repro(a, b, tmp_path / "a")


# With real engines: side A is one, and B is the same with one number changed.

ENGINES = [name for name in ("torch", "jax") if importlib.util.find_spec(name) is not None]
needs_engines = pytest.mark.skipif(len(ENGINES) < 2, reason="needs both frameworks")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A trace of one step of sft and of reward model training, by the torch engine in a process of its own."""
    directory = tmp_path_factory.mktemp("recorded") / "trace"
    small = ["data.demonstrations.limit=64", "data.preferences.limit=64", "sft.batch_size=8", "reward.batch_size=8"]
    command = [
        sys.executable,
        "-m",
        "diptych.cli",
        "parity",
        "record",
        str(QUICKSTART),
        "--engine",
        "torch",
        "--steps",
        "1",
    ]
    options = ["--stage", "sft", "--stage", "reward", "-o", str(directory), *small]
    environment = os.environ | {"DIPTYCH_PROGRESS": "off"}
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def spoilt(recorded: Path, where: Path, stage: str, bug, *, producer: str) -> tuple[Trace, Trace]:
    """The recorded trace, and a replay of it by `producer` whose numbers are the recorded ones but for a bug."""
    a = Trace(recorded)
    provenance = a.provenance | {"replay": {"trace": a.fingerprint(), "producer": "torch"}}
    with TraceWriter(where, producer=a.producer | {"name": producer}, provenance=provenance) as writer:
        for step in a:
            writer.add(bug(step) if step.stage == stage else step)
    shutil.copytree(recorded / "tokenizer", where / "tokenizer")
    return a, Trace(where)


def first_gradient(step: Step) -> Step:
    name = next(name for name in step.tensors if name.startswith("model/gradient/"))
    return change(step, name, step.array(name) * np.float32(1.5))


BUGS = {
    "outputs": ("sft", lambda s: put(s, "model/outputs", (1, 4), -99)),
    "scores": ("reward", lambda s: put(s, "model/outputs", (1, 4), -99)),
    "gradients": ("sft", first_gradient),
    "gradients of scores": ("reward", first_gradient),
    "loss": ("reward", lambda s: replace(s, metrics=s.metrics | {"model/loss": s.metrics["model/loss"] * 2})),
    "next": ("sft", lambda s: put(s, "model/next_outputs", (1, 4), -99)),
}


@pytest.mark.slow
@needs_engines
@pytest.mark.parametrize("producer", ["jax", "elsewhere"])
@pytest.mark.parametrize("bug", BUGS)
def test_scripts_of_real_engines_give_the_recorded_numbers_again(recorded, tmp_path, bug, producer):
    """Side A by the torch engine, side B by the JAX engine, or by plain transformers for a producer of neither."""
    stage, seed = BUGS[bug]
    a, b = spoilt(recorded, tmp_path / "b", stage, seed, producer=producer)
    case = write_repro(a, b, tmp_path / "case")
    assert case is not None
    if bug in ("outputs", "scores", "next"):
        assert case.rows.startswith("row 1 of")
        assert len(np.load(tmp_path / "case" / "case.npz")["tokens"]) == 1
    for side in "ab":
        found = run(tmp_path / "case" / f"side_{side}.py")
        assert found["A"] < 2e-5, (side, found)  # the right number comes out again
        assert found["B"] > 10 * found["A"]
        assert found["B"] == pytest.approx(found["recorded"], rel=1e-2)
        assert found["lines"] <= 55
