"""Order, shapes, padding, masks and positions of batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych import random
from diptych.data import batches
from diptych.data.examples import PairExample, PromptExample, TokenExample
from diptych.engine import Completions
from diptych.errors import UserError

BUCKETS = (4, 8, 16)
PAD = 9


def example(row: int, prompt: list[int], response: list[int]) -> TokenExample:
    return TokenExample(
        row=row,
        tokens=np.array([*prompt, *response], np.int32),
        trained=np.array([False] * len(prompt) + [True] * len(response)),
    )


def pair(row: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> PairExample:
    return PairExample(row=row, chosen=example(row, prompt, chosen), rejected=example(row, prompt, rejected))


def prompt(row: int, tokens: list[int]) -> PromptExample:
    return PromptExample(row=row, tokens=np.array(tokens, np.int32), text="", data={})


# --- order -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 200), st.lists(st.integers(0, 25), max_size=6), st.integers(0, 3))
def test_the_stream_does_not_depend_on_how_it_is_cut(size: int, start: int, counts: list[int], seed: int) -> None:
    key = {"seed": seed, "purpose": "sft"}
    whole = batches.order(size, **key, start=start, count=sum(counts))
    ends = np.cumsum([start, *counts])
    parts = [batches.order(size, **key, start=int(a), count=n) for a, n in zip(ends[:-1], counts, strict=True)]
    assert whole.dtype == np.int64
    assert whole.tolist() == [index for part in parts for index in part.tolist()]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_is_a_permutation(size: int, epoch: int, seed: int) -> None:
    found = batches.order(size, seed=seed, purpose="sft", start=epoch * size, count=size)
    assert sorted(found.tolist()) == list(range(size))
    assert found.tolist() == random.permutation(seed, "sft", size, step=epoch).tolist()


def test_epochs_purposes_and_seeds_have_their_own_orders() -> None:
    def first(**changes: object) -> list[int]:
        arguments = {"seed": 0, "purpose": "sft", "start": 0, "count": 50, **changes}
        return batches.order(50, **arguments).tolist()  # pyright: ignore

    orders = [first(), first(seed=1), first(purpose="reward"), first(start=50)]
    assert all(orders.count(order) == 1 for order in orders)


def test_order_of_nothing_is_a_programming_error() -> None:
    for arguments in ({"num_examples": 0, "start": 0, "count": 1}, {"num_examples": 3, "start": -1, "count": 1}):
        with pytest.raises(ValueError, match="order needs examples"):
            batches.order(**arguments, seed=0, purpose="sft")


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(1, 4), (4, 4), (5, 8), (16, 16)])
def test_bucket(length: int, size: int) -> None:
    assert batches.bucket(length, BUCKETS) == size == batches.bucket(length, BUCKETS[::-1])


def test_no_bucket() -> None:
    with pytest.raises(UserError, match=r"17 tokens is longer than the largest of data.buckets \(16\)"):
        batches.bucket(17, BUCKETS)


def test_few_shapes() -> None:
    generator = random.generator(0, "test:shapes")
    shapes = set()
    for _ in range(60):
        rows = [example(0, [1] * int(generator.integers(1, 8)), [2] * int(generator.integers(1, 9))) for _ in range(5)]
        shapes.add(batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=PAD, multiple_of=4).tokens.tokens.shape)
    assert shapes == {(8, 8), (8, 16)}


# --- training batches ------------------------------------------------------------------------------------------------


def test_sft_batch_by_hand() -> None:
    rows = [example(0, [1, 2], [3, 0]), example(1, [1], [4, 5, 6, 0]), example(2, [1, 1], [0])]
    batch = batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=PAD, multiple_of=2)
    assert batch.tokens.tokens.tolist() == [
        [1, 2, 3, 0, PAD, PAD, PAD, PAD],
        [1, 4, 5, 6, 0, PAD, PAD, PAD],
        [1, 1, 0, PAD, PAD, PAD, PAD, PAD],
        [1, 1, 0, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.tokens.attention.sum(1).tolist() == [4, 5, 3, 0]
    assert batch.tokens.positions.tolist()[1] == [0, 1, 2, 3, 4, 0, 0, 0]
    mask = batch.arrays["mask"]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.denominators == {"num_tokens": 7.0}
    assert float(mask.sum()) == 7.0
    assert mask.dtype == np.float32
    assert batch.tokens.tokens.dtype == batch.tokens.positions.dtype == np.int32
    assert batch.tokens.attention.dtype == bool
    assert batch.tokens.first == 1


@pytest.mark.parametrize("pad_token_id", [0, 3, PAD])
def test_masks_do_not_look_at_ids(pad_token_id: int) -> None:
    """0 is the EOS here, 3 a word: with either as padding, masks and attention stay what they were."""
    rows = [example(0, [3, 0, 3], [3, 0]), example(1, [1], [3, 0])]
    batch = batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=pad_token_id, multiple_of=1)
    assert batch.arrays["mask"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.tokens.attention.sum(1).tolist() == [5, 3]
    guessed = batch.arrays["mask"] * (batch.tokens.tokens != pad_token_id)  # canary: such a mask loses tokens
    assert guessed.sum() == (4 if pad_token_id == PAD else 2)


def test_pair_batch_by_hand() -> None:
    pairs = [pair(0, [1, 2], [3, 4, 0], [3, 0]), pair(1, [1], [0], [5, 6, 7, 0]), pair(2, [1], [4], [4, 4])]
    batch = batches.pair_batch(pairs, buckets=BUCKETS, pad_token_id=PAD, multiple_of=2, span=True)
    assert batch.tokens.tokens[:, :5].tolist() == [
        [1, 2, 3, 4, 0],
        [1, 2, 3, 0, PAD],
        [1, 0, PAD, PAD, PAD],
        [1, 5, 6, 7, 0],
        [1, 4, PAD, PAD, PAD],
        [1, 4, 4, PAD, PAD],
        [1, 4, 4, PAD, PAD],
        [1, 4, 4, PAD, PAD],
    ]
    assert batch.tokens.attention.sum(1).tolist() == [5, 4, 2, 5, 2, 3, 0, 0]
    ends, span = batch.arrays["end_mask"], batch.arrays["span_mask"]
    assert [np.flatnonzero(row).tolist() for row in ends] == [[4], [3], [1], [4], [1], [2], [], []]
    assert [np.flatnonzero(row).tolist() for row in span] == [[3, 4]] * 2 + [[1, 2, 3, 4]] * 2 + [[2]] * 2 + [[]] * 2
    assert batch.denominators == {"num_pairs": 3.0}
    assert ends.dtype == span.dtype == np.float32
    assert [batches.diverging_columns(p) for p in pairs] == [(3, 5), (1, 5), (2, 3)]
    assert "span_mask" not in batches.pair_batch(pairs, buckets=BUCKETS, pad_token_id=PAD, multiple_of=1).arrays


def test_filling_changes_no_sum() -> None:
    rows = [example(i, [1] * (i + 1), [2, 3, 0]) for i in range(5)]
    plain = batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=PAD, multiple_of=1)
    filled = batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=PAD, multiple_of=4)
    assert len(plain.tokens) == 5
    assert len(filled.tokens) == 8
    assert plain.denominators == filled.denominators
    values = np.arange(8.0)[:, None]
    assert (plain.arrays["mask"] * values[:5]).sum() == (filled.arrays["mask"] * values).sum()
    assert filled.tokens.attention.sum() == plain.tokens.attention.sum() == sum(len(row.tokens) for row in rows)


# --- packing ---------------------------------------------------------------------------------------------------------


def test_packed_batch_by_hand() -> None:
    """Longest first, each into the first row with room; positions begin again; two filling rows are padding."""
    rows = [example(0, [1], [2]), example(1, [3, 4, 5], [6, 7]), example(2, [8], [9, 10]), example(3, [11, 12], [13])]
    batch = batches.sft_batch(rows, buckets=(8,), pad_token_id=PAD, multiple_of=4, packing=True)
    assert batch.tokens.tokens[:2].tolist() == [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 1, 2, PAD, PAD, PAD]]
    assert batch.tokens.positions[:2].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.tokens.attention.sum(1).tolist() == [8, 5, 0, 0]
    segments = batch.tokens.segments
    assert segments[:2].tolist() == [[2] * 5 + [3] * 3, [2] * 3 + [3] * 2 + [0] * 3]
    assert not segments[2:].any()
    assert batch.arrays["mask"][:2].tolist() == [[0, 0, 0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 0, 0, 0]]
    assert batch.denominators == {"num_tokens": 6.0}
    assert batch.tokens.positions.dtype == segments.dtype == np.int32


@settings(deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=20), st.integers(1, 5))
def test_packing_keeps_every_token_and_never_takes_more_columns(lengths: list[int], multiple_of: int) -> None:
    rows = [example(i, [i] * (length - 1), [100 + i]) for i, length in enumerate(lengths)]
    options = {"buckets": BUCKETS, "pad_token_id": PAD, "multiple_of": multiple_of}
    apart, packed = (batches.sft_batch(rows, **options, packing=packing) for packing in (False, True))  # pyright: ignore
    assert packed.tokens.tokens.size <= apart.tokens.tokens.size
    assert packed.tokens.tokens.shape[1] in BUCKETS
    assert len(packed.tokens) % multiple_of == 0
    assert packed.denominators == apart.denominators

    def contents(batch) -> list:
        tokens = batch.tokens
        found = []
        for row, segments in enumerate(tokens.segments):
            for segment in set(segments.tolist()) - {0}:
                where = segments == segment
                assert tokens.positions[row, where].tolist() == list(range(where.sum()))
                found.append((tokens.tokens[row, where].tolist(), batch.arrays["mask"][row, where].tolist()))
        return sorted(found)

    assert contents(packed) == contents(apart)


@pytest.mark.parametrize(
    ("lengths", "multiple_of", "shape"),
    [
        ([5, 5, 5], 1, (1, 16)),
        ([4, 4, 4, 4], 1, (4, 4)),
        ([3] * 5, 1, (1, 16)),
        ([3] * 5, 2, (6, 4)),
        ([9], 2, (2, 16)),
    ],
)
def test_packing_takes_the_bucket_of_the_fewest_columns(lengths: list[int], multiple_of: int, shape: tuple) -> None:
    """Filling rows count; the shortest of several that take as many."""
    rows = [example(i, [1] * (length - 1), [2]) for i, length in enumerate(lengths)]
    batch = batches.sft_batch(rows, buckets=BUCKETS, pad_token_id=PAD, multiple_of=multiple_of, packing=True)
    assert batch.tokens.tokens.shape == shape


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_prompt_batch_and_join_by_hand() -> None:
    prompts = batches.prompt_batch([prompt(0, [1, 2]), prompt(1, [3, 4, 5])], buckets=BUCKETS, pad_token_id=PAD)
    assert prompts.tokens.tolist() == [[PAD, PAD, 1, 2], [PAD, 3, 4, 5]]
    assert prompts.attention.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert prompts.positions.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]
    completions = Completions(
        tokens=np.array([[6, 0, PAD], [7, 8, 9]], np.int32),
        mask=np.array([[True, True, False], [True, True, True]]),
        logprobs=np.zeros((2, 3), np.float32),
        margins=np.zeros((2, 3), np.float32),
        finish=np.array([1, 0]),
    )
    joined = batches.join(prompts, completions)
    assert joined.tokens.tolist() == [[PAD, PAD, 1, 2, 6, 0, PAD], [PAD, 3, 4, 5, 7, 8, 9]]
    assert joined.attention.sum(1).tolist() == [4, 6]
    assert joined.positions.tolist() == [[0, 0, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert joined.first == 4
    for name in ("tokens", "positions"):
        assert getattr(joined, name).dtype == getattr(prompts, name).dtype == np.int32
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        batches.join(prompts, Completions(**{**vars(completions), "tokens": completions.tokens[:1]}))
