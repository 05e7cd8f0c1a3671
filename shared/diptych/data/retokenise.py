"""A conversation as a model with another tokenizer reads it, and where its tokens lie in the policy's text.

The messages and the response are rendered with the reader's own chat template (or, without one, the recipe's text
templates) exactly as its preference pairs were (`ExampleMaker.segments`), then tokenised with its tokenizer. A response
that ended by itself has the reader's EOS; one that was cut stops where its words stop.

Where tokens lie is counted in characters of the response text, never of the rendering: `columns` maps every state of
the policy to the last token of the reader that is known there. A token is known when all its characters are, so that no
state sees what the policy has not written yet. What cannot be avoided: *where* the reader's tokens are cut may depend
on letters to come, as in any text that is tokenised afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from diptych.data.examples import ExampleMaker
from diptych.data.sources import Turns
from diptych.data.tokenizer import Tokenizer
from diptych.errors import UserError
from diptych.recipe.schema import DataRecipe

_MARK = "\ue000"  # of the private use area: stands for the response when the template is asked what it writes around it


@dataclass(frozen=True, kw_only=True)
class RetokenisedRow:
    """A prompt and a response as another model reads them.

    tokens: int32, prompt then response. num_prompt: tokens of the prompt. ends: for each response token, how many
    characters of the response text must be known to know it; 0 for what the template writes before the text, more than
    the whole text for what comes after it, the EOS among it. num_literal: names of special tokens that the response
    spelled out and that were read as words.
    """

    tokens: Int[np.ndarray, " time"]
    num_prompt: int
    ends: Int[np.ndarray, " response"]
    num_literal: int

    def columns(self, starts: Sequence[int]) -> Int[np.ndarray, " new"]:
        """The last column that is known before each of the policy's tokens, which start after `starts` characters."""
        known = np.searchsorted(self.ends, np.asarray(starts), side="right")
        return (self.num_prompt - 1 + known).astype(np.int32)

    def cut(self, limit: int) -> RetokenisedRow:
        """The first `limit` tokens."""
        return RetokenisedRow(
            tokens=self.tokens[:limit],
            num_prompt=self.num_prompt,
            ends=self.ends[: limit - self.num_prompt],
            num_literal=self.num_literal,
        )


class Retokeniser:
    """Reads conversations for one model. limit: the most tokens that it can be given, its positions and the largest of
    data.buckets considered."""

    def __init__(self, data: DataRecipe, tokenizer: Tokenizer, *, max_positions: int) -> None:
        self.maker = ExampleMaker(data, tokenizer, max_positions, foreign=True)
        self.tokenizer = tokenizer
        self.limit = min(max_positions, max(data.buckets))

    def prompt(self, turns: Turns, where: str) -> list[int]:
        """Ids of a prompt. UserError where the template refuses it."""
        return self.maker.prompt_ids(self.maker.prompt_text(turns, where), where)

    def read(self, turns: Turns, response: str, *, ended: bool, where: str) -> RetokenisedRow:
        """A prompt and a response in tokens.

        Raises UserError where the template changes the words of the response (beyond space at its ends), because then
        no token could be told where it lies.
        """
        prompt_text = self.maker.prompt_text(turns, where)
        prompt = self.maker.prompt_ids(prompt_text, where)
        before, words, after = self.parts(turns, prompt_text, response, where)
        if not ended:
            after = ""
        ids, ends, num_literal = self.encode(before, words, after, prompt[-1])
        if ended:
            stop = next((i for i, token in enumerate(ids) if self.ends_row(token, ends[i], before, words)), None)
            # As in training: up to the template's EOS, or with one of our own where it writes none.
            kept = len(ids) if stop is None else stop + 1
            ids, ends = ids[:kept], ends[:kept]
            if stop is None:
                ids, ends = [*ids, self.tokenizer.eos_token_id], [*ends, len(before + words + after) + 1]
        at_end = np.asarray(ends, np.int64)
        if (np.diff(at_end) < 0).any():
            raise UserError(
                f"{where}: the tokens of {self.tokenizer.where} do not follow each other in the text, so a critic that "
                "reads it cannot be aligned with the policy"
            )
        # From characters of the rendering to characters of the response, whose leading space the template may drop.
        dropped = response.find(words)
        in_text = np.where(at_end <= len(before), 0, at_end - len(before) + dropped)
        in_text = np.where(at_end > len(before) + len(words), len(response) + 1, in_text)
        return RetokenisedRow(
            tokens=np.asarray([*prompt, *ids], np.int32),
            num_prompt=len(prompt),
            ends=in_text,
            num_literal=num_literal,
        )

    def parts(self, turns: Turns, prompt: str, response: str, where: str) -> tuple[str, str, str]:
        """What the template writes before the response, the response as it writes it, and what it writes after."""
        rendered = self.render(turns, prompt, response, where)
        before, mark, after = self.render(turns, prompt, _MARK, where).partition(_MARK)
        words = rendered[len(before) : len(rendered) - len(after)]
        kept = {response, response.strip(), response.lstrip(), response.rstrip()}
        if not mark or rendered != before + words + after or words not in kept:
            raise UserError(
                f"{where}: the template of {self.tokenizer.where} changes the words of a response "
                f"({response[:40]!r}...), so the tokens of its model cannot be aligned with the policy's: use a reward "
                "model whose template keeps them, or data.chat: never"
            )
        return before, words, after

    def render(self, turns: Turns, prompt: str, response: str, where: str) -> str:
        """All that follows the text of the prompt."""
        maker = self.maker
        if not maker.chat:
            return maker.data.response_template.replace("{response}", response)
        answer = {"role": "assistant", "content": response}
        whole = maker.render((*turns, answer), where, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{where}: the chat template of {self.tokenizer.where} writes the prompt differently once an answer "
                "follows: use a reward model whose template leaves the prompt alone, or data.chat: never"
            )
        return whole[len(prompt) :]

    def encode(self, before: str, words: str, after: str, previous: int) -> tuple[list[int], list[int], int]:
        """Ids of the three parts as one text, the characters known at each, and how many names of special tokens the
        words spell: these are not taken for special tokens, for a response that could write them would steer the
        reader."""
        ids, ends = self.tokenizer.encode_spans(before + words + after, previous)
        first, last = len(before), len(before) + len(words)
        spans = zip(ids, ends, strict=True)
        literal = sum(first < end <= last and self.tokenizer.is_special(token) for token, end in spans)
        if not literal:
            return ids, ends, 0
        # Rare: the words by themselves, between what the template writes.
        ids, ends = self.tokenizer.encode_spans(before, previous)
        middle, middle_ends = self.tokenizer.encode_words(words)
        tail, tail_ends = self.tokenizer.encode_spans(after, (previous, *ids, *middle)[-1])
        shifted = [first + end for end in middle_ends] + [last + max(end, 1) for end in tail_ends]
        return [*ids, *middle, *tail], [*ends, *shifted], literal

    def ends_row(self, token: int, end: int, before: str, words: str) -> bool:
        """Whether this token is the EOS that the template writes after the words."""
        return token in self.tokenizer.eos_token_ids and end > len(before) + len(words)
