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
    examples: Sequence[TokenExample], *, buckets: Sequence[int], pad_token_id: int, multiple_of: int
) -> TrainBatch:
    """Demonstrations of one optimizer step. arrays: mask [batch, time], 1 on trained tokens. denominators: num_tokens,
    their number.

    Rows are filled up to a multiple of `multiple_of` with copies of the last one whose masks are zero.
    """
    tokens = right_padded([example.tokens for example in examples], buckets, pad_token_id)
    mask = np.zeros(tokens.tokens.shape, np.float32)
    for index, example in enumerate(examples):
        mask[index, : len(example.trained)] = example.trained
    rows = _filled(len(examples), multiple_of)
    return TrainBatch(
        tokens=tokens.take(rows),
        arrays={"mask": _blank(mask[rows], len(examples))},
        denominators={"num_tokens": float(mask.sum(dtype=np.float64))},
    )


def pair_batch(
    pairs: Sequence[PairExample], *, buckets: Sequence[int], pad_token_id: int, multiple_of: int, span: bool = False
) -> TrainBatch:
    """Preference pairs of one optimizer step: pair i is rows 2i (chosen) and 2i + 1 (rejected).

    arrays [batch, time]: end_mask, 1 at the last response token; with `span` also span_mask, 1 on columns d .. e - 1 of
    both rows of a pair, where d is the first column in which they differ and e the greater of their lengths
    (DeepSpeed-Chat's `RewardModel.forward`, without its count of leading padding). denominators: num_pairs.

    Pairs are filled up to a multiple of `multiple_of` pairs with copies of the last one whose masks are zero.
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
    rows = np.stack([2 * _filled(len(pairs), multiple_of), 2 * _filled(len(pairs), multiple_of) + 1], axis=1).ravel()
    return TrainBatch(
        tokens=tokens.take(rows),
        arrays={name: _blank(array[rows], len(examples)) for name, array in arrays.items()},
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


def _filled(num_rows: int, multiple_of: int) -> Int[np.ndarray, " filled"]:
    """range(num_rows), its last entry repeated up to a multiple of `multiple_of`."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    filled = -(-num_rows // multiple_of) * multiple_of
    return np.minimum(np.arange(filled), num_rows - 1)


def _blank(array: Float[np.ndarray, "batch time"], num_rows: int) -> Float[np.ndarray, "batch time"]:
    """`array` with zeros in the rows that only fill the batch."""
    array[num_rows:] = 0
    return array
