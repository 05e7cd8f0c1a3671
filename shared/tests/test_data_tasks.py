"""The postcards: the same rows everywhere, scores that mean what they say, text that a small vocabulary holds."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from diptych.data import tasks
from diptych.data.tasks import postcards
from diptych.data.tokenizer import Tokenizer
from diptych.errors import UserError

PROMPT = "Write a postcard from Rome about the food."
BEST = "Dear Ana, Rome is lovely. The soup was fine, the bread was sweet and the wine was grand. Love, Ben"

PINNED = {  # of 200 rows with seed 7; a change here changes every run of the quickstart
    "demonstrations": "310d5ec3fd4c9bfd",
    "preferences": "e728ddc6f0420f4e",
    "prompts": "a37ffc728734a56b",
}


def fingerprint(rows: list[dict]) -> str:
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_rows_are_pinned_across_processes(kind: str) -> None:
    assert fingerprint(tasks.generate("postcards", kind, count=200, seed=7)) == PINNED[kind]  # pyright: ignore
    assert fingerprint(tasks.generate("postcards", kind, count=200, seed=8)) != PINNED[kind]  # pyright: ignore
    code = (
        "import json, sys; from diptych.data import tasks; "
        f"json.dump(tasks.generate('postcards', {kind!r}, count=200, seed=7), sys.stdout)"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert fingerprint(json.loads(other)) == PINNED[kind]


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_row_i_does_not_depend_on_the_count(kind: str) -> None:
    many = tasks.generate("postcards", kind, count=700, seed=1)  # pyright: ignore
    assert tasks.generate("postcards", kind, count=30, seed=1) == many[:30]  # pyright: ignore
    prompts = [row["prompt"] for row in many]
    assert len(postcards.PROMPTS) == len(set(prompts)) == 576
    assert len(set(prompts[:576])) == 576  # every prompt once before any comes again
    assert prompts[576:] != prompts[:124]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (BEST, 1.0),
        (f"  {BEST}\n", 1.0),
        (BEST.replace("fine", "dreadful"), 0.75),
        (
            BEST.replace("fine", "dreadful")
            .replace("lovely", "gloomy")
            .replace("sweet", "sour")
            .replace("grand", "grim"),
            0.0,
        ),
        (BEST.replace("Rome", "Oslo"), 0.5),
        (BEST.replace("Rome is lovely", "Rome is lovely and Oslo is lovely"), 0.5),
        (BEST.replace("fine", "chewy"), 0.75),  # neither bright nor dull
        (BEST.removeprefix("Dear Ana, "), 0.5),
        (BEST.removesuffix(" Love, Ben"), 0.5),
        (BEST + " Love, Ben", 0.5),
        ("Dear Ana, " + BEST, 0.5),
        (BEST[10:-10], 0.25),
        ("Dear Ana, Rome is lovely. Love, Ben", 0.25),  # one slot of four
        ("lovely " * 40, 0.0),  # bright words alone are no slots
        ("Dear Ana, " + "Rome is lovely. " * 9 + "Love, Ben", 0.25),  # what is said twice counts once
        ("", 0.0),
        ("\x00\ud83d\n(", 0.0),
    ],
)
def test_scores(response: str, score: float) -> None:
    assert postcards.score([PROMPT], [response], [{}]) == [score]


@given(st.lists(st.sampled_from([*BEST.split(), "Oslo", "is", "awful.", "\n", "Love,"]), max_size=40))
def test_any_text_has_a_score(words: list[str]) -> None:
    [score] = postcards.score([PROMPT], [" ".join(words)], [{}])
    assert 0.0 <= score <= 1.0


@given(st.text(max_size=80))
def test_garbage_has_a_score(text: str) -> None:
    assert 0.0 <= postcards.score([PROMPT], [text], [{}])[0] <= 1.0


def test_a_prompt_of_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="names no place"):
        postcards.score(["Sort these numbers"], [BEST], [{}])


def test_demonstrations_are_mediocre_and_preferences_are_right() -> None:
    rows = tasks.generate("postcards", "demonstrations", count=2000, seed=3)
    scores = np.array(postcards.score([row["prompt"] for row in rows], [row["response"] for row in rows], rows))
    assert 0.42 < scores.mean() < 0.48  # 1/2 bright x (0.8 + 0.2 / 2)
    assert scores.max() == 1.0
    assert (scores <= 0.25).mean() > 0.2
    wrong = [postcards._PLACE.findall(row["prompt"]) != postcards._PLACE.findall(row["response"]) for row in rows]
    assert 0.17 < np.mean(wrong) < 0.23

    pairs = tasks.generate("postcards", "preferences", count=1000, seed=3)
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = (
        np.array(postcards.score(prompts, [row[key] for row in pairs], pairs)) for key in ("chosen", "rejected")
    )
    assert (chosen - rejected >= postcards.CLEAR_DIFFERENCE).all()
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in pairs])
    assert 0.4 < longer < 0.7  # length alone does not tell


def test_a_vocabulary_of_512_holds_it_in_short_rows(tmp_path: Path) -> None:
    rows = tasks.generate("postcards", "demonstrations", count=2000, seed=0)
    tokenizer = Tokenizer.train(
        (text for row in rows for text in (row["prompt"], row["response"])), vocab_size=512, directory=tmp_path
    )
    responses = [tokenizer.encode(row["response"], add_special_tokens=False) for row in rows]
    prompts = [tokenizer.encode(row["prompt"], add_special_tokens=False) for row in rows]
    assert max(map(len, responses)) <= 47
    assert max(map(len, prompts)) <= 30


def test_faults_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no task 'letters'"):
        tasks.generate("letters", "prompts", count=1, seed=0)
    with pytest.raises(UserError, match="must be at least 1"):
        tasks.generate("postcards", "prompts", count=0, seed=0)
    rows = [{"prompt": "Zürich"}, {"prompt": "b\nc"}]
    tasks.write_jsonl(rows, tmp_path / "data" / "rows.jsonl")
    content = (tmp_path / "data" / "rows.jsonl").read_bytes()
    assert content == '{"prompt": "Zürich"}\n{"prompt": "b\\nc"}\n'.encode()
