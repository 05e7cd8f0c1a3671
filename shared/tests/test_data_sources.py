"""Formats of JSONL rows, and a clear FILE:LINE for everything that is wrong with one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diptych.data import sources
from diptych.errors import UserError
from diptych.recipe.schema import Source

USER = {"role": "user", "content": "Q"}
BOT = {"role": "assistant", "content": "A"}
BAD = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "S"}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


READ = {"demonstrations": sources.demonstrations, "preferences": sources.preferences, "prompts": sources.prompts}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [SYSTEM, USER, BOT]}, (SYSTEM, USER, BOT)),
        ({"messages": [USER, BOT, USER, BAD], "prompt": "ignored without an answer"}, (USER, BOT, USER, BAD)),
        ({"prompt": "Q", "response": "A"}, (USER, BOT)),
        ({"prompt": "Q", "completion": "A", "id": 7}, (USER, BOT)),
        ({"prompt": [SYSTEM, USER], "completion": [BOT]}, (SYSTEM, USER, BOT)),
        ({"question": "Q", "answer": "A"}, (USER, BOT)),
    ],
)
def test_demonstration_formats(tmp_path: Path, row: dict, turns: tuple) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "first", "response": "r"}, row)
    found, held_out = sources.demonstrations(Source(path=str(path)), seed=0)
    assert held_out is None
    assert (found[1].turns, found[1].row, found[1].where, found[1].data) == (turns, 1, f"{path}:2", row)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, (USER,)),
        ({"prompt": [SYSTEM, USER], "chosen": [BOT], "rejected": [BAD]}, (SYSTEM, USER)),
        ({"prompt": "Q", "chosen": [USER, BOT], "rejected": [USER, BAD]}, (USER,)),
        ({"chosen": [USER, BAD, USER, BOT], "rejected": [USER, BAD, USER, BAD]}, (USER, BAD, USER)),
    ],
)
def test_preference_formats(tmp_path: Path, row: dict, turns: tuple) -> None:
    [pair], _ = sources.preferences(Source(path=str(written(tmp_path / "rows.jsonl", row))), seed=0)
    assert (pair.turns, pair.chosen, pair.rejected) == (turns, BOT, BAD)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [SYSTEM, USER, BOT]}, (SYSTEM, USER)),
        ({"messages": [USER, BOT, USER]}, (USER, BOT, USER)),
        ({"prompt": "Q"}, (USER,)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, (USER,)),
        ({"question": "Q", "answer": "A"}, (USER,)),
    ],
)
def test_prompt_formats(tmp_path: Path, row: dict, turns: tuple) -> None:
    [prompt], _ = sources.prompts(Source(path=str(written(tmp_path / "rows.jsonl", row))), seed=0)
    assert (prompt.turns, prompt.data) == (turns, row)


GOOD = {
    "demonstrations": {"prompt": "Q", "response": "A"},
    "preferences": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "prompts": {"prompt": "Q"},
}
FAULTS = [
    ("demonstrations", '{"prompt": "a", ', "not JSON: "),
    ("demonstrations", "", "empty line"),
    ("demonstrations", "[1]", "must hold a JSON object, this one holds a list"),
    ("demonstrations", {"text": "a"}, "unknown format: keys `text`; expected `messages`"),
    ("demonstrations", {}, "unknown format: keys (none)"),
    ("demonstrations", {"prompt": "a"}, "unknown format"),
    ("demonstrations", {"prompt": "a", "response": "b", "completion": "c"}, "two answers (response and completion)"),
    ("demonstrations", {"prompt": "a", "response": None}, "`response` must be text, not null"),
    ("demonstrations", {"prompt": "a", "response": 4}, "`response` must be text, not a number"),
    ("demonstrations", {"prompt": "a", "response": " \n"}, "`response` is empty"),
    ("demonstrations", {"prompt": "", "response": "b"}, "`prompt` is empty"),
    ("demonstrations", {"prompt": 3, "response": "b"}, "`prompt` must be text, not a number"),
    ("demonstrations", {"question": "", "answer": "b"}, "`question` is empty"),
    ("demonstrations", '{"prompt": "a\\ud800", "response": "b"}', "half a surrogate pair at character 1"),
    ("demonstrations", {"messages": []}, "`messages` must be a list of messages, not an empty list"),
    ("demonstrations", {"messages": "hi"}, "`messages` must be a list of messages, not text"),
    ("demonstrations", {"messages": [USER]}, "the last of `messages` must be the assistant's, it is the user's"),
    ("demonstrations", {"messages": [BOT]}, "no turn before the assistant's"),
    (
        "demonstrations",
        {"messages": [USER, "A"]},
        "`messages`[1] must be an object with `role` and `content`, not text",
    ),
    ("demonstrations", {"messages": [{"role": "human", "content": "Q"}, BOT]}, "`messages`[0].role is 'human': one of"),
    ("demonstrations", {"messages": [USER, {**BOT, "content": None}]}, "`messages`[1].content must be text, not null"),
    ("demonstrations", {"messages": [USER, {**BOT, "content": ""}]}, "an assistant turn of `messages` is empty"),
    ("demonstrations", {"prompt": [USER, BOT], "response": "A"}, "`prompt` must not end with the assistant's turn"),
    ("demonstrations", {"prompt": "Q", "response": [BOT, BOT]}, "one assistant turn after them"),
    ("preferences", {"prompt": "Q", "response": "A"}, "expected `prompt` with `chosen` and `rejected`"),
    ("preferences", {"chosen": "A", "rejected": "B"}, "unknown format"),
    ("preferences", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "`chosen` and `rejected` are the same"),
    ("preferences", {"prompt": "Q", "chosen": "A", "rejected": ""}, "`rejected` is empty"),
    ("preferences", {"chosen": [USER, BOT], "rejected": [SYSTEM, BAD]}, "must share all turns but the last"),
    ("prompts", {"text": "a"}, "expected `messages`, `prompt` or `question`"),
    ("prompts", {"messages": [BOT]}, "leaves no prompt"),
    ("prompts", {"messages": [USER, BOT, BOT]}, "leaves no prompt"),
    ("prompts", {"prompt": "  "}, "`prompt` is empty"),
]


@pytest.mark.parametrize(("kind", "line", "message"), FAULTS, ids=[f"{kind}-{line}" for kind, line, _ in FAULTS])
def test_faults_name_file_and_line(tmp_path: Path, kind: str, line: object, message: str) -> None:
    path = written(tmp_path / "rows.jsonl", GOOD[kind], line, GOOD[kind])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        READ[kind](Source(path=str(path)), seed=0)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)
    READ[kind](Source(path=str(path), limit=1), seed=0)  # canary: the rows before the fault are good


@pytest.mark.parametrize("kind", READ)
def test_missing_and_empty_files(tmp_path: Path, kind: str) -> None:
    empty = written(tmp_path / "empty.jsonl")
    cases = {
        f"data.{kind}.path is not set": Source(),
        "no such file": Source(path=str(tmp_path / "absent.jsonl")),
        "is a directory": Source(path=str(tmp_path)),
        "the file is empty": Source(path=str(empty)),
        "there is no task 'letters': choose one of postcards": Source(path="task:letters", limit=4),
        f"data.{kind}.limit is not set": Source(path="task:postcards"),
        "a task holds out its own prompts": Source(path="task:postcards", limit=4, eval_path="task:postcards"),
    }
    for message, source in cases.items():
        with pytest.raises(UserError, match=re.escape(message)):
            READ[kind](source, seed=0)


def test_bytes_that_are_not_utf8_and_line_breaks_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a\u2028b", "response": "c"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + good)  # a byte order mark, CRLF, no last newline
    assert [row.data["prompt"] for row in sources.read_rows(path)] == ["a\u2028b"] * 2
    path.write_bytes(good + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not UTF-8"):
        sources.read_rows(path)


def test_limits_and_eval_path(tmp_path: Path) -> None:
    rows = [{"prompt": str(index), "response": "r"} for index in range(5)]
    path, held_out = written(tmp_path / "a.jsonl", *rows), written(tmp_path / "b.jsonl", *rows)
    train, kept = sources.demonstrations(Source(path=str(path), limit=3, eval_path=str(held_out), eval_limit=2), seed=0)
    assert [row.row for row in train] == [0, 1, 2]
    assert kept is not None
    assert [row.where for row in kept] == [f"{held_out}:1", f"{held_out}:2"]
