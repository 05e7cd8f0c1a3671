"""Which rows are held out: a property of a prompt's words and the seed, not of the row's place in a file.

Every prompt has a keyed hash in [0, 1); it is held out where that is below `eval_fraction`. So a prompt is never on
both sides, the demonstrations, preferences and prompts of one seed agree about it, and adding rows moves none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from diptych import random
from diptych.data.sources import Demonstration, Pair, Prompt, Turns
from diptych.errors import UserError
from diptych.recipe.schema import Source

Example = TypeVar("Example")
SourceRow = TypeVar("SourceRow", Demonstration, Pair, Prompt)


@dataclass(frozen=True, kw_only=True)
class Split(Generic[Example]):
    """Examples to train on and to evaluate on, and counts of all that was done on the way."""

    train: list[Example]
    held_out: list[Example]
    report: dict[str, int] = field(default_factory=dict)


def opening(turns: Turns) -> Turns:
    """The turns up to the first answer to a user: what makes two conversations 'the same prompt'."""
    asked = False
    for index, turn in enumerate(turns):
        if asked and turn["role"] == "assistant":
            return turns[:index]
        asked = asked or turn["role"] == "user"
    return turns


def hash_fraction(turns: Turns, *, seed: int) -> float:
    """The keyed hash of a conversation's opening, in [0, 1)."""
    words = json.dumps([[turn["role"], turn["content"]] for turn in opening(turns)], ensure_ascii=False)
    digest = hashlib.blake2b(words.encode(), digest_size=8, key=random.key(seed, "held_out").tobytes()).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def split(
    rows: Sequence[SourceRow], held_out: Sequence[SourceRow] | None, source: Source, *, seed: int, place: str
) -> Split[SourceRow]:
    """Divide the rows of a source. held_out: the rows of its `eval_path`, or None. place: `data.NAME`, for errors.

    The report counts rows read, distinct prompts of each side, prompts on both sides (only an `eval_path` can do that)
    and held-out rows past `eval_limit`. UserError where a side that was asked for has no rows.
    """
    num_rows = len(rows) + len(held_out or ())
    skipped = 0
    if held_out is None:
        if not 0 <= source.eval_fraction < 1:
            raise UserError(f"{place}.eval_fraction is {source.eval_fraction}: it must be at least 0 and below 1")
        sides = [hash_fraction(row.turns, seed=seed) < source.eval_fraction for row in rows]
        train = [row for row, out in zip(rows, sides, strict=True) if not out]
        kept = [row for row, out in zip(rows, sides, strict=True) if out]
        skipped = max(0, len(kept) - source.eval_limit) if source.eval_limit is not None else 0
        kept = kept[: source.eval_limit]
        if source.eval_fraction > 0 and not kept:
            raise UserError(
                f"{place}: none of {len(rows)} rows was held out: raise eval_fraction ({source.eval_fraction}), "
                "name an eval_path, or set eval_fraction to 0 for no evaluation"
            )
    else:
        train, kept = list(rows), list(held_out)
    if not train:
        raise UserError(f"{place}: all {len(rows)} rows were held out: lower eval_fraction ({source.eval_fraction})")
    train_prompts, kept_prompts = ({hash_fraction(row.turns, seed=seed) for row in side} for side in (train, kept))
    return Split(
        train=train,
        held_out=kept,
        report={
            "rows": num_rows,
            "train_prompts": len(train_prompts),
            "held_out_prompts": len(kept_prompts),
            "prompts_on_both_sides": len(train_prompts & kept_prompts),
            "past_eval_limit": skipped,
        },
    )
