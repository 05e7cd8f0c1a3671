"""The table of families in README.md, made from the registry: `python scripts/family_table.py` writes it there."""

from __future__ import annotations

from diptych.families.family import family, supported_families

START, END = "<!-- families -->", "<!-- /families -->"


def families_table() -> str:
    """One row for every model_type, in the registry's order."""
    lines = ["| family | `model_type` | what it needs | for example |", "| --- | --- | --- | --- |"]
    for model_type in supported_families():
        entry = family(model_type)
        lines.append(f"| {entry.title} | `{model_type}` | {entry.features} | {entry.examples} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the table between its two markers. Raises ValueError unless it has one of each, in order."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text must hold {START} and then {END}, once each")
    before, rest = text.split(START)
    return f"{before}{START}\n{families_table()}\n{END}{rest.split(END)[1]}"
