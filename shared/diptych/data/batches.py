"""Examples become arrays of few shapes, and a batch of any step is a function of (seed, purpose, step).

Training rows are padded on the right, prompts on the left, both to a bucket. Padding is where `attention` is False; the
id that stands there (`pad_token_id`) is never looked at. All float arrays are float32, all tokens int32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from diptych import random
from diptych.data.examples import PairExample, PromptExample, TokenExample
from diptych.engine import Completions, PromptBatch, TokenBatch, TrainBatch
from diptych.errors import UserError


def order(num_examples: int, *, seed: int, purpose: str, start: int, count: int) -> Int[np.ndarray, " count"]:
    """Positions start .. start + count of the endless stream of epochs, each a permutation of range(num_examples).

    int64 [count]. Step s of batch size B is `start=s * B, count=B`: a batch may span two epochs, and no example is ever
    left out. The stream depends on (seed, purpose) and not on how it is cut.
    """
    if num_examples < 1 or start < 0 or count < 0:
        raise ValueError(f"order needs examples and a range, got {num_examples=}, {start=}, {count=}")
    pieces = [np.empty(0, np.int64)]
    position = start
    while position < start + count:
        epoch, offset = divmod(position, num_examples)
        piece = random.permutation(seed, purpose, num_examples, step=epoch)[offset : offset + start + count - position]
        pieces.append(piece)
        position += len(piece)
    return np.concatenate(pieces)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens. UserError beyond the largest."""
    fitting = [size for size in buckets if size >= length]
    if not fitting:
        raise UserError(
            f"a row of {length} tokens is longer than the largest of data.buckets ({max(buckets)}): add a larger one"
        )
    return min(fitting)


def sft_batch(
    examples: Sequence[TokenExample],
    *,
    buckets: Sequence[int],
    pad_token_id: int,
    multiple_of: int,
    packing: bool = False,
) -> TrainBatch:
    """Demonstrations of one optimizer step. arrays: mask [batch, time], 1 on trained tokens. denominators: num_tokens,
    their number.

    packing: several to a row (`packed`). Rows are filled up to a multiple of `multiple_of` with padding.
    """
    rows = packed(examples, buckets, multiple_of) if packing else [[example] for example in examples]
    joined = [np.concatenate([example.tokens for example in row]) for row in rows]
    tokens = right_padded(joined, buckets, pad_token_id)
    mask = np.zeros(tokens.tokens.shape, np.float32)
    for index, row in enumerate(rows):
        trained = np.concatenate([example.trained for example in row])
        mask[index, : len(trained)] = trained
        positions = np.concatenate([np.arange(len(example.tokens)) for example in row])
        tokens.positions[index, : len(positions)] = positions
    count = _filled(len(rows), multiple_of)
    return TrainBatch(
        tokens=_with_padding(tokens, count),
        arrays={"mask": _with_zeros(mask, count)},
        denominators={"num_tokens": float(mask.sum(dtype=np.float64))},
    )


def packed(examples: Sequence[TokenExample], buckets: Sequence[int], multiple_of: int) -> list[list[TokenExample]]:
    """Examples put together into rows of one bucket, the longest first, each into the first row that has room.

    Of the buckets that hold the longest example it is the one in which the step takes the fewest columns, filling rows
    included (the shortest of several): never more than with one example to a row. The number of rows differs from step
    to step, in steps of `multiple_of`: for each bucket an engine compiles at most as many shapes as there are
    micro-batches in a step without packing.
    """
    longest_first = sorted(examples, key=lambda example: -len(example.tokens))
    shortest = bucket(len(longest_first[0].tokens), buckets)
    choices = [(width, _first_fit(longest_first, width)) for width in sorted(buckets) if width >= shortest]
    return min(choices, key=lambda choice: _filled(len(choice[1]), multiple_of) * choice[0])[1]


def _first_fit(examples: Sequence[TokenExample], width: int) -> list[list[TokenExample]]:
    rows: list[list[TokenExample]] = []
    room: list[int] = []
    for example in examples:
        length = len(example.tokens)
        index = next((index for index, left in enumerate(room) if left >= length), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(width)
        rows[index].append(example)
        room[index] -= length
    return rows


def pair_batch(
    pairs: Sequence[PairExample], *, buckets: Sequence[int], pad_token_id: int, multiple_of: int, span: bool = False
) -> TrainBatch:
    """Preference pairs of one optimizer step: pair i is rows 2i (chosen) and 2i + 1 (rejected).

    arrays [batch, time]: end_mask, 1 at the last response token; with `span` also span_mask, 1 on columns d .. e - 1 of
    both rows of a pair, where d is the first column in which they differ and e the greater of their lengths
    (DeepSpeed-Chat's `RewardModel.forward`, without its count of leading padding). denominators: num_pairs.

    Pairs are filled up to a multiple of `multiple_of` pairs with padding.
    """
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    tokens = right_padded([example.tokens for example in examples], buckets, pad_token_id)
    end_mask = np.zeros(tokens.tokens.shape, np.float32)
    for index, example in enumerate(examples):
        end_mask[index, np.flatnonzero(example.trained)[-1]] = 1
    arrays = {"end_mask": end_mask}
    if span:
        arrays["span_mask"] = np.zeros(tokens.tokens.shape, np.float32)
        for index, pair in enumerate(pairs):
            arrays["span_mask"][2 * index : 2 * index + 2, slice(*diverging_columns(pair))] = 1
    count = 2 * _filled(len(pairs), multiple_of)
    return TrainBatch(
        tokens=_with_padding(tokens, count),
        arrays={name: _with_zeros(array, count) for name, array in arrays.items()},
        denominators={"num_pairs": float(len(pairs))},
    )


def diverging_columns(pair: PairExample) -> tuple[int, int]:
    """(d, e): the first column in which the two rows differ (one ending counts), and the length of the longer one."""
    chosen, rejected = pair.chosen.tokens, pair.rejected.tokens
    shorter = min(len(chosen), len(rejected))
    different = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    return int(different[0]) if len(different) else shorter, max(len(chosen), len(rejected))


def prompt_batch(prompts: Sequence[PromptExample], *, buckets: Sequence[int], pad_token_id: int) -> PromptBatch:
    """Prompts of one rollout, left-padded to the bucket of the longest."""
    width = bucket(max(len(prompt.tokens) for prompt in prompts), buckets)
    tokens = np.full((len(prompts), width), pad_token_id, np.int32)
    attention = np.zeros((len(prompts), width), bool)
    for index, prompt in enumerate(prompts):
        tokens[index, width - len(prompt.tokens) :] = prompt.tokens
        attention[index, width - len(prompt.tokens) :] = True
    return PromptBatch(tokens=tokens, attention=attention, positions=_positions(attention))


def join(prompts: PromptBatch, completions: Completions) -> TokenBatch:
    """Prompts and what was sampled after them, token for token: [batch, prompt + new], first = the prompts' width."""
    if len(prompts) != len(completions.tokens):
        raise ValueError(f"{len(prompts)} prompts but {len(completions.tokens)} completions")
    attention = np.concatenate([prompts.attention, completions.mask.astype(bool)], axis=1)
    tokens = np.concatenate([prompts.tokens, completions.tokens.astype(np.int32)], axis=1)
    return TokenBatch(
        tokens=tokens, attention=attention, positions=_positions(attention), first=prompts.tokens.shape[1]
    )


def right_padded(rows: Sequence[np.ndarray], buckets: Sequence[int], pad_token_id: int) -> TokenBatch:
    """Rows of tokens [time] of any lengths, filled up on the right to the bucket of the longest."""
    if not rows:
        raise ValueError("a batch needs at least one example")
    width = bucket(max(len(row) for row in rows), buckets)
    tokens = np.full((len(rows), width), pad_token_id, np.int32)
    attention = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        attention[index, : len(row)] = True
    return TokenBatch(tokens=tokens, attention=attention, positions=_positions(attention))


def _positions(attention: Bool[np.ndarray, "batch time"]) -> Int[np.ndarray, "batch time"]:
    """The index of each real token within its row, 0 on padding."""
    return np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32)


def _filled(num_rows: int, multiple_of: int) -> int:
    """The next multiple of `multiple_of`."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    return -(-num_rows // multiple_of) * multiple_of


def _with_padding(tokens: TokenBatch, num_rows: int) -> TokenBatch:
    """Rows of padding appended (the ids there are those of the last row, and as meaningless as any)."""
    filled = tokens.take(np.minimum(np.arange(num_rows), len(tokens) - 1))
    filled.attention[len(tokens) :] = False
    filled.positions[len(tokens) :] = 0
    return filled


def _with_zeros(array: Float[np.ndarray, "batch time"], num_rows: int) -> Float[np.ndarray, "filled time"]:
    """Rows of zeros appended."""
    return np.pad(array, ((0, num_rows - len(array)), (0, 0)))
