"""Stage 2, the reward model: a scalar head on the language model, trained so that chosen responses score higher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diptych.algorithms.losses import dschat_reward_loss, pairwise_reward_loss
from diptych.data.batches import pair_batch
from diptych.data.examples import PairExample
from diptych.engine import MASTERS, Loss, Model, TrainBatch
from diptych.stages.context import NUM_SAMPLES, StageContext, optimizer_spec
from diptych.stages.rollout import prompt_of
from diptych.stages.supervised import Supervision, train
from diptych.weights.huggingface import read_checkpoint, with_scalar_head


def run_reward(context: StageContext) -> dict[str, Any]:
    """Train the reward model, leave it in models/reward, and return the stage's summary."""
    recipe, settings = context.recipe, context.recipe.reward
    split = context.datasets.preferences
    assert split is not None, "the pipeline reads the data of every stage that it runs"
    checkpoint = read_checkpoint(context.model_directories["reward"], precision=MASTERS[recipe.precision])
    if checkpoint.head == "lm":
        checkpoint = with_scalar_head(checkpoint, seed=recipe.seed)
    tokenizer = context.tokenizers["reward"]
    dschat = settings.dialect == "dschat"
    model = context.model(
        checkpoint,
        optimizer=optimizer_spec(settings.optimizer),
        micro_batch_size=2 * settings.micro_batch_size,
        adapter=settings.adapter,
    )

    def make_batch(pairs: Sequence[PairExample]) -> TrainBatch:
        return pair_batch(
            pairs,
            buckets=recipe.data.buckets,
            pad_token_id=tokenizer.pad_token_id,
            multiple_of=settings.micro_batch_size,
            span=dschat,
        )

    loss = Loss(
        function=dschat_reward_loss if dschat else pairwise_reward_loss,
        reads="scores",
        options=(("center_coef", settings.center_coef),),
        balance=context.balance(checkpoint.model),
        group=2,
    )
    supervision = Supervision(
        stage="reward",
        settings=settings,
        model=model,
        loss=loss,
        train=split.train,
        held_out=split.held_out,
        make_batch=make_batch,
        denominator="num_pairs",
        eval_names={
            "loss": "eval/loss",
            "reward/accuracy": "eval/accuracy",
            "reward/margin": "eval/margin",
            "reward/chosen": "eval/chosen",
            "reward/rejected": "eval/rejected",
        },
    )
    shown = split.held_out[:NUM_SAMPLES]
    _show_scores(context, model, shown, make_batch, when="before")
    result = train(context, supervision)
    _show_scores(context, model, shown, make_batch, when="after")
    context.save_trained("reward", checkpoint, model, role="reward")
    return {
        "eval_loss_first": result.first["eval/loss"],
        "eval_loss_last": result.last["eval/loss"],
        "eval_accuracy": result.last["eval/accuracy"],
        "steps": result.steps,
        "seconds": result.seconds,
        "data": split.report,
    }


def _show_scores(context: StageContext, model: Model, pairs: Sequence[PairExample], make_batch, *, when: str) -> None:
    """Held-out pairs with their scores, for the report."""
    if not pairs:
        return
    batch, tokenizer = make_batch(pairs), context.tokenizers["reward"]
    scores = np.sum(model.scores(batch.tokens) * batch.arrays["end_mask"], axis=1)
    samples = []
    for index, pair in enumerate(pairs):
        prompt = prompt_of(pair.chosen, tokenizer)
        for which, example, score in (
            ("chosen", pair.chosen, scores[2 * index]),
            ("rejected", pair.rejected, scores[2 * index + 1]),
        ):
            response = tokenizer.decode(example.tokens[len(prompt.tokens) :].tolist())
            samples.append({"prompt": prompt.text, "response": f"[{which}] {response}", "score": float(score)})
    context.run.add_samples("reward", when, samples)
