"""`diptych parity gate`: inside one engine, does what generates compute what is trained?

The recipe's models are built as its rl stage builds them (after one step of its earlier stages, where the model is
new), and then the start-up gate (`diptych.stages.gate`) is all that runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from diptych.errors import InvariantError, UserError
from diptych.parity.cli import DIFFERENT, SAME
from diptych.recipe.load import load_recipe
from diptych.recipe.schema import Stage
from diptych.stages.gate import Gate
from diptych.stages.pipeline import prepare, run_recipe
from diptych.stages.rl import PPO
from diptych.stages.rl_models import build_models


def gate(path: Path, overrides: list[str], *, engine: str) -> Gate:
    """What the gate found. Raises InvariantError where the two do not agree."""
    recipe = load_recipe(path, overrides)
    if "rl" not in recipe.stages:
        raise UserError(f"{path}: has no rl stage, so nothing generates: name a recipe with stages: [..., rl]")
    if recipe.model.new is not None and recipe.rl.policy_path is None:  # what its earlier stages would leave
        overrides = [*overrides, "sft.max_steps=1", "reward.max_steps=1"]
        overrides += [f"{stage}.optimizer.warmup_steps=0" for stage in ("sft", "reward")]
        recipe = load_recipe(path, overrides)
    with tempfile.TemporaryDirectory(prefix="diptych-gate-") as work:
        output = Path(work) / "run"
        earlier: tuple[Stage, ...] = tuple(stage for stage in recipe.stages if stage != "rl")
        if earlier:
            run_recipe(recipe, engine_name=engine, output=output, stages=earlier)
        context = prepare(recipe, engine_name=engine, output=output, stages=("rl",))
        ppo = PPO(context, build_models(context))
        assert context.datasets.prompts is not None, "rl has prompts"
        return ppo.gate(context.datasets.prompts.train)


def command(options: argparse.Namespace) -> int:
    """`diptych parity gate RECIPE --engine E`."""
    try:
        found = gate(options.recipe, options.overrides, engine=options.engine)
    except InvariantError as error:
        print(f"diptych: different: {error}", file=sys.stderr)
        return DIFFERENT
    print(
        f"the same: {found.tokens} greedy tokens of {found.rows} prompts, largest gap of a log-probability "
        f"{found.gap_max:.2g} nats, {found.near_ties} near-ties"
    )
    return SAME
