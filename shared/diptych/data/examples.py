"""Text becomes tokens and a mask that says which of them are trained.

A row is cut into segments (prompt, response, next prompt, ...) and every segment is tokenised by itself, so that the
tokens of a demonstration are those that a prompt and a sampled response have in rollouts. The mask is made here, from
the segments: it holds the response and the EOS that ends it, whatever their ids (law 3).

With a chat template a prompt is `render(turns before the assistant's, add_generation_prompt=True)`; a response is what
the template writes after that, up to and including its EOS. Without one, the recipe's two text templates do the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from diptych.data import sources
from diptych.data.sources import Demonstration, Pair, Prompt, Turns
from diptych.data.splits import Split, split
from diptych.data.tokenizer import Message, Tokenizer
from diptych.errors import UserError
from diptych.recipe.schema import DataRecipe

Row = TypeVar("Row", Demonstration, Pair, Prompt)
Example = TypeVar("Example", "TokenExample", "PairExample", "PromptExample")
Segment = tuple[list[int], bool]  # ids, trained


@dataclass(frozen=True, kw_only=True)
class TokenExample:
    """One row of tokens. trained: True on response tokens, the EOS included."""

    row: int
    tokens: Int[np.ndarray, " time"]
    trained: Bool[np.ndarray, " time"]


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """Two rows with the same prompt tokens, the better answer in `chosen`."""

    row: int
    chosen: TokenExample
    rejected: TokenExample


@dataclass(frozen=True, kw_only=True)
class PromptExample:
    """A prompt. text: the words of its only user turn, or the whole rendering where there are more turns. data: the
    row's JSON object. turns: the conversation, for a model with another tokenizer."""

    row: int
    tokens: Int[np.ndarray, " time"]
    text: str
    data: Mapping[str, Any] = field(repr=False)
    turns: Turns = ()


def load_demonstrations(
    data: DataRecipe, tokenizer: Tokenizer, *, seed: int, max_positions: int
) -> Split[TokenExample]:
    """Demonstrations as tokens. Raises UserError (FILE:LINE) on any row that cannot be used as the recipe says."""
    place = "data.demonstrations"
    rows = split(*sources.demonstrations(data.demonstrations, seed=seed), data.demonstrations, seed=seed, place=place)
    maker = ExampleMaker(data, tokenizer, max_positions)
    return maker.examples(rows, maker.demonstration, place)


def load_preferences(
    data: DataRecipe, tokenizer: Tokenizer, *, seed: int, max_positions: int, foreign: bool = False
) -> Split[PairExample]:
    """Preference pairs as tokens. A pair that truncation made identical is left out, and counted. foreign: the
    tokenizer is not the policy's (`uses_chat`)."""
    place = "data.preferences"
    rows = split(*sources.preferences(data.preferences, seed=seed), data.preferences, seed=seed, place=place)
    maker = ExampleMaker(data, tokenizer, max_positions, foreign=foreign)
    return maker.examples(rows, maker.pair, place)


def load_prompts(data: DataRecipe, tokenizer: Tokenizer, *, seed: int, max_positions: int) -> Split[PromptExample]:
    """Prompts as tokens."""
    place = "data.prompts"
    rows = split(*sources.prompts(data.prompts, seed=seed), data.prompts, seed=seed, place=place)
    maker = ExampleMaker(data, tokenizer, max_positions)
    return maker.examples(rows, maker.prompt, place)


def tokenizer_texts(data: DataRecipe, *, seed: int) -> list[str]:
    """The texts that a new model's tokenizer is trained on: every turn of the demonstrations' training side."""
    place = "data.demonstrations"
    rows = split(*sources.demonstrations(data.demonstrations, seed=seed), data.demonstrations, seed=seed, place=place)
    return [turn["content"] for row in rows.train for turn in row.turns]


class _Dropped(Exception):
    """A row that `too_long: drop` leaves out, or a pair that truncation made identical."""


class ExampleMaker:
    """Makes examples of one data recipe and tokenizer, and counts what it did to them."""

    def __init__(self, data: DataRecipe, tokenizer: Tokenizer, max_positions: int, *, foreign: bool = False) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.chat = uses_chat(data, tokenizer, foreign=foreign)
        self.counts: Counter[str] = Counter()

    def examples(self, rows: Split[Row], make: Callable[[Row], Example], place: str) -> Split[Example]:
        sides: list[list[Example]] = []
        for name, side in (("training", rows.train), ("held-out", rows.held_out)):
            made = []
            for row in side:
                try:
                    made.append(make(row))
                except _Dropped as reason:
                    self.counts[str(reason)] += 1
            if side and not made:
                raise UserError(
                    f"{place}: not one of {len(side)} {name} rows fits data.max_prompt_tokens and "
                    "data.max_response_tokens: raise them"
                )
            sides.append(made)
        train, held_out = sides
        names = (
            "dropped",
            "truncated",
            "identical_after_truncation",
            "eos_added",
            "longest_prompt",
            "longest_response",
            "longest",
        )
        report = {**rows.report, "train": len(train), "held_out": len(held_out)}
        return Split(train=train, held_out=held_out, report=report | {name: self.counts[name] for name in names})

    def demonstration(self, row: Demonstration) -> TokenExample:
        segments = self.segments(row.turns, row.where)
        first = next(index for index, (_, trained) in enumerate(segments) if trained)
        head = [token for ids, _ in segments[:first] for token in ids]
        prompt, cut_prompt = self.fit_prompt(head, row.where)
        tail = [(token, trained) for ids, trained in segments[first:] for token in ids]
        kept, cut_response = self.fit_response(tail, row.where)
        self.counts["truncated"] += cut_prompt or cut_response
        return self.token_example(row, prompt, kept)

    def pair(self, row: Pair) -> PairExample:
        cut = False
        made = []
        for answer in (row.chosen, row.rejected):
            segments = self.segments((*row.turns, answer), row.where, last_only=True)
            prompt, cut_prompt = self.fit_prompt([token for ids, _ in segments[:-1] for token in ids], row.where)
            kept, cut_response = self.fit_response([(token, True) for token in segments[-1][0]], row.where)
            cut = cut or cut_prompt or cut_response
            made.append((prompt, kept))
        if made[0] == made[1]:
            if not cut:
                raise UserError(f"{row.where}: `chosen` and `rejected` become the same tokens: take the row out")
            raise _Dropped("identical_after_truncation")
        self.counts["truncated"] += cut
        chosen, rejected = (self.token_example(row, *parts) for parts in made)
        return PairExample(row=row.row, chosen=chosen, rejected=rejected)

    def prompt(self, row: Prompt) -> PromptExample:
        text = self.prompt_text(row.turns, row.where)
        tokens, cut = self.fit_prompt(self.prompt_ids(text, row.where), row.where)
        if len(tokens) >= self.max_positions:
            raise self.beyond_positions(row, len(tokens))
        self.counts["truncated"] += cut
        self.longest(prompt=len(tokens))
        words = row.turns[0]["content"] if len(row.turns) == 1 else text
        made = np.asarray(tokens, np.int32)
        return PromptExample(row=row.row, tokens=made, text=words, data=row.data, turns=row.turns)

    def segments(self, turns: Turns, where: str, *, last_only: bool = False) -> list[Segment]:
        """The tokens of a conversation, cut where training begins and ends; the last segment is trained.

        last_only: earlier assistant turns belong to the prompt (preference pairs).
        """
        if not self.chat:
            prompt = self.prompt_ids(self.prompt_text(turns[:-1], where), where)
            return [(prompt, False), (self.plain_response_ids(turns[-1], prompt[-1], where), True)]
        segments: list[Segment] = []
        ids: list[int] = []
        done = ""  # the rendering so far
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or (last_only and index < len(turns) - 1):
                continue
            before = self.prompt_text(turns[:index], where)
            after = self.render(turns[: index + 1], where, add_generation_prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise UserError(
                    f"{where}: the chat template writes the turns before turn {index + 1} differently once later ones "
                    "follow, so what is trained would not be what is sampled: use rows with one answer, or a template "
                    "that leaves earlier turns alone"
                )
            context = before[len(done) :]
            ids = self.tokenizer.encode_after(context, ids[-1]) if segments else self.prompt_ids(context, where)
            segments.append((ids, False))
            previous = next(tokens[-1] for tokens, _ in reversed(segments) if tokens)
            ids, end = self.chat_response_ids(turn, after[len(before) :], previous, where)
            if end is None and index == len(turns) - 1:
                ids = [*ids, self.tokenizer.eos_token_id]  # a template that leaves the EOS to others
                self.counts["eos_added"] += 1
            segments.append((ids, True))
            done = after if end is None else after[: len(before) + end]
        return segments

    def prompt_text(self, turns: Turns, where: str) -> str:
        """The text of a prompt, up to where the assistant begins."""
        if self.chat:
            return self.render(turns, where, add_generation_prompt=True)
        if len(turns) != 1 or turns[0]["role"] != "user":
            raise UserError(
                f"{where}: a conversation of several turns needs a chat template: use a tokenizer that has one (and "
                "data.chat: auto)"
            )
        return self.data.prompt_template.replace("{prompt}", turns[0]["content"])

    def prompt_ids(self, text: str, where: str) -> list[int]:
        """Ids of a prompt. A chat template writes its own BOS; without one the tokenizer adds what goes before a text
        (never what it would put after: the response follows)."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens: a response needs something to follow")
        if self.chat:
            return ids
        before, _ = self.tokenizer.affixes
        return ids if before and tuple(ids[: len(before)]) == before else [*before, *ids]

    def chat_response_ids(self, turn: Message, text: str, previous: int, where: str) -> tuple[list[int], int | None]:
        self.check_content(turn["content"], previous, where)
        ids, end = self.tokenizer.encode_response(text, previous)
        if not ids or ids[0] in self.tokenizer.eos_token_ids:
            raise UserError(
                f"{where}: the chat template writes no token of the assistant's answer: nothing would be trained"
            )
        return ids, end

    def plain_response_ids(self, turn: Message, previous: int, where: str) -> list[int]:
        text = self.data.response_template.replace("{response}", turn["content"])
        self.check_content(text, previous, where)
        ids, end = self.tokenizer.encode_response(text, previous)
        if not ids or ids[0] in self.tokenizer.eos_token_ids:
            raise UserError(f"{where}: the response has no token but the end of the sequence: nothing would be trained")
        return ids if end is not None else [*ids, self.tokenizer.eos_token_id]

    def check_content(self, text: str, previous: int, where: str) -> None:
        """An EOS inside a response could never be sampled there. At its end it is the one that would be added."""
        ids, end = self.tokenizer.encode_response(text, previous)
        if end is not None and text[end:].strip():
            raise UserError(
                f"{where}: the response holds the end-of-sequence token {self.tokenizer.token(ids[-1])!r} before its "
                "end, where no sampled response can have it: take it out"
            )

    def render(self, turns: Turns, where: str, *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.render(turns, add_generation_prompt=add_generation_prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def fit_prompt(self, ids: list[int], where: str) -> tuple[list[int], bool]:
        """Apply `too_long` to a prompt. A cut prompt loses its start, but keeps the tokenizer's BOS."""
        limit = self.data.max_prompt_tokens
        if len(ids) <= limit:
            return ids, False
        self.refuse(f"{where}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is {limit}")
        bos = self.tokenizer.bos_token_id
        head = ids[:1] if ids[0] == bos and limit > 1 else []
        return [*head, *ids[len(ids) - (limit - len(head)) :]], True

    def fit_response(self, tail: list[tuple[int, bool]], where: str) -> tuple[list[tuple[int, bool]], bool]:
        """Apply `too_long` to all that follows the first prompt. A cut response loses its end and its EOS."""
        limit = self.data.max_response_tokens
        if len(tail) <= limit:
            return tail, False
        self.refuse(f"{where}: the response has {len(tail)} tokens, data.max_response_tokens is {limit}")
        return tail[:limit], True

    def refuse(self, message: str) -> None:
        """Too long: stop or drop, as the recipe says. Returns where it says truncate."""
        if self.data.too_long == "error":
            raise UserError(f"{message}: raise it, or set data.too_long to drop or truncate")
        if self.data.too_long == "drop":
            raise _Dropped("dropped")

    def token_example(self, row: Demonstration | Pair, prompt: list[int], tail: list[tuple[int, bool]]) -> TokenExample:
        tokens = np.asarray([*prompt, *(token for token, _ in tail)], np.int32)
        if len(tokens) > self.max_positions:
            raise self.beyond_positions(row, len(tokens))
        if len(tokens) > max(self.data.buckets):
            raise UserError(
                f"{row.where}: {len(tokens)} tokens are more than the largest of data.buckets: add a larger one"
            )
        trained = np.asarray([*(False for _ in prompt), *(flag for _, flag in tail)], bool)
        if not trained.any():
            raise UserError(f"{row.where}: no token of this row would be trained")
        self.longest(prompt=len(prompt), response=len(tail), both=len(tokens))
        return TokenExample(row=row.row, tokens=tokens, trained=trained)

    def beyond_positions(self, row: Demonstration | Pair | Prompt, length: int) -> UserError:
        return UserError(
            f"{row.where}: {length} tokens do not fit the model's {self.max_positions} positions: lower "
            "data.max_prompt_tokens or data.max_response_tokens (data.too_long says what happens to longer rows)"
        )

    def longest(self, *, prompt: int, response: int = 0, both: int | None = None) -> None:
        for name, length in (("longest_prompt", prompt), ("longest_response", response), ("longest", both or prompt)):
            self.counts[name] = max(self.counts[name], length)


def uses_chat(data: DataRecipe, tokenizer: Tokenizer, *, foreign: bool = False) -> bool:
    """Whether the chat template makes the prompts. UserError for a setting that would be ignored. foreign: for a reward
    model with a tokenizer of its own; the text templates may then be set for the policy alone."""
    if data.chat == "always" and tokenizer.chat_template is None:
        raise UserError(f"data.chat is always, but the tokenizer of {tokenizer.where} has no chat template")
    chat = data.chat != "never" and tokenizer.chat_template is not None
    for name, placeholder in (("prompt_template", "{prompt}"), ("response_template", "{response}")):
        template = getattr(data, name)
        if placeholder not in template:
            raise UserError(f"data.{name} {template!r} must hold {placeholder}")
        if chat and not foreign and template != placeholder:
            raise UserError(
                f"data.{name} is set, but the chat template of {tokenizer.where} makes the prompts: "
                "leave it out, or set data.chat to never"
            )
    return chat


def describe(example: TokenExample, tokenizer: Tokenizer) -> str:
    """The tokens of a row, one to a line: column, `*` where trained, id, token. For eyes and for tests."""
    lines: Sequence[str] = [
        f"{column:4d} {'*' if trained else ' '} {token:6d} {tokenizer.token(token)!r}"
        for column, (token, trained) in enumerate(zip(example.tokens, example.trained, strict=True))
    ]
    return "\n".join(lines)
