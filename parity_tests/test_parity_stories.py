"""A real trained model (stories260K) writes, on both engines, word for word the text that its author published."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "stories260K"
PUBLISHED = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="../shared/models/stories260K is not beside the project")


def generate(engine: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "diptych.cli", "generate", str(MODEL), "--engine", engine, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


GREEDY = ["--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens", "200"]


@pytest.fixture(scope="module")
def published():
    """200 greedy tokens by transformers' own generate."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=200)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_greedy_text_is_the_published_one(engine, published):
    text = generate(engine, *GREEDY).rstrip("\n")
    assert text.startswith(PUBLISHED)
    assert text == published.rstrip("\n")


def test_the_same_seed_gives_the_same_text_on_both_engines_and_another_seed_another():
    settings = ["--prompt", "One day", "--temperature", "0.9", "--max-new-tokens", "120", "--top-p", "0.95"]
    jax = generate("jax", *settings, "--seed", "3")
    assert jax == generate("torch", *settings, "--seed", "3")
    assert jax != generate("jax", *settings, "--seed", "4")  # canary: the seed matters
