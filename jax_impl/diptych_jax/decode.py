"""Sampling completions: prefill of left-padded prompts, then compiled `jax.lax.while_loop`s over a static cache.

Prompts wait in a queue and are decoded in *slots*: as many rows as run at once. Where there are fewer slots than
prompts, a row that has finished leaves its slot, and as soon as enough are free the next prompts are prefilled as a
group and take them: a loop around the loop, in the same program. A slot's column, padding and uniforms are its row's
own, so no row depends on its slot or its neighbours. The loops stop as soon as every row has finished.

Prefill and loop read tokens through the same function (`reader`), whose layers are the training layers taken apart
once; logits come from the function that the trainer's log-probabilities use. The engine owns no random numbers:
uniforms are given, one per row and column.

On a mesh slots and queue are split over its row axes: each shard has its own queue, and rows are moved by indices
within a shard only. Which row is in which shard changes no number.

Dimensions: B slots (of all shards, one shard after the other), Q rows of the queues (likewise), Z shards, R rows of one
shard, G rows of a group, P prompt columns, E new columns, S = P + E, D width of the states that the head reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from diptych.algorithms.sampling import check_sampling
from diptych.engine import Completions, Finish, PromptBatch, Sampling, TokenBatch
from diptych.families.family import check_reach
from diptych_jax.logprobs import tempered
from diptych_jax.mesh import constrain, num_shards, place_rows, to_host
from diptych_jax.sampling import Draw, draw, draw_greedy
from diptych_jax.weights import Model

GROUP = 8  # a refill waits until so many-th a part of the slots can be filled
SHORT = 512  # columns of a cache whose parts are not worth a branch


class Settings(NamedTuple):
    """What changes the program."""

    num_new: int
    slots: int  # rows that are decoded at once, of all shards
    shards: int
    greedy: bool
    top_k: int
    nucleus: bool
    prefill: tuple[int, ...]  # columns of each piece in which the prompts are read
    prefixes: tuple[int, ...]  # how many columns of the cache a step may read; the last is all


class Queue(NamedTuple):
    """The prompts, and what their rows are drawn with. padding: columns before a prompt; all: there is no prompt."""

    prompt_QP: Int[Array, "Q P"]
    padding_Q: Int[Array, " Q"]
    uniforms_QE: Float[Array, "Q E"]


class Draws(NamedTuple):
    """What each row has drawn. Tokens are -1 where there are none; numbers: log-probabilities and margins."""

    tokens_QE: Int[Array, "Q E"]
    numbers_QE2: Float[Array, "Q E 2"]


class _Slots(NamedTuple):
    """The rows that are decoded. step: tokens drawn so far; the last of them is not yet in the state."""

    row_B: Int[Array, " B"]  # in the shard's queue
    padding_B: Int[Array, " B"]
    step_B: Int[Array, " B"]
    last_B: Int[Array, " B"]
    running_B: Bool[Array, " B"]
    state: Any  # the cache, or a recurrent state; rows first


class _Loop(NamedTuple):
    """What the loops carry. taken: rows of each shard's queue that have got a slot."""

    slots: _Slots
    draws: Draws
    taken_Z: Int[Array, " Z"]


@partial(jax.jit, static_argnames=("settings",))
def program(
    model: Model,
    queue: Queue,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop_ids: Int[Array, " stops"],
    *,
    settings: Settings,
) -> Draws:
    """All rows of the queue, to their ends. One compilation per shapes and settings."""
    num_queued, num_prompt = queue.prompt_QP.shape
    queued, in_shard = num_queued // settings.shards, settings.slots // settings.shards  # rows and slots of a shard
    group = max(1, in_shard // GROUP)
    refills = in_shard < queued
    unembed, read = model.unembedding(), model.reader()
    by_shard = partial(_by_shard, settings.shards)

    def sample(x_BD: Float[Array, "B D"], row_B: Int[Array, " B"], step_B: Int[Array, " B"]) -> Draw:
        # Rows over every device: a draw sorts and sums over whole rows of the vocabulary.
        logits_BV = _spread(tempered(unembed, x_BD, temperature))
        if settings.greedy:
            drawn = draw_greedy(logits_BV)
        else:
            uniforms_B = by_shard(lambda of_RE, row, step: of_RE[row, step], queue.uniforms_QE, row_B, step_B)
            uniforms_B = _by_rows(uniforms_B)
            drawn = draw(logits_BV, uniforms_B, top_p, top_k=settings.top_k, nucleus=settings.nucleus)
        tokens_B, logprobs_B, margins_B = map(_by_rows, drawn)
        return tokens_B, logprobs_B, margins_B

    def record(slots: _Slots, draws: Draws, x_BD: Float[Array, "B D"]) -> tuple[_Slots, Draws]:
        """Draw the token of column `step` from the state after the one before it; rows that do not run stay as they
        are."""
        step_B = jnp.minimum(slots.step_B, settings.num_new - 1)
        tokens_B, logprobs_B, margins_B = sample(x_BD, slots.row_B, step_B)
        row_B = jnp.where(slots.running_B, slots.row_B, queued)  # beyond the queue: written nowhere

        def write(buffer_QE, values_B):
            def put(of_RE, row, step, values):
                return of_RE.at[row, step].set(values, mode="drop")

            return _by_rows(by_shard(put, buffer_QE, row_B, step_B, values_B))

        # A stop token belongs to the response: it is written, and the row is finished after it.
        ended_B = jnp.any(tokens_B[:, None] == stop_ids, axis=1) | (step_B + 1 == settings.num_new)
        moved = slots._replace(
            step_B=slots.step_B + slots.running_B, last_B=tokens_B, running_B=slots.running_B & ~ended_B
        )
        numbers_B2 = jnp.stack([logprobs_B, margins_B], axis=-1)
        return moved, Draws(write(draws.tokens_QE, tokens_B), write(draws.numbers_QE2, numbers_B2))

    def begin(row_B: Int[Array, " B"], wanted_B: Bool[Array, " B"], draws: Draws, columns: int) -> tuple[_Slots, Draws]:
        """Slots for these rows of the queue, their prompts read and their first tokens drawn."""
        prompt_BP, padding_B = (
            _by_rows(by_shard(lambda of_R, row: of_R[row], part, row_B)) for part in (queue.prompt_QP, queue.padding_Q)
        )
        state, column, hidden_BPD = model.state(len(row_B), columns), 0, None
        for size in settings.prefill:
            end = column + size
            hidden_BPD, state = read(state, prompt_BP[:, column:end], padding_B, column=column, ends=(end,))
            column = end
        assert hidden_BPD is not None
        zeros_B = jnp.zeros_like(row_B)
        slots = _Slots(row_B, padding_B, zeros_B, zeros_B, wanted_B & (padding_B < num_prompt), state)
        # Prompts are left-padded: the last column of every row is real.
        return record(slots, draws, hidden_BPD[:, -1])

    def ready(loop: _Loop) -> tuple[Int[Array, " Z"], Bool[Array, ""]]:
        """How many rows each shard could admit now, and whether that is enough: three quarters of a group, or of all
        that still wait."""
        free_Z = in_shard - jnp.sum(loop.slots.running_B.reshape(settings.shards, -1), axis=1, dtype=jnp.int32)
        wanted_Z = jnp.minimum(queued - loop.taken_Z, group)
        places_Z = jnp.minimum(wanted_Z, free_Z)
        return places_Z, (4 * jnp.sum(places_Z) >= 3 * jnp.sum(wanted_Z)) & jnp.any(wanted_Z > 0)

    def step(loop: _Loop) -> _Loop:
        slots = loop.slots._replace(**{name: _by_rows(getattr(loop.slots, name)) for name in _Slots._fields[:-1]})
        furthest = jnp.max(jnp.where(slots.running_B, slots.step_B, 1))
        # Without refills all rows that run are as far as the furthest, and one column is written in one piece.
        column = num_prompt - 1 + (slots.step_B if refills else furthest)
        which = sum(num_prompt + furthest > end for end in settings.prefixes[:-1])
        hidden_B1D, state = read(
            slots.state, slots.last_B[:, None], slots.padding_B, column=column, ends=settings.prefixes, which=which
        )
        slots, draws = record(slots._replace(state=state), loop.draws, hidden_B1D[:, 0])
        return loop._replace(slots=slots, draws=draws)

    def going(loop: _Loop) -> Bool[Array, ""]:
        running = jnp.any(loop.slots.running_B)
        return running & ~ready(loop)[1] if refills else running

    def refill(loop: _Loop) -> _Loop:
        places_Z, _ = ready(loop)
        place_G = jnp.arange(group, dtype=jnp.int32)
        filled_ZG = place_G < places_Z[:, None]
        row_ZG = jnp.minimum(loop.taken_Z[:, None] + place_G, queued - 1)
        new, draws = begin(row_ZG.reshape(-1), filled_ZG.reshape(-1), loop.draws, num_prompt)
        # Free slots first.
        order_ZR = jnp.argsort(loop.slots.running_B.reshape(settings.shards, -1), axis=1, stable=True)
        slot_ZG = jnp.where(filled_ZG, order_ZR[:, :group], in_shard).astype(jnp.int32)
        slots = _admitted(loop.slots, new, lambda old, rows: by_shard(_put_rows, old, rows, slot_ZG.reshape(-1)))
        return _Loop(slots, draws, loop.taken_Z + places_Z)

    wide = queue.uniforms_QE.dtype
    draws = Draws(
        _by_rows(jnp.full((num_queued, settings.num_new), -1, jnp.int32)),
        _by_rows(jnp.zeros((num_queued, settings.num_new, 2), wide)),
    )
    first_B = _by_rows(jnp.tile(jnp.arange(in_shard, dtype=jnp.int32), settings.shards))
    slots, draws = begin(first_B, jnp.ones(settings.slots, bool), draws, num_prompt + settings.num_new)
    loop = _Loop(slots, draws, jnp.full(settings.shards, in_shard, jnp.int32))
    loop = jax.lax.while_loop(going, step, loop)
    if refills:
        loop = jax.lax.while_loop(
            lambda loop: jnp.any(loop.taken_Z < queued),
            lambda loop: jax.lax.while_loop(going, step, refill(loop)),
            loop,
        )
    return loop.draws


def _by_shard(shards: int, function: Callable[..., Array], *arrays: Array) -> Array:
    """`function` of each shard's part of the arrays' leading axes, so that its indices stay within the shard."""

    parts = jax.vmap(function)(*(array.reshape(shards, -1, *array.shape[1:]) for array in arrays))
    return parts.reshape(-1, *parts.shape[2:])


def _by_rows(array: Array) -> Array:
    """Said often: the compiler would else split whatever touches a draw as the draw is split (`_spread`)."""
    return constrain(array, "rows", *(None,) * (array.ndim - 1))


def _admitted(slots: _Slots, new: _Slots, put: Callable[[Array, Array], Array]) -> _Slots:
    """All that a slot holds is the new row's: nothing of the row before is left but columns that are not yet read."""
    return jax.tree.map(put, slots, new)


def _put_rows(old: Array, new: Array, rows: Int[Array, " G"]) -> Array:
    """`old` with these rows replaced by those of `new`, which may be smaller along the other axes: the rest stays. A
    row beyond the end is written nowhere."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, new.ndim)), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
    )
    return jax.lax.scatter(old, rows[:, None], new, numbers, mode="drop")


def _spread(x_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Rows over all devices, the tensor axis included, where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return constrain(x_BV, "rows" if mesh.empty or len(x_BV) % mesh.size else "all", None)


def prefixes(num_prompt: int, num_columns: int, platform: str) -> tuple[int, ...]:
    """How many columns of the cache a decode step may choose to read: a few numbers up to `num_columns`.

    Long caches in quarters, short ones whole. On a CPU always the whole: there a part of an array is copied before a
    matrix product and costs 2.5 times as much per column (measured, 64 + 960 columns: 1,690 tokens/s whole, 1,050 in
    quarters, 1,440 with an eighth and a quarter only).
    """
    if num_columns < SHORT or platform == "cpu":
        return (num_columns,)
    ends = {-(-num_columns * part // 4) for part in (1, 2, 3, 4)}
    return tuple(sorted(end for end in ends if end > num_prompt))


def generate(
    model: Model,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: Float[np.ndarray, "batch new"],
    *,
    pad_token_id: int,
    prefill: tuple[int, ...] | None = None,
    mesh: Mesh | None = None,
) -> Completions:
    """Sample completions; see `diptych.engine.Model.generate`. `sampling.decode_rows` rows run at once.

    prefill: columns of each piece in which the prompts are read, together all of them; None: in one piece. mesh: where
    the model lies and the rows go (the caller sets it as the context too); None: the default device. The number of rows
    that run at once is rounded up to a multiple of the mesh's row shards.

    One program per (rows, rows at once, prompt columns, max_new_tokens, number of stop tokens, greedy, top_k, top-p on
    or off); temperature, top_p and the token ids may change without a compilation. Raises ValueError for inputs that
    break the protocol and UserError for settings that define no distribution.
    """
    num_new = sampling.max_new_tokens
    _check(model, prompts, sampling, uniforms)
    num_prompts, num_prompt = prompts.tokens.shape
    shards = _shards(mesh)
    in_shard = -(-min(sampling.decode_rows or num_prompts, num_prompts) // shards)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    # Draws in at least float32, whatever the model computes in.
    wide = jnp.promote_types(model.dtype, jnp.float32)
    greedy = sampling.temperature == 0
    draws = program(
        model,
        Queue(*_dealt(prompts, mesh), _deal(uniforms.astype(wide), mesh)),
        np.asarray(sampling.scoring_temperature, wide),
        np.asarray(sampling.top_p, wide),
        np.asarray(sampling.stop_token_ids, np.int32),
        settings=Settings(
            num_new=num_new,
            slots=in_shard * shards,
            shards=shards,
            greedy=greedy,
            top_k=0 if greedy else sampling.top_k,
            nucleus=not greedy and sampling.top_p < 1,
            prefill=prefill or (num_prompt,),
            prefixes=prefixes(num_prompt, num_prompt + num_new, platform),
        ),
    )
    tokens, numbers = (_collect(array, num_prompts, mesh) for array in draws)
    mask = tokens >= 0
    last = np.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
    return Completions(
        tokens=np.where(mask, tokens, np.int32(pad_token_id)),
        mask=mask,
        logprobs=numbers[..., 0].copy(),
        margins=numbers[..., 1].copy(),
        finish=np.where(np.isin(last, sampling.stop_token_ids), int(Finish.STOP), int(Finish.LENGTH)).astype(np.int32),
    )


def logprobs(model: Model, prompts: TokenBatch, *, mesh: Mesh | None = None) -> Float[np.ndarray, "batch time"]:
    """Log-probability of each token of left-padded rows given those before it, as decoding reads them: into a cache.
    0 on padding and on a row's first token. mesh: as in `generate`."""
    return _collect(_logprobs(model, *_dealt(prompts, mesh)), len(prompts), mesh)


@jax.jit
def _logprobs(model: Model, tokens_QP: Int[Array, "Q P"], padding_Q: Int[Array, " Q"]) -> Float[Array, "Q P"]:
    num_rows, num_columns = tokens_QP.shape
    unembed = model.unembedding()
    state = model.state(num_rows, num_columns)
    hidden_QPD, _ = model.reader()(state, tokens_QP, padding_Q, column=0, ends=(num_columns,))

    def of_column(column: tuple[Float[Array, "Q D"], Int[Array, " Q"]]) -> Float[Array, " Q"]:
        x_QD, next_Q = column
        logprobs_QV = jax.nn.log_softmax(_spread(unembed(x_QD)), axis=-1)
        return jnp.take_along_axis(logprobs_QV, next_Q[:, None], axis=1)[:, 0]

    # One column at a time: the logits of all are many times the cache.
    logprobs_PQ = jax.lax.map(of_column, (jnp.swapaxes(hidden_QPD, 0, 1)[:-1], tokens_QP.T[1:]))
    given_QP = jnp.arange(num_columns) > padding_Q[:, None]
    return jnp.where(given_QP, jnp.pad(logprobs_PQ, ((1, 0), (0, 0))).T, 0)


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else num_shards(mesh)


def _deal(rows: np.ndarray, mesh: Mesh | None, fill: int = 0) -> Array:
    """Row i to shard i % shards, so that long ones are spread; where they do not divide, rows of `fill` at the end."""
    shards = _shards(mesh)
    rows = np.concatenate([rows, np.full((-len(rows) % shards, *rows.shape[1:]), fill, rows.dtype)])
    rows = rows.reshape(-1, shards, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
    return jnp.asarray(rows) if mesh is None else place_rows(np.ascontiguousarray(rows), mesh)


def _dealt(prompts: PromptBatch | TokenBatch, mesh: Mesh | None) -> tuple[Array, Array]:
    """Tokens, and how many columns are before them."""
    padding = (~prompts.attention).sum(axis=1, dtype=np.int32)
    return _deal(prompts.tokens.astype(np.int32), mesh), _deal(padding, mesh, fill=prompts.tokens.shape[1])


def _collect(array: Array, num_rows: int, mesh: Mesh | None) -> np.ndarray:
    """The inverse of `_deal`."""
    rows = to_host(array)
    return rows.reshape(_shards(mesh), -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)[:num_rows]


def _check(model: Model, prompts: PromptBatch, sampling: Sampling, uniforms: np.ndarray) -> None:
    if uniforms.shape != (len(prompts), sampling.max_new_tokens):
        raise ValueError(
            f"uniforms have shape {uniforms.shape}, the protocol asks for {(len(prompts), sampling.max_new_tokens)}"
        )
    real = prompts.attention
    if not real[:, -1].all() or (np.diff(real.astype(np.int8), axis=1) < 0).any():
        raise ValueError("prompts must be left-padded: every row one or more real tokens, and none before padding")
    if (prompts.positions != np.maximum(np.cumsum(real, axis=1) - 1, 0)).any():
        raise ValueError("positions of prompts must count a row's real tokens from 0")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {sampling.max_new_tokens}")
    if sampling.decode_rows is not None and sampling.decode_rows < 1:
        raise ValueError(f"decode_rows must be 1 or more, got {sampling.decode_rows}")
    check_reach(model.config, prompt=int(prompts.positions.max()) + 1, new=sampling.max_new_tokens)
    check_sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
