"""Two real processes on this CPU against one: the same numbers, the same tokens, and a checkpoint that moves on.

    python scripts/two_process_cpu.py --engine jax
    python scripts/two_process_cpu.py --engine torch [--stages 0 3]

Always the same small recipe: sft, reward and rl in float64.

jax:   one process with 8 devices, and two with 4 each, which talk over gloo: every logged metric agrees to 1e-9 of its
       largest magnitude, and every rollout has the same tokens. Then the two-process run goes on from its checkpoint in
       one process on another mesh, as if it had been killed there, and arrives at the same numbers.
torch: the JAX engine on one device, and this engine at each ZeRO stage in one process and in two (torchrun, gloo):
       within 1e-8 of JAX. Then the two-process run of each stage goes on from its checkpoint in one process at another
       stage, and arrives at the same numbers to 1e-9.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from diptych.engine import ENGINES
from diptych.errors import UserError
from diptych.parity.tolerances import TOLERANCES
from diptych.run.compare import ROUNDING, TOKENS, Comparison, MetricDifference, compare_runs

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NUM_DEVICES = 8
LIMIT = TOLERANCES["layout"].at("float64")
BETWEEN_ENGINES = TOLERANCES["trajectory_relative"].at("float64")
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
# Tensors of up to 100,000 elements are not cut at stage 3 unless this says so.
SPLIT_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
OTHER_LAYOUT = (
    "layout.train.data=1 layout.train.fsdp=8 layout.train.tensor=1 layout.decode.data=8 layout.decode.tensor=1"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--output", type=Path, help="where the runs are left (default: they are deleted)")
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages (torch; default: all)", metavar="STAGE"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="more settings of the recipe")
    options, left_over = parser.parse_known_args()
    settings = [*options.settings, *left_over]
    if unknown := [text for text in settings if "=" not in text or text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (settings are written key=value)")
    if options.stages and options.engine == "jax":
        parser.error("--stages: ZeRO is the torch engine's")
    with tempfile.TemporaryDirectory(prefix="two-processes-") as scratch:
        folder = options.output or Path(scratch)
        try:
            if options.engine == "jax":
                return compare_meshes(folder, settings)
            return compare_stages(folder, options.stages or range(4), settings)
        except UserError as error:
            print(f"two_process_cpu: error: {error}", file=sys.stderr)
            return 2


def compare_meshes(folder: Path, settings: Sequence[str]) -> int:
    """The JAX engine: two processes against one, and a checkpoint on another mesh. Returns the exit code."""
    one, two, moved = (fresh(folder / name) for name in ("one", "two", "moved"))
    run_jax(one, [*LAYOUT.split(), *settings], processes=1)
    run_jax(two, [*LAYOUT.split(), *settings], processes=2)
    good = report("two processes x 4 devices against one x 8", compare_runs(two, one))

    shutil.copytree(two, moved)
    reopen(moved, "rl")
    run_jax(moved, [*OTHER_LAYOUT.split(), *settings], processes=1, arguments=["--resume"])
    return 0 if report("its checkpoint on another mesh in one process", compare_runs(moved, two)) and good else 1


def compare_stages(folder: Path, stages: Sequence[int], settings: Sequence[str]) -> int:
    """The torch engine: each ZeRO stage in one process and in two against JAX, and checkpoints at another stage.
    Returns the exit code."""
    reference = fresh(folder / "jax")
    run_jax(reference, settings, processes=1, devices=1)
    good = True
    for stage in stages:
        for processes in (1, 2):
            output = fresh(folder / f"stage-{stage}-{processes}")
            run_torch(output, [f"layout.zero.stage={stage}", SPLIT_ALL, *settings], processes=processes)
            title = f"ZeRO stage {stage}, {processes} process{'es' * (processes > 1)}, against JAX on one device"
            good &= report(title, compare_runs(output, reference), limit=BETWEEN_ENGINES)
        other = (stage + 2) % 4
        moved = fresh(folder / f"stage-{stage}-to-{other}")
        shutil.copytree(output, moved)
        reopen(moved, "rl")
        run_torch(moved, [f"layout.zero.stage={other}", SPLIT_ALL, *settings], processes=1, arguments=["--resume"])
        title = f"the checkpoint of stage {stage}, 2 processes, at stage {other} in one process"
        good &= report(title, compare_runs(moved, output))
    return 0 if good else 1


def run_jax(
    output: Path, settings: Sequence[str], *, processes: int, arguments: Sequence[str] = (), devices: int = NUM_DEVICES
) -> None:
    """A run of the JAX engine with so many devices, all processes together."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of XLA's compiler: half the time of so short a run
    }
    command = [sys.executable, *cli("jax", output, settings, processes=processes, arguments=arguments)]
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    of_each = [environment | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]
    start([(command, one) for one in of_each], f"{output.name}: {processes} x {devices // processes} devices")


def run_torch(output: Path, settings: Sequence[str], *, processes: int, arguments: Sequence[str] = ()) -> None:
    """A run of the torch engine, through torchrun where there are several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += cli("torch", output, settings, processes=processes, arguments=arguments)
    start([(command, {"DS_ACCELERATOR": "cpu"})], f"{output.name}: {processes} process{'es' * (processes > 1)}")


def cli(engine: str, output: Path, settings: Sequence[str], *, processes: int, arguments: Sequence[str]) -> list[str]:
    """What follows `python`."""
    command = ["-m", "diptych.cli", "run", str(RECIPE), "--engine", engine, "--output", str(output), *arguments]
    return [*command, *(["--distributed"] if processes > 1 else []), *SETTINGS.split(), *settings]


def start(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], what: str) -> None:
    """Start commands, each with its environment, together, and wait. UserError, with what it printed, where one
    fails."""
    begin = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "DIPTYCH_DEVICES"}
    environment |= {"DIPTYCH_PROGRESS": "off", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        started = [
            subprocess.Popen(command, env={**environment, **more}, stdout=log, stderr=log)
            for (command, more), log in zip(commands, logs, strict=True)
        ]
        codes = [process.wait() for process in started]
        for index, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code:
                log.seek(0)
                raise UserError(f"{what}: command {index} of {len(commands)} ended with {code}:\n{log.read()[-4000:]}")
    print(f"{what}, {time.perf_counter() - begin:.0f} s", flush=True)


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def reopen(path: Path, stage: str) -> None:
    """Make a finished run look as if it had been killed in the last step of a stage."""
    shutil.rmtree(max((path / "checkpoints" / stage).glob("step-*")))
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps(state | {stage: "running"}), encoding="utf-8")


def report(title: str, comparison: Comparison, *, limit: float = LIMIT) -> bool:
    """Print how far apart two runs are, in units of each metric's largest magnitude; True where they agree."""
    differing = list(differences(comparison, limit=limit))
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


def differences(comparison: Comparison, *, limit: float = LIMIT) -> Iterator[str]:
    """What is not the same: steps, metrics, tokens, numbers."""
    for stage, (common, of_a, of_b) in comparison.num_steps.items():
        if not common == of_a == of_b:
            yield f"{stage}: {of_a} and {of_b} steps, {common} of them in both"
    yield from (f"{metric} is only in {label}" for metric, label in comparison.only_in.items())
    if comparison.tokens is None:
        yield "no rollout was logged"
    for one in comparison.metrics:
        if not distance(one) <= (0 if one.metric == TOKENS else limit):
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
