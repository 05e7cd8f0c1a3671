"""`diptych parity record`: run a recipe on one engine and leave a trace; with `--replay`, fed by another trace.

The trace's folder also holds run/, the run directory with the models that the stages left, because a replay starts
every stage from the recorded run's own models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diptych.errors import UserError
from diptych.parity.foreign.replay import record_foreign
from diptych.parity.provenance import leave_tokenizer, producer, provenance
from diptych.parity.recorder import Depth, StepRecorder
from diptych.parity.trace import Step, Trace, TraceWriter
from diptych.recipe.load import load_recipe
from diptych.recipe.schema import Recipe, Stage
from diptych.stages.pipeline import prepare, run_stages


def record(
    recipe: Recipe,
    *,
    engine: str,
    output: Path,
    depth: Depth = "tensors",
    every: int = 10,
    replay: Trace | None = None,
    stages: Sequence[Stage] | None = None,
    fresh: bool = False,
) -> Trace:
    """Run `stages` of the recipe (default: its own) on `engine` and write the trace into `output`, a new directory.

    replay: at every step of which that trace has tensors, start from its weights and moments and go on with its
    responses, scores, log-probabilities and values; the steps between are passed over. fresh: see `StepRecorder`.

    Raises UserError before anything is written where something can be mended.
    """
    if every < 1:
        raise UserError(f"--every {every}: at least 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name a new directory for the trace")
    stages = tuple(stages or recipe.stages)
    source = None if replay is None else _source(replay, stages)
    started = recipe if replay is None else recorded_models(recipe, replay.directory / "run", stages)
    context = prepare(started, engine_name=engine, output=output / "run", stages=stages)
    about = provenance(context, recipe, stages=stages, depth=depth, every=every, replay=replay)
    writer = TraceWriter(output, producer=producer(context), provenance=about, beside=("run",))
    leave_tokenizer(context, output / "tokenizer")
    with writer:
        recorder = StepRecorder(writer.add, seed=recipe.seed, depth=depth, every=every, source=source, fresh=fresh)
        run_stages(replace(context, recorder=recorder), stages)
    return Trace(output)


def recorded_models(recipe: Recipe, run: Path, stages: Sequence[Stage]) -> Recipe:
    """The recipe with every stage starting from what the recorded run's stages left."""
    models = run / "models"
    base = models / "base"
    if base.is_dir():
        recipe = replace(recipe, model=replace(recipe.model, new=None, path=str(base)))
    tuned, reward = models / "sft", models / "reward"
    if "reward" in stages and recipe.reward.model_path is None and tuned.is_dir():
        recipe = replace(recipe, reward=replace(recipe.reward, model_path=str(tuned)))
    if "rl" in stages:
        rl = recipe.rl
        if rl.policy_path is None and tuned.is_dir():
            rl = replace(rl, policy_path=str(tuned))
        if rl.reward.function is None and rl.reward.model_path is None and reward.is_dir():
            rl = replace(rl, reward=replace(rl.reward, model_path=str(reward)))
        recipe = replace(recipe, rl=rl)
    return recipe


def _source(replay: Trace, stages: Sequence[Stage]):
    """(stage, step) -> the recorded step, where it has tensors."""
    with_tensors = {key for key in replay.steps if replay.has_tensors(*key)}
    missing = [stage for stage in stages if not any(key[0] == stage for key in with_tensors)]
    if missing:
        raise UserError(
            f"{replay.directory}: no tensors of stage {', '.join(missing)}: record it at depth tensors, or replay "
            "other stages (--stage)"
        )

    def source(stage: str, step: int) -> Step | None:
        return replay.read(stage, step) if (stage, step) in with_tensors else None

    return source


def load_for_steps(path: Path, overrides: Sequence[str], steps: int | None) -> Recipe:
    """The recipe with (at most) so many steps of every stage, warm-up cut to them; None: as it is."""
    recipe = load_recipe(path, overrides)
    if steps is None:
        return recipe
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1")
    fewer = [f"sft.max_steps={steps}", f"reward.max_steps={steps}", f"rl.iterations={steps}"]
    for stage in ("sft", "reward", "rl"):
        warmup = getattr(recipe, stage).optimizer.warmup_steps
        fewer.append(f"{stage}.optimizer.warmup_steps={min(warmup, steps)}")
    return load_recipe(path, [*overrides, *fewer])


def command(options: argparse.Namespace) -> int:
    """`diptych parity record`."""
    replay = None if options.replay is None else Trace(options.replay)
    if replay is not None and replay.provenance.get("foreign"):
        more = (options.recipe, options.overrides, options.steps, options.stage, options.depth, options.every)
        if any(more):
            raise UserError(
                f"{options.replay}: a trace of {replay.producer.get('name')} is replayed from its own settings and "
                "models: give no recipe, settings, --steps, --stage, --depth or --every"
            )
        record_foreign(replay, engine=options.engine, output=options.output)
        return 0
    if options.recipe is None:
        raise UserError("name a recipe (only a replay of another trainer's trace goes without)")
    if replay is not None and options.every is not None:
        raise UserError("--every has no effect with --replay: a replay is of the steps that the trace has tensors of")
    if replay is not None and options.depth == "metrics":
        raise UserError("--depth metrics has no effect with --replay: a replay records every rung that it is fed")
    recipe = load_for_steps(options.recipe, options.overrides, options.steps)
    trace = record(
        recipe,
        engine=options.engine,
        output=options.output,
        depth=options.depth or "tensors",
        every=10 if options.every is None else options.every,
        replay=replay,
        stages=options.stage,
    )
    print(f"diptych: {len(trace.steps)} steps in {options.output}", file=sys.stderr)
    return 0
