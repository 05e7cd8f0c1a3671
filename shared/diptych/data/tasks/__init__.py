"""Tasks that Diptych generates itself: `task:NAME` as the path of a source. Rows have the ordinary JSONL formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diptych.data.tasks import postcards
from diptych.errors import UserError

TASKS = {"postcards": postcards.generate}

KINDS = ("demonstrations", "preferences", "prompts")


def generate(
    name: str, kind: Literal["demonstrations", "preferences", "prompts"], *, count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` rows of a task. Row i depends on (name, kind, seed, i) and on nothing else."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
    if count < 1:
        raise UserError(f"task {name!r}: the number of examples (limit) is {count}: it must be at least 1")
    return TASKS[name](kind, count=count, seed=seed)


def write_jsonl(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """One JSON object to a line, UTF-8, the same bytes on every machine. Makes the folder where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
