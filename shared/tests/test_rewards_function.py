"""Reward functions: found by name, checked for count, type and finiteness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diptych.errors import InvariantError, UserError
from diptych.rewards.function import call, load_function

SOURCE = """
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 0.5

def length(prompts, responses, rows):
    return [Weight().value * len(response) + row["bonus"] for response, row in zip(responses, rows, strict=True)]

constant = 3
"""
PROMPTS, RESPONSES, ROWS = ["p", "q"], ["one", "four"], [{"bonus": 1}, {"bonus": 2}]


def test_a_file_relative_to_a_directory_and_a_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    rewards = call(load_function("mine.py:length", directory=tmp_path), PROMPTS, RESPONSES, ROWS)
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [2.5, 4.0]
    postcards = load_function("diptych.data.tasks.postcards:score")
    assert call(postcards, ["Rome"], [""], [{}]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine.py", "write FILE.py:NAME or MODULE:NAME"),
        (":length", "write FILE.py:NAME or MODULE:NAME"),
        ("absent.py:length", "no such file"),
        ("mine.py:size", "mine.py has no 'size'; it has Weight, dataclass, length"),
        ("mine.py:constant", "'constant' is not callable but int"),
        ("broken.py:length", "broken.py fails to import: SyntaxError"),
        ("needy.py:length", "needy.py fails to import: ModuleNotFoundError: No module named 'surely_absent'"),
        ("surely_absent.module:length", "module surely_absent.module fails to import: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def length(:\n")
    (tmp_path / "needy.py").write_text("import surely_absent\n")
    with pytest.raises(UserError, match=message) as error:
        load_function(reference, directory=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], UserError, "returned 1 numbers for 2 responses"),
        (None, UserError, "must return a list of numbers, not NoneType"),
        (1.5, UserError, "not float"),
        ("12", UserError, "not str"),
        ([1.0, "2"], UserError, "number 1 is '2'"),
        ([1.0, None], UserError, "number 1 is None"),
        (np.zeros((2, 1)), UserError, r"number 0 is \[0.0\]"),
        ([1.0, float("nan")], InvariantError, "returned nan for row 1 of the batch: prompt 'q', response 'four'"),
        ([float("inf"), 0.0], InvariantError, "returned inf for row 0 of the batch: prompt 'p', response 'one'"),
    ],
)
def test_what_must_not_be_returned(returned: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(lambda prompts, responses, rows: returned, PROMPTS, RESPONSES, ROWS)  # pyright: ignore


@pytest.mark.parametrize(
    "returned", [[1, 0], (True, False), np.array([1.0, 0.0], np.float32), [np.float32(1), np.int64(0)]]
)
def test_what_may_be_returned(returned: object) -> None:
    rewards = call(lambda prompts, responses, rows: returned, PROMPTS, RESPONSES, ROWS)  # pyright: ignore
    assert rewards.tolist() == [1.0, 0.0]
    assert rewards.dtype == np.float64


def test_an_exception_of_the_function_keeps_its_traceback() -> None:
    def broken(prompts: list[str], responses: list[str], rows: list) -> list[float]:
        raise KeyError("bonus")

    with pytest.raises(KeyError, match="bonus"):
        call(broken, PROMPTS, RESPONSES, ROWS)
