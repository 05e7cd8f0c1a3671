"""One engine's side of a contest: a real PPO run, an iteration whenever it is asked for (`contest.py`).

    python -m diptych.bench.worker ENGINE WORK RUN [distributed]

WORK: a folder of `work.write_work`. RUN: the run directory, a new one. distributed: this is one of several
processes (as in `diptych run`), of which the first is talked to.

What is timed is `stages.rl.PPO.iterate`, the very thing that `diptych run` does, its phases by the clock around each
call of a model. Only the stop tokens are taken away where lengths are forced.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from diptych import random
from diptych.bench.contest import MARK
from diptych.bench.flops import parameters
from diptych.bench.work import read_work, recipe
from diptych.data.batches import prompt_batch
from diptych.stages.pipeline import prepare
from diptych.stages.rl import PPO, Timer
from diptych.stages.rl_models import build_models


def timed(timer: Timer, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose calls count in a phase of the timer."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with timer.phase(name):
            return function(*args, **kwargs)

    return call


class Side:
    """An engine with a workload's models."""

    def __init__(self, engine: str, folder: Path, run: Path, *, distributed: bool):
        self.workload = workload = read_work(folder)
        wanted = recipe(workload, folder)
        self.context = prepare(wanted, engine_name=engine, output=run, stages=("rl",), distributed=distributed)
        models = build_models(self.context)
        self.timer = timer = Timer()
        for model, method, name in (
            (models.policy, "generate", "rollout"),
            (models.policy, "logprobs", "score/policy"),
            (models.reference, "logprobs", "score/reference"),
            (models.critic, "scores", "score/critic"),
            (models.policy, "update", "update/policy"),
            (models.critic, "update", "update/critic"),
        ):
            setattr(model, method, timed(timer, name, getattr(model, method)))
        self.ppo = PPO(self.context, replace(models, score=timed(timer, "score/reward", models.score)))
        self.ppo.roll_out = timed(timer, "whole rollout", self.ppo.roll_out)
        if workload.forced:
            self.ppo.sampling = replace(self.ppo.sampling, stop_token_ids=())
        self.step = 0

    def iterate(self) -> dict[str, Any]:
        """One iteration, as `contest.Iteration` has it."""
        self.timer.seconds.clear()
        split = self.context.datasets.prompts
        assert split is not None
        began, cpu = time.perf_counter(), time.process_time()
        metrics, tokens = self.ppo.iterate(self.ppo.prompts(split.train, self.step), self.step)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        self.step += 1
        phases = dict(self.timer.seconds)
        phases["data"] = phases.pop("whole rollout") - phases["rollout"]  # prompts, uniforms, texts
        phases["switch"] = metrics.get("timing_s/switch", 0.0)
        phases["rollout"] -= phases["switch"]
        phases["other"] = seconds - sum(phases.values())
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "phases": phases,
            "tokens": tokens,
            "compilations": metrics.get("compilations"),
        }

    def prefill(self, times: int = 5) -> float:
        """Median seconds of a rollout that draws one token of each row."""
        split = self.context.datasets.prompts
        assert split is not None
        prompts = self.ppo.prompts(split.train, 0)
        batch = prompt_batch(prompts, buckets=self.ppo.recipe.data.buckets, pad_token_id=0)
        sampling = replace(self.ppo.sampling, max_new_tokens=1)
        uniforms = random.uniforms(0, "bench/prefill", step=0, rows=range(len(prompts)), num_positions=1)
        found = []
        for _ in range(times + 1):
            began = time.perf_counter()
            self.ppo.models.policy.generate(batch, sampling, uniforms, pad_token_id=0)
            found.append(time.perf_counter() - began)
            switched = self.ppo.models.policy.rollout_metrics().get("timing_s/switch", 0.0)
            found[-1] -= switched
        return float(np.median(found[1:]))

    def finish(self) -> dict[str, Any]:
        """What is measured last, because it would disturb the rest."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        engine = self.context.engine
        instruments = engine.instruments()
        return {
            "peak_bytes": peak,
            "device_peak_bytes": instruments.peak_bytes(),
            "compilations": engine.compilations(),
            "prefill": self.prefill(),
            "ceilings": instruments.ceilings(),
        }


def main() -> None:
    engine, work, run = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    distributed = sys.argv[4:] == ["distributed"]
    side: Side | None = None
    if distributed:  # all begin together, and the first hears for all
        side = Side(engine, work, run, distributed=True)
    while line := _line(side):
        asked = json.loads(line)
        match asked["do"]:
            case "start":
                side = side or Side(engine, work, run, distributed=False)
                environment = side.context.engine.environment()
                answer = {"parameters": parameters(side.workload), "environment": environment}
            case "iterate":
                assert side is not None
                answer = side.iterate()
            case "profile":
                assert side is not None
                with side.context.engine.instruments().profile(Path(asked["folder"])) as answer:
                    iteration = side.iterate()
                answer["iteration"] = iteration
            case "finish":
                assert side is not None
                answer = side.finish()
            case word:
                raise ValueError(f"cannot {word}")
        if side.context.run.world.is_main:
            print(MARK + json.dumps(answer), flush=True)
    sys.stdout.flush()
    os._exit(0)  # nothing is left to save, and some frameworks take long to part


def _line(side: Side | None) -> str:
    """The next word; "" at the end."""
    return sys.stdin.readline() if side is None else side.context.run.world.first(sys.stdin.readline)


if __name__ == "__main__":
    main()
