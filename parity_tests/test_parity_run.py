"""`diptych parity run` and `gate` from the command line, shorter than anybody would run them."""

from __future__ import annotations

import json

import pytest

from parity_tests.test_parity_record import SETTINGS, diptych


@pytest.mark.slow
def test_two_free_float64_runs_are_the_same(tmp_path):
    words = ("run", "recipes/quickstart.yaml", "--mode", "float64", "--steps", 2, "-o", tmp_path / "work")
    done = diptych(*words, "--json", tmp_path / "r.json", *SETTINGS)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["same"]
    assert found["precision"] == "float64"
    assert len(found["steps"]) == 6
    assert "the same" in done.stdout
    taken = diptych(*words, *SETTINGS, ok=(2,))
    assert "is there already" in taken.stderr


@pytest.mark.slow
def test_the_gate_of_a_healthy_engine(tmp_path):
    done = diptych("gate", "recipes/quickstart.yaml", "--engine", "torch", *SETTINGS)
    assert done.stdout.startswith("the same: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("gate", "recipes/families/llama.yaml", "--engine", "torch"), "no rl stage"),
        (("run", "recipes/quickstart.yaml", "--steps", "0"), "--steps 0: at least 1"),
        (("run", "recipes/quickstart.yaml", "--mode", "noise", "--html", "x.html"), "--html has no effect"),
        (("record", "--engine", "torch", "-o", "nowhere"), "name a recipe"),
        (("record", "recipes/quickstart.yaml", "--engine", "torch", "-o", "nowhere", "--every", "0"), "--every 0"),
    ],
)
def test_what_can_be_mended_is_one_line_and_exit_code_2(words, says):
    done = diptych(*words, ok=(2,))
    assert says in done.stderr
    assert "Traceback" not in done.stderr
