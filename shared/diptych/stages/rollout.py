"""Rollouts: prompts in, finished responses out, with the masks that the sampler knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped

from diptych import random
from diptych.data.batches import join, prompt_batch
from diptych.data.examples import PromptExample, TokenExample
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Completions, Finish, Metrics, Model, PromptBatch, Sampling, TokenBatch
from diptych.errors import UserError
from diptych.recipe.schema import Recipe
from diptych.stages.context import StageContext


@runtime_checkable
class Sampler(Protocol):
    """What generates: a model of an engine, or a server (`served.ServedPolicy`). See `diptych.engine.Model`."""

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions: ...

    def rollout_metrics(self) -> Metrics: ...


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Finished responses. tokens: prompt and response in one row, responses from column `tokens.first` on."""

    prompts: PromptBatch
    completions: Completions
    tokens: TokenBatch
    texts: list[str]

    @property
    def ended(self) -> np.ndarray:
        """[rows] bool: the response ended by itself."""
        return self.completions.finish == Finish.STOP

    def of_response(self, columns: Shaped[np.ndarray, "rows time"]) -> Shaped[np.ndarray, "rows new"]:
        """Token-aligned columns of the responses."""
        return columns[:, self.tokens.first :]

    def at_response(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `of_response`: full-width columns, 0 elsewhere."""
        columns = np.zeros(self.tokens.tokens.shape, values.dtype)
        columns[:, self.tokens.first :] = values
        return columns

    def at_state(self, values: np.ndarray) -> np.ndarray:
        """Response-aligned values in the column before each response token, where its state is; 0 elsewhere."""
        columns = np.zeros(self.tokens.tokens.shape, values.dtype)
        columns[:, self.tokens.first - 1 : -1] = values
        return columns


def sampling_of(recipe: Recipe, tokenizer: Tokenizer) -> Sampling:
    """The recipe's sampling settings, stop strings resolved to single tokens."""
    rollout = recipe.rollout
    stop = list(tokenizer.eos_token_ids)
    for text in rollout.stop:
        token = tokenizer.token_id(text)
        if token is None:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(f"rollout.stop: {text!r} is {len(ids)} tokens; only single tokens can end a response")
            token = ids[0]
        stop.append(token)
    return Sampling(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=tuple(dict.fromkeys(stop)),
        decode_rows=rollout.decode_rows,
    )


def roll_out(
    sampler: Sampler,
    prompts: Sequence[PromptExample],
    *,
    rows: Sequence[int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    buckets: Sequence[int],
    seed: int,
    purpose: str,
    step: int,
    widths: Sequence[int] = (),
) -> Rollout:
    """Sample one response to each prompt. The draws are keyed by (seed, purpose, step, row id, position).

    widths: rising; responses come back as wide as the first that holds the longest of them, else max_new_tokens wide.
    """
    batch = prompt_batch(prompts, buckets=buckets, pad_token_id=tokenizer.pad_token_id)
    uniforms = random.uniforms(seed, purpose, step=step, rows=rows, num_positions=sampling.max_new_tokens)
    completions = sampler.generate(batch, sampling, uniforms, pad_token_id=tokenizer.pad_token_id)
    completions = fitted(completions, widths)
    texts = [
        tokenizer.decode(tokens[mask].tolist())
        for tokens, mask in zip(completions.tokens, completions.mask, strict=True)
    ]
    return Rollout(prompts=batch, completions=completions, tokens=join(batch, completions), texts=texts)


def fitted(completions: Completions, widths: Sequence[int]) -> Completions:
    """The same responses without the columns that none of them needs, down to one of `widths`."""
    longest = int(completions.mask.sum(axis=1).max())
    width = next((one for one in widths if one >= longest), completions.mask.shape[1])
    if width == completions.mask.shape[1]:
        return completions
    columns = {name: getattr(completions, name)[:, :width].copy() for name in ("tokens", "mask", "logprobs", "margins")}
    return replace(completions, **columns)


def sample_texts(
    context: StageContext, model: Model, prompts: Sequence[PromptExample], *, stage: str, when: str
) -> None:
    """Write a few sampled answers to samples.jsonl, for the report."""
    if not prompts:
        return
    rollout = roll_out(
        model,
        prompts,
        rows=[prompt.row for prompt in prompts],
        sampling=sampling_of(context.recipe, context.tokenizer),
        tokenizer=context.tokenizer,
        buckets=context.recipe.data.buckets,
        seed=context.recipe.seed,
        purpose=f"{stage}/samples",
        step=0,
    )
    samples = [
        {"prompt": prompt.text, "response": text, "score": None}
        for prompt, text in zip(prompts, rollout.texts, strict=True)
    ]
    context.run.add_samples(stage, when, samples)


def prompt_of(example: TokenExample, tokenizer: Tokenizer) -> PromptExample:
    """The prompt of a demonstration: what stands before its first trained token."""
    tokens = example.tokens[: int(example.trained.argmax())]
    return PromptExample(row=example.row, tokens=tokens, text=tokenizer.decode(tokens.tolist()), data={})
