"""The README's table of families is the registry's, and the docs' example is the code."""

from pathlib import Path

import pytest

from diptych.families.family import MODULES, supported_families
from diptych.families.table import END, START, families_table, with_table

README = Path(__file__).parents[2] / "README.md"
FAMILIES = README.parent / "shared" / "diptych" / "families"


def test_the_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python scripts/family_table.py"


def test_canary_an_old_table_is_seen():
    text = README.read_text(encoding="utf-8")
    old = text.replace("| `qwen3` |", "| `qwen9` |")
    assert old != text
    assert with_table(old) != old


def test_every_family_has_a_row():
    rows = families_table().splitlines()[2:]
    assert len(rows) == len(supported_families())
    for model_type, row in zip(supported_families(), rows, strict=True):
        assert f"`{model_type}`" in row
        assert row.count("|") == 5
        assert "  " not in row.strip("|")


@pytest.mark.parametrize("text", ["", START, f"{END} {START}", f"{START}{START}{END}"])
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        with_table(text)


def test_the_example_in_the_docs_is_the_file():
    text = (README.parent / "docs" / "families.md").read_text(encoding="utf-8")
    code = (FAMILIES / "qwen3.py").read_text(encoding="utf-8")
    assert f"```python\n{code.rstrip()}\n```" in text


def test_a_family_takes_less_than_120_lines():
    sizes = {name: len((FAMILIES / f"{name}.py").read_text().splitlines()) for name in set(MODULES.values())}
    assert {name: size for name, size in sizes.items() if size >= 120} == {}
