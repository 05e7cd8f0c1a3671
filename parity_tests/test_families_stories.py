"""stories260K: 50 texts of its own, scored by both engines and by transformers; export byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from diptych import random
from diptych.data.batches import join
from diptych.engine import ModelSpec, PromptBatch, Sampling, TokenBatch
from diptych.parity.tolerances import TOLERANCES
from diptych.weights.export import export
from diptych.weights.huggingface import Checkpoint, read_checkpoint
from parity_tests.families import targets
from parity_tests.family_checks import ENGINES, engine, output_error
from parity_tests.plain_models import plain_model, read

ROOT = Path(__file__).parents[1]
MODEL = ROOT.parent / "shared" / "models" / "stories260K"
NUM_TEXTS, NUM_GREEDY, NEW = 50, 10, 96

pytestmark = [
    pytest.mark.skipif(not MODEL.is_dir(), reason="../shared/models/stories260K is not beside the project"),
    pytest.mark.xdist_group("stories"),
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return read_checkpoint(MODEL, precision="float32")


def model_of(name: str, checkpoint: Checkpoint):
    return engine(name, "float32").model(
        ModelSpec(
            config=checkpoint.config, weights=checkpoint.weights, head="lm", optimizer=None, micro_batch_size=25
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts(checkpoint) -> TokenBatch:
    """What the model writes after the prompts of the stories recipe: greedily (10) and by keyed draws (40)."""
    lines = (ROOT / "recipes" / "stories_prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = [tokenizer.encode(prompts[index % len(prompts)]).ids for index in range(NUM_TEXTS)]
    columns = max(map(len, ids))
    real = np.arange(columns) >= columns - np.array([len(row) for row in ids])[:, None]
    tokens = np.zeros((NUM_TEXTS, columns), np.int32)
    for row, mask, held in zip(tokens, real, ids, strict=True):
        row[mask] = held
    positions = ((real.cumsum(axis=1) - 1) * real).astype(np.int32)
    model = model_of("torch", checkpoint)
    joined = []
    for rows, temperature in ((slice(0, NUM_GREEDY), 0.0), (slice(NUM_GREEDY, None), 1.0)):
        part = PromptBatch(tokens=tokens[rows], attention=real[rows], positions=positions[rows])
        draws = random.uniforms(1, "families/stories", step=0, rows=range(len(part)), num_positions=NEW)
        how = Sampling(temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=NEW, stop_token_ids=(2,))
        joined.append(join(part, model.generate(part, how, draws, pad_token_id=0)))
    return TokenBatch(
        tokens=np.concatenate([one.tokens for one in joined]),
        attention=np.concatenate([one.attention for one in joined]),
        positions=np.concatenate([one.positions for one in joined]),
    )


@pytest.fixture(scope="module")
def expected(checkpoint, texts) -> np.ndarray:
    """By transformers, each text alone."""
    return read(plain_model(checkpoint.config, dict(checkpoint.weights), "lm"), texts).detach().numpy()


@pytest.mark.parametrize("name", ENGINES)
def test_logprobs_of_fifty_texts(name, checkpoint, texts, expected, judge):
    assert len(texts) == NUM_TEXTS
    assert len({row.tobytes() for row in texts.tokens}) > 40
    assert targets(texts).sum() > 3000
    found = model_of(name, checkpoint).logprobs(texts, temperature=1.0)
    judge("stories260K", "logprobs float32", output_error(found, expected, targets(texts)), TOLERANCES["model"].float32)


def test_canary_another_rope_base_is_seen(checkpoint, texts, expected):
    """Same weights, a base of 11 000 instead of 10 000."""
    assert float(checkpoint.config.get("rope_theta", 10000.0)) == 10000.0
    wrong = replace(checkpoint, config={**checkpoint.config, "rope_theta": 11000.0})
    found = model_of("torch", wrong).logprobs(texts, temperature=1.0)
    assert output_error(found, expected, targets(texts)) > 100 * TOLERANCES["model"].float32


@pytest.mark.parametrize("name", ENGINES)
def test_export_is_byte_identical(name, tmp_path, judge):
    export(MODEL, tmp_path / "out", engine=name, max_shard_bytes=5 * 10**9)
    original, written = (load_file(folder / "model.safetensors") for folder in (MODEL, tmp_path / "out"))
    lost = set(original) ^ set(written)
    differ = [name for name in original if name not in lost and original[name].tobytes() != written[name].tobytes()]
    assert not lost
    judge("stories260K", "weights", len(differ), 0)
    assert all(original[name].dtype == written[name].dtype for name in original)
