"""What processes of an engine do for `test_zero.py`: one case after another in the same processes, because to start
them takes longer than a case does.

`launch` starts them as a launcher would. A case is a run of the quickstart with other settings, if need be with a
seeded bug, or PPO in lockstep with a JAX engine that each process has of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
Case = Mapping[str, Any]
# Tiny models too are cut at stage 3 (DeepSpeed leaves tensors of up to 100,000 elements whole).
SPLIT_ALL = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def launch(engine: str, cases: Sequence[Case], *, processes: int) -> None:
    """Work through the cases in so many processes, and wait. RuntimeError, with what it printed, where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "DIPTYCH_PROGRESS": "off", "OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
    }  # fmt: skip
    command = [sys.executable, "-m", "parity_tests.zero_runs", engine, json.dumps(cases)]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        started = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(0.1)
        finally:  # one that waits for a process that has failed waits for long
            for process in started:
                process.kill()
                process.wait()
        for rank, (code, log) in enumerate(zip(codes, logs, strict=True)):
            if code:
                log.seek(0)
                raise RuntimeError(f"process {rank} of {processes} ended with {code}:\n{log.read()[-6000:]}")


def work(engine: str, cases: Sequence[Case]) -> None:
    """In one of the processes: every case, in order."""
    for case in cases:
        if case.get("lockstep"):
            run_in_lockstep(Path(case["output"]), case["settings"], case["stages"], steps=case["lockstep"])
        else:
            with seeded(case.get("bug")):
                run(engine, Path(case["output"]), case["settings"], may_stop="bug" in case)


def run(engine: str, output: Path, settings: Sequence[str], *, may_stop: bool) -> None:
    """A run. may_stop: where one of its own checks ends it, leave the message in OUTPUT/stopped-RANK."""
    from diptych.errors import InvariantError
    from diptych.recipe.load import load_recipe
    from diptych.stages.pipeline import run_recipe

    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", settings)
    try:
        run_recipe(recipe, engine_name=engine, output=output, distributed=os.environ["WORLD_SIZE"] != "1")
    except InvariantError as error:
        if not may_stop:
            raise
        (output / f"stopped-{os.environ['RANK']}").write_text(str(error), encoding="utf-8")


def run_in_lockstep(output: Path, settings: Sequence[str], stages: Sequence[int], *, steps: int) -> None:
    """So many steps at each ZeRO stage; the JAX side goes on from one to the next, and each torch side starts where it
    is. Leaves OUTPUT/STAGE-RANK.json in every process."""
    from diptych.parity.comparison.rungs import climb
    from diptych.parity.recorder import StepRecorder
    from diptych.parity.trace import Step
    from diptych.recipe.load import load_recipe
    from diptych.stages.pipeline import prepare
    from diptych.stages.rl import PPO, build_models

    rank = os.environ["RANK"]
    ours: list[Step] = []

    def side(engine: str, folder: str, recorder: StepRecorder, *more: str) -> PPO:
        recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*settings, *more])
        context = prepare(recipe, engine_name=engine, output=output / folder, distributed=engine == "torch")
        return PPO(replace(context, recorder=recorder), build_models(context))

    def iterate(ppo: PPO, number: int) -> None:
        prompts = ppo.context.datasets.prompts
        assert prompts is not None
        metrics, _ = ppo.iterate(ppo.prompts(prompts.train, number), number)
        ppo.context.recorder.end("rl", number, metrics, {})

    jax = side("jax", f"jax-{rank}", StepRecorder(ours.append, seed=0))
    for turn, stage in enumerate(stages):
        theirs: list[Step] = []
        replays = StepRecorder(theirs.append, seed=0, source=lambda _stage, _step: ours[-1])
        torch = side("torch", f"torch-{stage}", replays, f"layout.zero.stage={stage}", SPLIT_ALL)
        found: dict[str, Any] = {"differences": [], "near_ties": [], "tokens": 0}
        for number in range(turn * steps, turn * steps + steps):
            iterate(jax, number)
            iterate(torch, number)
            for rung in climb(ours[-1], theirs[-1], precision="float32"):
                found["differences"] += [f"{ours[-1].name}: {one}" for one in rung.red]
                found["near_ties"] += [asdict(tie) for tie in rung.near_ties]
            found["tokens"] += int(ours[-1].array("used/mask").sum())
        (output / f"{stage}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@contextlib.contextmanager
def seeded(bug: str | None) -> Iterator[None]:
    """Inside, the torch engine has this bug."""
    with ExitStack() as stack:
        for target, value in BUGS[bug]().items() if bug else ():
            stack.enter_context(mock.patch(target, value))
        yield


def _mean_over_processes() -> dict[str, Any]:
    """DeepSpeed's mean of gradients is not undone."""
    from diptych_torch import zero

    initialize = zero.initialize

    def wrong(*arguments: Any, **options: Any) -> Any:
        engine = initialize(*arguments, **options)
        backward = engine.backward
        engine.backward = lambda value, **settings: backward(value / zero.world_size(), **settings)
        return engine

    return {"diptych_torch.zero.initialize": wrong}


def _filler_counts() -> dict[str, Any]:
    """Rows that fill up a micro-batch are copies of its first row, and count."""
    return {
        "diptych_torch.training.take_tokens": lambda batch, rows: batch.take(rows.clip(0)),
        "diptych_torch.training.take_array": lambda array, rows: array[rows.clip(0)],
    }


def _denominator_of_one_process() -> dict[str, Any]:
    from diptych_torch.training import accumulate

    def wrong(run: Any, loss: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        own = {name: value / 2 for name, value in batch.denominators.items()}
        return accumulate(run, loss, replace(batch, denominators=own), *arguments, **options)

    return {"diptych_torch.engine.accumulate": wrong}


def _metrics_of_one_process() -> dict[str, Any]:
    return {"diptych_torch.engine.add_over_processes": lambda metrics, device: metrics}


def _dummy_step() -> dict[str, Any]:
    """The step that some of DeepSpeed's optimizers make before the first stays counted."""
    from diptych_torch import optimizer

    begin = optimizer.begin

    def wrong(spec: Any, built: Any, flats: Any) -> None:
        begin(spec, built, flats)
        for flat in flats:
            built.state[flat]["step"] += 1

    return {"diptych_torch.optimizer.begin": wrong}


def _clipping_by_one_process() -> dict[str, Any]:
    """The norm of the piece of the gradients that this process has (stages 1 and 2)."""
    import torch

    def wrong(self: Any, gradients: Any, params: Any, norm_type: float = 2.0) -> Any:
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in gradients]))

    return {"deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.get_grad_norm_direct": wrong}


def _rows_in_the_order_of_processes() -> dict[str, Any]:
    from diptych_torch.data_parallel import gather_rows

    def wrong(parts: Any, size: int, count: int) -> Any:
        return gather_rows(parts, size, count).flip(0)

    return {"diptych_torch.engine.gather_rows": wrong}


BUGS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "the mean of gradients over processes": _mean_over_processes,
    "filler rows count": _filler_counts,
    "a denominator of one process": _denominator_of_one_process,
    "metrics of one process": _metrics_of_one_process,
    "Adam's dummy step": _dummy_step,
    "clipping by one process": _clipping_by_one_process,
    "rows in another order": _rows_in_the_order_of_processes,
}

if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]))
