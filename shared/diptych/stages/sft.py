"""Stage 1, supervised fine-tuning: the mean negative log-likelihood of response tokens, end-of-sequence included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diptych.algorithms.losses import sft_loss
from diptych.data.batches import sft_batch
from diptych.data.examples import TokenExample
from diptych.engine import MASTERS, Loss, TrainBatch
from diptych.stages.context import NUM_SAMPLES, StageContext, optimizer_spec
from diptych.stages.rollout import prompt_of, sample_texts
from diptych.stages.supervised import Supervision, train
from diptych.weights.huggingface import read_checkpoint


def run_sft(context: StageContext) -> dict[str, Any]:
    """Fine-tune the model, leave it in models/sft, and return the stage's summary."""
    recipe, settings = context.recipe, context.recipe.sft
    split = context.datasets.demonstrations
    assert split is not None, "the pipeline reads the data of every stage that it runs"
    checkpoint = read_checkpoint(context.model_directories["sft"], precision=MASTERS[recipe.precision])
    model = context.model(
        checkpoint,
        optimizer=optimizer_spec(settings.optimizer),
        micro_batch_size=settings.micro_batch_size,
        adapter=settings.adapter,
    )

    def make_batch(examples: Sequence[TokenExample]) -> TrainBatch:
        return sft_batch(
            examples,
            buckets=recipe.data.buckets,
            pad_token_id=context.tokenizer.pad_token_id,
            multiple_of=settings.micro_batch_size,
            packing=recipe.data.packing,
        )

    prompts = [prompt_of(example, context.tokenizer) for example in split.held_out[:NUM_SAMPLES]]
    supervision = Supervision(
        stage="sft",
        settings=settings,
        model=model,
        loss=Loss(function=sft_loss, reads="logprobs", balance=context.balance(checkpoint.model)),
        train=split.train,
        held_out=split.held_out,
        make_batch=make_batch,
        denominator="num_tokens",
        eval_names={"loss": "eval/loss"},
    )
    sample_texts(context, model, prompts, stage="sft", when="before")
    result = train(context, supervision)
    sample_texts(context, model, prompts, stage="sft", when="after")
    context.save_trained("sft", checkpoint, model, role="sft")
    return {
        "eval_loss_first": result.first["eval/loss"],
        "eval_loss_last": result.last["eval/loss"],
        "steps": result.steps,
        "seconds": result.seconds,
        "data": split.report,
    }
