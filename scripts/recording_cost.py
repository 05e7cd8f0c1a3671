"""What recording costs: seconds of a run's PPO iterations without a recorder and at each depth, in one process.

    python scripts/recording_cost.py --engine jax
    python scripts/recording_cost.py --engine torch --iterations 40 --every 1 10

The same work is done in turns (without a recorder, metrics, tensors, ...), so that what else the machine does falls on
all alike; the first round warms up and is thrown away. Tensors are recorded of every Nth iteration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from diptych.parity.recorder import StepRecorder
from diptych.parity.trace import TraceWriter
from diptych.recipe.load import load_recipe
from diptych.stages.pipeline import prepare, run_recipe
from diptych.stages.recording import NoRecorder
from diptych.stages.rl import PPO
from diptych.stages.rl_models import build_models

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["jax", "torch"], default="torch")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=20, help="of each round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, nargs="+", default=[10, 1])
    options = parser.parse_args()
    short = [f"{stage}.{name}" for stage in ("sft", "reward") for name in ("max_steps=2", "optimizer.warmup_steps=1")]
    recipe = load_recipe(options.recipe, [*short, "rl.max_kl=null", "rl.iterations=100000"])
    ways = [
        ("no recorder", None, 0),
        ("metrics", "metrics", 1),
        *((f"tensors, every {n}", "tensors", n) for n in options.every),
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run_recipe(recipe, engine_name=options.engine, output=run, stages=("sft", "reward"))
        context = prepare(recipe, engine_name=options.engine, output=run, stages=("rl",))
        ppo = PPO(context, build_models(context))
        assert context.datasets.prompts is not None
        train = context.datasets.prompts.train
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
        number = 1  # iteration 0 checks that policy and reference are equal, once
        for turn in range(options.rounds + 1):
            for name, depth, every in ways:
                with TraceWriter(Path(folder) / f"{turn}-{name}", producer={}, provenance={}) as writer:
                    recorder = NoRecorder()
                    if depth is not None:
                        recorder = StepRecorder(writer.add, seed=0, depth=depth, every=every)
                    ppo.context = replace(context, recorder=recorder)
                    start = number
                    began = time.perf_counter()
                    for number in range(start, start + options.iterations):
                        # Whatever the recorder counts from, its first iteration is one with tensors.
                        recorded = (number - start) if depth else number
                        prompts = ppo.prompts(train, number)
                        recorder.begin = _at(recorder, recorded)
                        metrics, _ = ppo.iterate(prompts, number)
                        recorder.end("rl", number, metrics, {})
                    number += 1
                    if turn:
                        seconds[name].append((time.perf_counter() - began) / options.iterations)
    least = min(seconds["no recorder"])  # what else the machine does only adds
    print(f"{options.engine}, {options.recipe.name}, {options.rounds} rounds of {options.iterations} iterations")
    for name, found in seconds.items():
        fastest = min(found)
        share, spread = 100 * (fastest / least - 1), f"{min(found):.3f} to {max(found):.3f}"
        print(f"  {name:<20} {fastest:.3f} s an iteration  {share:+.1f} %   ({spread})")


def _at(recorder, step):
    """`begin` with the step counted from the start of the round."""
    begin = type(recorder).begin

    def counted(stage, _step, models):
        begin(recorder, stage, step, models)

    return counted


if __name__ == "__main__":
    main()
