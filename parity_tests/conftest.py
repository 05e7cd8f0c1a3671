"""What the parity tests share: the quickstart's model with hot weights, and contexts of both engines on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diptych import random
from diptych.recipe.load import load_recipe
from diptych.stages.pipeline import prepare
from diptych.weights.huggingface import read_checkpoint, with_scalar_head, write_checkpoint

pytest.importorskip("jax", reason="parity needs both engines")
pytest.importorskip("torch", reason="parity needs both engines")

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SMALL_DATA = ["data.demonstrations.limit=300", "data.preferences.limit=300", "data.prompts.limit=200"]


def heat(checkpoint, seed):
    """Hot weights: initial-like ones hide most seeded bugs (docs/parity.md). Gains leave 1, projections are larger."""
    for name, value in checkpoint.weights.items():
        if name.endswith("norm.weight"):
            value += random.normal(seed, f"heat/{name}", value.shape, std=0.2)
        elif "embed" not in name and name != "score.weight":
            value *= 4.0
        elif "embed" in name:
            value *= 3.0
    return checkpoint


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
