"""Rows of JSONL as demonstrations, preference pairs and prompts: one shape whatever the file's format.

Formats, by the keys of a row:
    messages                   [{"role": "user", "content": "..."}, ...]; the last turn is the assistant's
    prompt + response          (or `completion`)
    prompt + chosen + rejected
    question + answer          GSM8K
A prompt may be text (one user turn) or a list of messages; a response text or a list that ends in one assistant turn
(and may repeat the prompt before it). Whatever else a row holds is kept in `data` for reward functions.

Every fault is a UserError that begins with FILE:LINE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.data import tasks
from diptych.data.tokenizer import Message
from diptych.errors import UserError
from diptych.recipe.schema import Source

Kind = Literal["demonstrations", "preferences", "prompts"]
Turns = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")

_COMPLETIONS = ("response", "completion")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A JSON object. row: its index in the file, from 0. where: FILE:LINE, lines counted from 1."""

    row: int
    where: str
    data: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Demonstration(Row):
    """A conversation that ends with the assistant."""

    turns: Turns


@dataclass(frozen=True, kw_only=True)
class Pair(Row):
    """Two answers to one prompt, the better one in `chosen`."""

    turns: Turns
    chosen: Message
    rejected: Message


@dataclass(frozen=True, kw_only=True)
class Prompt(Row):
    """A conversation that the assistant is to continue."""

    turns: Turns


def demonstrations(source: Source, *, seed: int) -> tuple[list[Demonstration], list[Demonstration] | None]:
    """The rows of `path` and of `eval_path` (None where there is none)."""
    rows, held_out = _read(source, "demonstrations", seed)
    return [demonstration(row) for row in rows], None if held_out is None else [demonstration(row) for row in held_out]


def preferences(source: Source, *, seed: int) -> tuple[list[Pair], list[Pair] | None]:
    """The rows of `path` and of `eval_path` (None where there is none)."""
    rows, held_out = _read(source, "preferences", seed)
    return [pair(row) for row in rows], None if held_out is None else [pair(row) for row in held_out]


def prompts(source: Source, *, seed: int) -> tuple[list[Prompt], list[Prompt] | None]:
    """The rows of `path` and of `eval_path` (None where there is none)."""
    rows, held_out = _read(source, "prompts", seed)
    return [prompt(row) for row in rows], None if held_out is None else [prompt(row) for row in held_out]


def _read(source: Source, kind: Kind, seed: int) -> tuple[list[Row], list[Row] | None]:
    place = f"data.{kind}"
    if source.path is None:
        raise UserError(f"{place}.path is not set: name a JSONL file, or task:NAME ({', '.join(tasks.TASKS)})")
    if source.eval_path is not None and source.eval_path.startswith("task:"):
        raise UserError(
            f"{place}.eval_path: a task holds out its own prompts (eval_fraction); name a file or leave it out"
        )
    if source.path.startswith("task:"):
        if source.limit is None:
            raise UserError(f"{place}.limit is not set: say how many examples {source.path} shall generate")
        made = tasks.generate(source.path.removeprefix("task:"), kind, count=source.limit, seed=seed)
        rows = [Row(row=index, where=f"{source.path}:{index + 1}", data=data) for index, data in enumerate(made)]
    else:
        rows = read_rows(source.path, limit=source.limit)
    return rows, None if source.eval_path is None else read_rows(source.eval_path, limit=source.eval_limit)


def read_rows(path: str | Path, *, limit: int | None = None) -> list[Row]:
    """The first `limit` (None: all) objects of a JSONL file, one to a line. UserError with FILE:LINE on any fault."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'no such file'}")
    rows: list[Row] = []
    with path.open("rb") as file:  # bytes: only \n ends a line, whatever else Unicode calls a line break
        for index, line in enumerate(file):
            if limit is not None and index >= limit:
                break
            where = f"{path}:{index + 1}"
            try:
                data = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
            except ValueError as error:
                what = "empty line" if not line.strip() else f"not JSON: {error}"
                raise UserError(f"{where}: {what}; every line is one JSON object") from error
            if not isinstance(data, dict):
                raise UserError(f"{where}: a line must hold a JSON object, this one holds {_kind(data)}")
            rows.append(Row(row=index, where=where, data=data))
    if not rows:
        raise UserError(f"{path}: no rows: the file is empty" if limit != 0 else f"{path}: no rows: the limit is 0")
    return rows


def demonstration(row: Row) -> Demonstration:
    """Normalise a row with an answer to learn from."""
    data = row.data
    completions = [name for name in _COMPLETIONS if name in data]
    formats = [
        *(["messages"] if "messages" in data else []),
        *(completions if "prompt" in data else []),
        *(["answer"] if "question" in data and "answer" in data else []),
    ]
    if not formats:
        expected = "`messages`, `prompt` with `response` (or `completion`), or `question` with `answer`"
        raise _unknown(row, expected)
    if len(formats) > 1:
        raise UserError(f"{row.where}: two answers ({' and '.join(formats)}): keep the keys of one format")
    if formats == ["messages"]:
        turns = _turns(row, "messages")
        if turns[-1]["role"] != "assistant":
            raise UserError(
                f"{row.where}: the last of `messages` must be the assistant's, it is the {turns[-1]['role']}'s"
            )
        if len(turns) == 1:
            raise UserError(f"{row.where}: `messages` has no turn before the assistant's")
        for turn in turns:
            if turn["role"] == "assistant":
                _not_empty(row, "an assistant turn of `messages`", turn["content"])
    else:
        question = _prompt_turns(row, "question" if formats == ["answer"] else "prompt")
        turns = (*question, _answer(row, formats[0], question))
    return Demonstration(row=row.row, where=row.where, data=data, turns=turns)


def pair(row: Row) -> Pair:
    """Normalise a preference pair."""
    data = row.data
    if "chosen" not in data or "rejected" not in data:
        raise _unknown(row, "`prompt` with `chosen` and `rejected`")
    if "prompt" in data:
        turns = _prompt_turns(row, "prompt")
    else:  # conversations that hold their prompt: what the two share
        if isinstance(data["chosen"], str) or isinstance(data["rejected"], str):
            raise _unknown(row, "`prompt` with `chosen` and `rejected`")
        turns = _turns(row, "chosen")[:-1]
        if not turns or turns != _turns(row, "rejected")[:-1]:
            raise UserError(f"{row.where}: without `prompt`, `chosen` and `rejected` must share all turns but the last")
    chosen, rejected = _answer(row, "chosen", turns), _answer(row, "rejected", turns)
    if chosen["content"] == rejected["content"]:
        raise UserError(f"{row.where}: `chosen` and `rejected` are the same: a pair must differ; take the row out")
    return Pair(row=row.row, where=row.where, data=data, turns=turns, chosen=chosen, rejected=rejected)


def prompt(row: Row) -> Prompt:
    """Normalise the prompt of a row of any format; a trailing assistant turn of `messages` is cut off."""
    name = next((name for name in ("messages", "prompt", "question") if name in row.data), None)
    if name is None:
        raise _unknown(row, "`messages`, `prompt` or `question`")
    if name == "messages":
        turns = _turns(row, name)
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns or turns[-1]["role"] == "assistant":
            raise UserError(f"{row.where}: `messages` leaves no prompt before the assistant's last turn")
        _not_empty(row, "the last turn of the prompt", turns[-1]["content"])
    else:
        turns = _prompt_turns(row, name)
    return Prompt(row=row.row, where=row.where, data=row.data, turns=turns)


def _prompt_turns(row: Row, name: str) -> Turns:
    if isinstance(row.data[name], list):
        turns = _turns(row, name)
        if turns[-1]["role"] == "assistant":
            raise UserError(f"{row.where}: `{name}` must not end with the assistant's turn")
    else:
        turns = ({"role": "user", "content": _string(row, f"`{name}`", row.data[name])},)
    _not_empty(row, f"`{name}`", turns[-1]["content"])
    return turns


def _answer(row: Row, name: str, question: Turns) -> Message:
    """The one assistant turn of a response, without the prompt that it may repeat."""
    value = row.data[name]
    if isinstance(value, list):
        turns = _turns(row, name)
        if turns[: len(question)] == question:
            turns = turns[len(question) :]
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise UserError(
                f"{row.where}: `{name}` must be the prompt's turns, if any, and one assistant turn after them"
            )
        answer = turns[0]
    else:
        answer = {"role": "assistant", "content": _string(row, f"`{name}`", value)}
    _not_empty(row, f"`{name}`", answer["content"])
    return answer


def _turns(row: Row, name: str) -> Turns:
    value = row.data[name]
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: `{name}` must be a list of messages, not {_kind(value)}")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise UserError(
                f"{row.where}: `{name}`[{index}] must be an object with `role` and `content`, not {_kind(turn)}"
            )
        if turn.get("role") not in ROLES:
            raise UserError(f"{row.where}: `{name}`[{index}].role is {turn.get('role')!r}: one of {', '.join(ROLES)}")
        _string(row, f"`{name}`[{index}].content", turn.get("content"))
    return tuple(value)


def _string(row: Row, what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {what} must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where}: {what} holds half a surrogate pair at character {error.start}") from error
    return value


def _not_empty(row: Row, what: str, value: str) -> None:
    if not value.strip():
        raise UserError(f"{row.where}: {what} is empty")


def _unknown(row: Row, expected: str) -> UserError:
    return UserError(f"{row.where}: unknown format: keys {_list(row.data)}; expected {expected}")


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "(none)"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
