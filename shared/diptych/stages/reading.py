"""How reward model and critic read a rollout: the policy's own tokens, or its text in their own.

Both give a `Reading`, and all that follows is one path: values and the value loss are gathered at `columns`, which
count up where the tokens are the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from diptych.data.batches import right_padded
from diptych.data.examples import PromptExample
from diptych.data.retokenise import Retokeniser
from diptych.data.splits import Split
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Metrics, TokenBatch
from diptych.errors import UserError
from diptych.recipe.schema import Recipe
from diptych.stages.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A rollout in the tokens of reward model and critic.

    columns: int32 [rows, new], the column of `tokens` that stands for the state before each of the policy's response
    tokens; after the response, for the state that it ends in. ends: [rows], the column of the last response token,
    where the score is read. metrics: what was done to the text, to be logged.
    """

    tokens: TokenBatch
    columns: Int[np.ndarray, "rows new"]
    ends: Int[np.ndarray, " rows"]
    metrics: Metrics = field(default_factory=dict)

    def values(self, scores: Float[np.ndarray, "rows time"]) -> Float[np.ndarray, "rows new"]:
        """The critic's scores at the policy's states."""
        return np.take_along_axis(scores, self.columns, axis=1)

    def end_scores(self, scores: Float[np.ndarray, "rows time"]) -> Float[np.ndarray, " rows"]:
        """The score at each row's last response token."""
        return scores[np.arange(len(self.ends)), self.ends]


Reader = Callable[[Rollout, Sequence[PromptExample]], Reading]


def own_reading(rollout: Rollout, prompts: Sequence[PromptExample]) -> Reading:
    """The policy's tokens as they are: the state before response token t is the column before it."""
    rows, new = rollout.completions.tokens.shape
    columns = np.arange(rollout.tokens.first - 1, rollout.tokens.first - 1 + new, dtype=np.int32)
    return Reading(
        tokens=rollout.tokens,
        columns=np.broadcast_to(columns, (rows, new)),
        ends=rollout.tokens.first + rollout.completions.mask.sum(axis=1) - 1,
    )


class TextReading:
    """Reads the text of rollouts with the reward model's tokenizer and template (`diptych.data.retokenise`).

    Metrics: `reading/tokens_mean`, `reading/tokens_max` (tokens of a row), `reading/truncated` (rows whose end was cut
    off, rl.reward.too_long), `reading/literal_specials` (names of special tokens that responses spelled out).
    """

    def __init__(self, recipe: Recipe, policy: Tokenizer, reader: Tokenizer, *, max_positions: int) -> None:
        self.policy = policy
        self.retokeniser = Retokeniser(recipe.data, reader, max_positions=max_positions)
        self.pad_token_id = reader.pad_token_id
        self.buckets = recipe.data.buckets
        self.too_long = recipe.rl.reward.too_long

    def __call__(self, rollout: Rollout, prompts: Sequence[PromptExample]) -> Reading:
        limit = self.retokeniser.limit
        rows, columns, ends = [], [], []
        truncated = literal = 0
        for index, prompt in enumerate(prompts):
            mask = rollout.completions.mask[index]
            tokens = rollout.completions.tokens[index][mask]
            where = f"row {prompt.row + 1} of data.prompts"
            row = self.retokeniser.read(
                prompt.turns, rollout.texts[index], ended=bool(rollout.ended[index]), where=where
            )
            literal += row.num_literal
            if len(row.tokens) > limit:
                if self.too_long == "error":
                    raise UserError(
                        f"{where}: a sampled response makes {len(row.tokens)} tokens with its prompt as the reward "
                        f"model reads it, and {self.limit_words}: lower rollout.max_new_tokens, or set "
                        "rl.reward.too_long to truncate"
                    )
                row = row.cut(limit)
                truncated += 1
            end = len(row.tokens) - 1
            starts = [0, *self.policy.known(tokens)[:-1]]
            after = np.full(len(mask) - len(starts), end, np.int32)
            rows.append(row.tokens)
            columns.append(np.concatenate([row.columns(starts), after]))
            ends.append(end)
        return Reading(
            tokens=right_padded(rows, self.buckets, self.pad_token_id),
            columns=np.stack(columns),
            ends=np.asarray(ends),
            metrics={
                "reading/tokens_mean": float(np.mean([len(row) for row in rows])),
                "reading/tokens_max": float(max(len(row) for row in rows)),
                "reading/truncated": float(truncated),
                "reading/literal_specials": float(literal),
            },
        )

    @property
    def limit_words(self) -> str:
        maker = self.retokeniser.maker
        return (
            f"it takes {self.retokeniser.limit} (its {maker.max_positions} positions, the largest of data.buckets "
            f"{max(self.buckets)})"
        )

    def fit(self, split: Split[PromptExample], too_long: str) -> Split[PromptExample]:
        """The prompts that leave the reward model room for a response, counted. Raises UserError for one that does not,
        unless data.too_long is drop: it is the whole prompt that the reward model reads, however much of it
        the policy was given."""
        longest = dropped = 0
        sides: list[list[PromptExample]] = []
        for side in (split.train, split.held_out):
            kept = []
            for prompt in side:
                where = f"row {prompt.row + 1} of data.prompts"
                length = len(self.retokeniser.prompt(prompt.turns, where))
                if length < self.retokeniser.limit:
                    kept.append(prompt)
                    longest = max(longest, length)
                elif too_long == "drop":
                    dropped += 1
                else:
                    raise UserError(
                        f"{where}: the prompt has {length} tokens as the reward model reads it, and "
                        f"{self.limit_words}: set data.too_long to drop, or add a larger bucket"
                    )
            sides.append(kept)
        counts = {"longest_prompt_of_reward_model": longest, "dropped_by_reward_model": dropped}
        return Split(train=sides[0], held_out=sides[1], report=split.report | counts)
