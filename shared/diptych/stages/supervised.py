"""The loop of the supervised stages (sft, reward): batches in keyed order, update, log, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diptych.data.batches import order
from diptych.engine import Loss, Metrics, Model, TrainBatch
from diptych.recipe.schema import RewardRecipe, SFTRecipe
from diptych.run.metrics import MetricsLogger
from diptych.run.progress import Progress
from diptych.stages.checkpoints import Checkpoints
from diptych.stages.context import Clock, StageContext, add_metrics, schedule


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """One supervised stage. make_batch turns examples into a batch whose denominators are its own counts;
    eval_names renames the loss's metrics for evaluation rows."""

    stage: str
    settings: SFTRecipe | RewardRecipe
    model: Model
    loss: Loss
    train: Sequence
    held_out: Sequence
    make_batch: Callable[[Sequence], TrainBatch]
    denominator: str
    eval_names: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SupervisedResult:
    """The held-out metrics before the first and after the last step, and the seconds between."""

    first: Metrics
    last: Metrics
    seconds: float
    steps: int


def num_steps(num_examples: int, settings: SFTRecipe | RewardRecipe) -> int:
    """Optimizer steps of the stage: every example `epochs` times; the last step takes what is left."""
    steps = math.ceil(settings.epochs * num_examples / settings.batch_size)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def train(context: StageContext, supervision: Supervision) -> SupervisedResult:
    """Run the stage to its end, from the newest checkpoint where the run resumes."""
    settings, model, stage = supervision.settings, supervision.model, supervision.stage
    recorder = context.recorder
    total = num_steps(len(supervision.train), settings)
    rate = schedule(settings.learning_rate, settings.optimizer, total)
    checkpoints = Checkpoints(context, stage, {"model": model})
    start, progress = checkpoints.load()
    clock = Clock(before=progress.get("seconds", 0.0))
    first: Metrics = progress.get("eval_first", {})
    last: Metrics = progress.get("eval_last", {})

    with (
        MetricsLogger(context.run, stage, resume_from=start) as logger,
        Progress(total, stage, initial=start, silent=not context.run.world.is_main) as bar,
        checkpoints,
    ):
        if start == 0:
            first = last = evaluate(supervision)
            logger.log(0, last)
        for step in range(start, total):
            if not recorder.wants(stage, step):
                continue
            began = time.perf_counter()
            recorder.begin(stage, step, {"model": model})
            batch = supervision.make_batch(_examples(context, supervision, step))
            recorder.batch(batch)
            lr = rate(step)
            metrics = recorder.update("model", model, supervision.loss, batch, learning_rate=lr)
            seconds = time.perf_counter() - began
            tokens = int(batch.tokens.attention.sum())
            metrics |= {"lr": lr, "tokens": float(tokens), "timing_s/step": seconds}
            done = step + 1
            evaluation: Metrics = {}
            if (done % settings.eval_every == 0 and not recorder.replays) or done == total:
                evaluation = last = evaluate(supervision)
            logger.log(done, metrics | evaluation)
            recorder.end(stage, step, metrics, evaluation)
            bar.advance(tokens=tokens, shown={"loss": metrics["loss"]} | {k: v for k, v in last.items() if "/" in k})
            every = context.recipe.checkpoint.every
            if every and (done % every == 0 or done == total):
                state = {"seconds": clock.seconds(), "eval_first": first, "eval_last": last}
                checkpoints.save(done, state)
    return SupervisedResult(first=first, last=last, seconds=clock.seconds(), steps=total)


def evaluate(supervision: Supervision) -> Metrics:
    """The loss's numbers over all held-out examples, with one denominator for all of them. The balance of experts is a
    means of training and no part of them."""
    loss = replace(supervision.loss, balance=0.0)
    size = supervision.settings.batch_size
    held_out = supervision.held_out
    batches = [supervision.make_batch(held_out[i : i + size]) for i in range(0, len(held_out), size)]
    total = sum(batch.denominators[supervision.denominator] for batch in batches)
    parts = [
        supervision.model.evaluate(loss, replace(batch, denominators={supervision.denominator: total}))
        for batch in batches
    ]
    metrics = add_metrics(parts)
    return {new: metrics[old] for old, new in supervision.eval_names.items()}


def _examples(context: StageContext, supervision: Supervision, step: int) -> list:
    size = supervision.settings.batch_size
    count = min(size, supervision.settings.epochs * len(supervision.train) - step * size)
    chosen: np.ndarray = order(
        len(supervision.train), seed=context.recipe.seed, purpose=f"{supervision.stage}/order",
        start=step * size, count=count,
    )  # fmt: skip
    return [supervision.train[int(index)] for index in chosen]
