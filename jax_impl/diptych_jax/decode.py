"""Sampling completions: prefill of left-padded prompts, then one compiled `jax.lax.while_loop` over a static cache.

The keys and values of all prompt and response columns live in one buffer per layer, written in place: S = prompt + new
columns (a recurrent model has its state instead). The loop stops as soon as every row has finished. Prefill and loop
read tokens through the same function (`Decoder.reader`), whose layers are the training layers taken apart once;
positions are explicit; logits come from the function that the trainer's log-probabilities use. The engine owns no
random numbers: uniforms are given, one per row and column.

Dimensions: B batch, P prompt columns, E new columns, S = P + E, D width of the states that the head reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from diptych.algorithms.sampling import check_sampling
from diptych.engine import Completions, Finish, PromptBatch, Sampling
from diptych.families.family import check_reach
from diptych_jax.logprobs import tempered
from diptych_jax.sampling import Draw, draw, draw_greedy
from diptych_jax.weights import Model


class _Settings(NamedTuple):
    """What changes the program."""

    num_new: int
    greedy: bool
    top_k: int
    nucleus: bool
    prefill: tuple[int, ...]  # columns of each piece in which the prompts are read


class _Loop(NamedTuple):
    """What the loop carries. step: columns drawn so far; the last of them is not yet in the state."""

    step: Int[Array, ""]
    state: Any  # the cache, or a recurrent state
    last_B: Int[Array, " B"]
    finished_B: Bool[Array, " B"]
    tokens_BE: Int[Array, "B E"]
    mask_BE: Bool[Array, "B E"]
    logprobs_BE: Float[Array, "B E"]
    margins_BE: Float[Array, "B E"]


@partial(jax.jit, static_argnames=("settings",))
def _generate(
    model: Model,
    prompt_BP: Int[Array, "B P"],
    attention_BP: Bool[Array, "B P"],
    positions_BP: Int[Array, "B P"],
    uniforms_BE: Float[Array, "B E"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop_ids: Int[Array, " stops"],
    pad_id: Int[Array, ""],
    *,
    settings: _Settings,
) -> _Loop:
    batch, num_prompt = prompt_BP.shape
    num_new = settings.num_new
    dtype = jnp.promote_types(model.dtype, jnp.float32)

    def sample(x_BD: Float[Array, "B D"], column: Int[Array, ""]) -> Draw:
        logits_BV = tempered(model.unembed, x_BD, temperature)
        if settings.greedy:
            return draw_greedy(logits_BV)
        uniforms_B = jax.lax.dynamic_index_in_dim(uniforms_BE, column, axis=1, keepdims=False)
        return draw(logits_BV, uniforms_B, top_p, top_k=settings.top_k, nucleus=settings.nucleus)

    def record(loop: _Loop, x_BD: Float[Array, "B D"]) -> _Loop:
        """Draw the token of column `step` from the state after the one before it; finished rows stay as they are."""
        tokens_B, logprobs_B, margins_B = sample(x_BD, loop.step)
        running_B = ~loop.finished_B
        tokens_B = jnp.where(running_B, tokens_B, pad_id)

        def write(buffer_BE, values_B):
            return jax.lax.dynamic_update_slice_in_dim(buffer_BE, values_B[:, None], loop.step, axis=1)

        return loop._replace(
            step=loop.step + 1,
            last_B=tokens_B,
            # A stop token belongs to the response: it is written with its mask, and the row is finished after it.
            finished_B=loop.finished_B | jnp.any(tokens_B[:, None] == stop_ids, axis=1),
            tokens_BE=write(loop.tokens_BE, tokens_B),
            mask_BE=write(loop.mask_BE, running_B),
            logprobs_BE=write(loop.logprobs_BE, jnp.where(running_B, logprobs_B, 0)),
            margins_BE=write(loop.margins_BE, jnp.where(running_B, margins_B, 0)),
        )

    # All columns, those to come included: real from the first response column on, positions going on from the prompt's.
    # (The mask is causal, so nothing reads a column before it is written.)
    columns_E = jnp.arange(num_new, dtype=jnp.int32)
    attention_BS = jnp.pad(attention_BP, ((0, 0), (0, num_new)), constant_values=True)
    positions_BS = jnp.concatenate([positions_BP, positions_BP[:, -1:] + 1 + columns_E], axis=1)
    read = partial(model.reader(), attention_BS=attention_BS, positions_BS=positions_BS)
    state, column = model.state(batch, num_prompt + num_new), 0
    hidden_BPD = jnp.zeros((batch, 0, 0), dtype)
    for size in settings.prefill:
        piece = slice(column, column + size)
        hidden_BPD, state = read(
            state, prompt_BP[:, piece], attention_BP[:, piece], positions_BP[:, piece], column=column
        )
        column += size
    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        state=state,
        last_B=jnp.zeros(batch, jnp.int32),
        finished_B=jnp.zeros(batch, bool),
        tokens_BE=jnp.full((batch, num_new), pad_id, jnp.int32),
        mask_BE=jnp.zeros((batch, num_new), bool),
        logprobs_BE=jnp.zeros((batch, num_new), dtype),
        margins_BE=jnp.zeros((batch, num_new), dtype),
    )

    def body(loop: _Loop) -> _Loop:
        column = num_prompt + loop.step - 1
        hidden_B1D, state = read(
            loop.state,
            loop.last_B[:, None],
            jnp.ones((batch, 1), bool),
            positions_BP[:, -1:] + loop.step,
            column=column,
        )
        return record(loop._replace(state=state), hidden_B1D[:, 0])

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < num_new) & ~jnp.all(loop.finished_B)

    # Prompts are left-padded: the last column of every row is real.
    end = jax.lax.while_loop(unfinished, body, record(start, hidden_BPD[:, -1]))
    return end._replace(state=None)


def generate(
    model: Model,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    prefill: tuple[int, ...] | None = None,
) -> Completions:
    """Sample completions; see `diptych.engine.Model.generate`. All rows run at once.

    prefill: columns of each piece in which the prompts are read, together all of them; None: in one piece.

    One program per (rows, prompt columns, max_new_tokens, number of stop tokens, greedy, top_k, top-p on or off);
    temperature, top_p and the token ids may change without a compilation. Raises ValueError for inputs that break the
    protocol and UserError for settings that define no distribution.
    """
    num_new = sampling.max_new_tokens
    if uniforms.shape != (len(prompts), num_new):
        raise ValueError(f"uniforms have shape {uniforms.shape}, the protocol asks for {(len(prompts), num_new)}")
    real = prompts.attention
    if not real[:, -1].all() or (np.diff(real.astype(np.int8), axis=1) < 0).any():
        raise ValueError("prompts must be left-padded: every row one or more real tokens, and none before padding")
    if num_new < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {num_new}")
    check_reach(model.config, prompt=int(prompts.positions.max()) + 1, new=num_new)
    check_sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    dtype = model.dtype
    greedy = sampling.temperature == 0
    end = _generate(
        model,
        jnp.asarray(prompts.tokens, jnp.int32),
        jnp.asarray(real, bool),
        jnp.asarray(prompts.positions, jnp.int32),
        jnp.asarray(uniforms, dtype),
        jnp.asarray(sampling.scoring_temperature, dtype),
        jnp.asarray(sampling.top_p, dtype),
        jnp.asarray(sampling.stop_token_ids, jnp.int32),
        jnp.asarray(pad_token_id, jnp.int32),
        settings=_Settings(
            num_new=num_new,
            greedy=greedy,
            top_k=0 if greedy else sampling.top_k,
            nucleus=not greedy and sampling.top_p < 1,
            prefill=prefill or (prompts.tokens.shape[1],),
        ),
    )
    # Copies: NumPy's views of JAX arrays are read-only.
    tokens, mask, logprobs, margins, finished = (
        np.array(values) for values in (end.tokens_BE, end.mask_BE, end.logprobs_BE, end.margins_BE, end.finished_B)
    )
    finish = np.where(finished, int(Finish.STOP), int(Finish.LENGTH)).astype(np.int32)
    return Completions(tokens=tokens, mask=mask, logprobs=logprobs, margins=margins, finish=finish)
