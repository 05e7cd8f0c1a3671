"""Two real processes on this CPU against one: the same numbers, the same tokens, and a checkpoint that moves on.

    python scripts/two_process_cpu.py --engine jax

1. One small recipe (sft, reward, rl; float64) in one process with 8 devices, and in two with 4 each, which talk over
   gloo. Every logged metric agrees to 1e-9 of its largest magnitude, and every rollout has the same tokens.
2. The two-process run goes on from its checkpoint in one process on another mesh, as if it had been killed there, and
   arrives at the same numbers.

Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from diptych.engine import ENGINES
from diptych.errors import UserError
from diptych.parity.tolerances import TOLERANCES
from diptych.run.compare import ROUNDING, TOKENS, Comparison, MetricDifference, compare_runs

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NUM_DEVICES = 8
LIMIT = TOLERANCES["layout"].at("float64")
SETTINGS = """
    name=two-processes precision=float64 checkpoint.every=1
    model.new.hidden_size=32 model.new.intermediate_size=64 model.new.num_hidden_layers=1 model.new.vocab_size=300
    data.demonstrations.limit=120 data.preferences.limit=120 data.prompts.limit=120 data.too_long=truncate
    data.max_response_tokens=24 data.buckets=[64]
    sft.max_steps=2 sft.batch_size=16 sft.micro_batch_size=8 sft.optimizer.warmup_steps=0
    reward.max_steps=2 reward.batch_size=16 reward.micro_batch_size=8 reward.optimizer.warmup_steps=0
    rl.iterations=2 rl.batch_size=16 rl.mini_batches=1 rl.micro_batch_size=8 rl.eval_prompts=8 rollout.max_new_tokens=8
"""
LAYOUT = "layout.train.data=2 layout.train.fsdp=2 layout.train.tensor=2 layout.decode.data=4 layout.decode.tensor=2"
OTHER_LAYOUT = (
    "layout.train.data=1 layout.train.fsdp=8 layout.train.tensor=1 layout.decode.data=8 layout.decode.tensor=1"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--output", type=Path, help="where the runs are left (default: they are deleted)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="more settings of the recipe")
    options = parser.parse_args()
    if options.engine != "jax":
        parser.error(f"--engine {options.engine}: it trains in one process so far; use --engine jax")
    with tempfile.TemporaryDirectory(prefix="two-processes-") as scratch:
        try:
            return compare(options.output or Path(scratch), options.engine, options.settings)
        except UserError as error:
            print(f"two_process_cpu: error: {error}", file=sys.stderr)
            return 2


def compare(folder: Path, engine: str, settings: Sequence[str]) -> int:
    one, two, moved = (folder / name for name in ("one", "two", "moved"))
    for path in (one, two, moved):
        shutil.rmtree(path, ignore_errors=True)
    run(engine, one, [*LAYOUT.split(), *settings], processes=1)
    run(engine, two, [*LAYOUT.split(), *settings], processes=2)
    good = report("two processes x 4 devices against one x 8", compare_runs(two, one))

    shutil.copytree(two, moved)
    reopen(moved, "rl")
    run(engine, moved, [*OTHER_LAYOUT.split(), *settings], processes=1, arguments=["--resume"])
    return 0 if report("its checkpoint on another mesh in one process", compare_runs(moved, two)) and good else 1


def run(engine: str, output: Path, settings: Sequence[str], *, processes: int, arguments: Sequence[str] = ()) -> None:
    """Start a run in `processes` processes and wait. UserError, with what it printed, where one of them fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "diptych.cli", "run", str(RECIPE), "--engine", engine, "--output", str(output)]
    command += [*arguments, *(["--distributed"] if processes > 1 else []), *SETTINGS.split(), *settings]
    environment = {name: value for name, value in os.environ.items() if name != "DIPTYCH_DEVICES"} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES // processes}",
        "DIPTYCH_PROGRESS": "off",
        "OMP_NUM_THREADS": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of XLA's compiler: half the time of so short a run
    }
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        started = [
            subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(index)}, stdout=log, stderr=log)
            for index, log in enumerate(logs)
        ]
        codes = [process.wait() for process in started]
        for index, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code:
                log.seek(0)
                raise UserError(f"process {index} of {processes} ended with exit code {code}:\n{log.read()[-4000:]}")
    print(
        f"{output.name}: {processes} x {NUM_DEVICES // processes} devices, {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def reopen(path: Path, stage: str) -> None:
    """Make a finished run look as if it had been killed after the last checkpoint of a stage."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps(state | {stage: "running"}), encoding="utf-8")


def report(title: str, comparison: Comparison) -> bool:
    """Print how far apart two runs are, in units of each metric's largest magnitude; True where they agree."""
    differing = list(differences(comparison))
    print(f"\n{title}\n  {'stage':<8}{'metrics':>8}{'steps':>7}  largest difference")
    for stage, (common, *_) in comparison.num_steps.items():
        compared = [one for one in comparison.metrics if one.stage == stage]
        largest = max(compared, key=distance)
        print(f"  {stage:<8}{len(compared):>8}{common:>7}  {distance(largest):.1e} ({largest.metric})")
    tokens = comparison.tokens
    if tokens is not None:
        print(f"  tokens of {len(tokens.steps)} rollouts: {'equal' if tokens.max_absolute == 0 else 'NOT EQUAL'}")
    for line in differing:
        print(f"  DIFFERS: {line}")
    return not differing


def differences(comparison: Comparison) -> Iterator[str]:
    """What is not the same: steps, metrics, tokens, numbers."""
    for stage, (common, of_a, of_b) in comparison.num_steps.items():
        if not common == of_a == of_b:
            yield f"{stage}: {of_a} and {of_b} steps, {common} of them in both"
    yield from (f"{metric} is only in {label}" for metric, label in comparison.only_in.items())
    if comparison.tokens is None:
        yield "no rollout was logged"
    for one in comparison.metrics:
        if not distance(one) <= (0 if one.metric == TOKENS else LIMIT):
            yield f"{one.stage} {one.metric}: {distance(one):.1e} at step {one.max_absolute_step}"


def distance(one: MetricDifference) -> float:
    """Differences of equal numbers are compared as they are, everything else by its own magnitude."""
    return one.max_absolute if one.metric in (TOKENS, *ROUNDING) else one.scaled


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
