"""What the parity tests share: the quickstart's model with hot weights, and contexts of both engines on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diptych.parity.selftest.heat import heat
from diptych.recipe.load import load_recipe
from diptych.stages.pipeline import prepare
from diptych.weights.huggingface import read_checkpoint, with_scalar_head, write_checkpoint
from parity_tests import check_table

pytest.importorskip("jax", reason="parity needs both engines")
pytest.importorskip("torch", reason="parity needs both engines")

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALL_DATA = ["data.demonstrations.limit=300", "data.preferences.limit=300", "data.prompts.limit=200"]


@pytest.fixture
def judge(record_property):
    """judge(row, check, error, limit): note a measurement for the table at the end, and fail where it is too large."""

    def judge(row, check, error, limit):
        record_property(*check_table.note(row, check, error, limit))
        assert error <= limit, f"{row}: {check}: {error:.3g} above {limit:.1e}"

    return judge


def pytest_terminal_summary(terminalreporter):
    """The table of family x check, of whatever part of it has run (also under xdist)."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [report.user_properties for report in reports if getattr(report, "when", "") == "call"]
    lines = check_table.table(check_table.measurements(properties))
    if lines:
        terminalreporter.section("families: the largest error of both engines in each check")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def hot_models(tmp_path_factory):
    """{"policy": DIR, "reward": DIR}: the quickstart's shape and tokenizer, hot weights."""
    root = tmp_path_factory.mktemp("hot")
    recipe = load_recipe(QUICKSTART, SMALL_DATA)
    context = prepare(recipe, engine_name="jax", output=root / "run", stages=("sft",))
    base = context.tokenizer_directory
    policy = heat(read_checkpoint(base, precision="float32"), seed=11)
    reward = heat(with_scalar_head(read_checkpoint(base, precision="float32"), seed=5), seed=12)
    write_checkpoint(root / "policy", policy, tokenizer_directory=base)
    write_checkpoint(root / "reward", reward, tokenizer_directory=base)
    assert all(np.isfinite(value).all() for value in policy.weights.values())
    return {"policy": root / "policy", "reward": root / "reward"}
