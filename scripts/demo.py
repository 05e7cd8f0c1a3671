"""`make demo`: the quickstart on both engines, then one table and one page that compare them.

1. recipes/quickstart.yaml in float32 on each engine: what a user would run.
2. A short float64 run of all three stages on each engine from the same bits: is it the same algorithm?

In float32, rounding alone makes any two implementations part after some hundred steps (docs/parity.md), so part 1 shows
that both engines learn the same thing, and part 2 that they compute the same thing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from diptych.engine import ENGINES
from diptych.run.compare import compare_runs, format_table, write_comparison

SHORT = [
    "name=quickstart-float64",
    "precision=float64",
    "sft.max_steps=20",
    "sft.eval_every=20",
    "reward.max_steps=20",
    "reward.eval_every=20",
    "rl.iterations=10",
    "rl.batch_size=16",
    "rl.micro_batch_size=8",
    "rl.eval_prompts=16",
    "data.demonstrations.limit=1000",
    "data.preferences.limit=1000",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="where the runs go (default: out/demo)")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    pages = []
    for title, folder, overrides in (
        ("quickstart, float32", "float32", []),
        ("the same stages, shorter, float64", "float64", SHORT),
    ):
        runs = {name: options.output / folder / name for name in ENGINES}
        for engine, run in runs.items():
            print(f"\n=== {title}: {engine}", flush=True)
            start = time.perf_counter()
            command = [sys.executable, "-m", "diptych.cli", "run", str(options.recipe), "--engine", engine]
            subprocess.run([*command, "--output", str(run), *overrides], check=True, stdout=subprocess.DEVNULL)
            print(f"{engine}: {time.perf_counter() - start:.0f} s", flush=True)
        page = options.output / f"{folder}.html"
        write_comparison(runs["jax"], runs["torch"], page)
        pages.append((title, page, compare_runs(runs["jax"], runs["torch"])))
    for title, page, comparison in pages:
        print(f"\n{title}\n")
        print(format_table(comparison, every_metric=False))
        print(f"page: {page}")
    print(f"\nmodels: {options.output}/float32/{{jax,torch}}/models; try one:")
    print(
        f"  diptych generate {options.output}/float32/jax/models/rl --engine torch "
        f"--prompt 'Write a postcard from Rome about the food.'"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
