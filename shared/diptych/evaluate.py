"""`diptych eval`: a model's numbers on a file. Padding, batches and buckets never count.

A language model reads demonstrations (only response tokens count, the end-of-sequence token included) or plain text
(all tokens but a document's first): loss, perplexity, next-token accuracy, bits per byte. A model with a scalar head
reads preference pairs: accuracy, margin, calibration.

Text longer than a window is cut into windows that share one token: each begins with the last token of the one before,
so that every token but the first is counted once, with what its window holds before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int

from diptych.algorithms.calibration import brier_score, expected_calibration_error, reliability
from diptych.data.batches import pair_batch, sft_batch
from diptych.data.examples import PairExample, TokenExample, load_demonstrations, load_preferences
from diptych.data.sources import Row, read_rows
from diptych.data.tokenizer import Tokenizer, check_vocabulary
from diptych.engine import EngineSettings, Model, ModelSpec, Precision, load_engine
from diptych.errors import InvariantError, UserError
from diptych.recipe.schema import DataRecipe, Source
from diptych.run.progress import Progress
from diptych.weights.huggingface import read_checkpoint

DEFAULT_MAX_TOKENS = 2048
NUM_BINS = 10
_ANY_LENGTH = 2**31 - 1  # rows are made whole, and those that are too long counted here

Example = TypeVar("Example", TokenExample, PairExample)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is evaluated: `examples` for a language model, `pairs` for a scalar head. num_bytes: UTF-8 bytes of the text
    that the counted tokens stand for. left_out: rows longer than the limit."""

    kind: Literal["demonstrations", "text", "preferences"]
    examples: Sequence[TokenExample] = ()
    pairs: Sequence[PairExample] = ()
    num_rows: int
    num_bytes: int = 0
    left_out: int = 0


def evaluate(
    directory: Path,
    data: str,
    *,
    engine: str,
    device: Literal["auto", "cpu"] = "auto",
    precision: Precision = "float32",
    batch_size: int = 8,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Evaluate the model of a directory on `data` (JSONL, .txt or task:NAME). Returns what `--json` prints.

    batch_size: rows, or pairs, at once. limit: only the first rows. max_tokens: the longest row, or window of text.
    Raises UserError for settings or data that cannot be used, InvariantError where the model's numbers are not finite.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError("--batch-size and --limit must be at least 1")
    checkpoint = read_checkpoint(directory, precision=precision)
    tokenizer = Tokenizer.load(directory)
    check_vocabulary(tokenizer, checkpoint.model.vocab_size, where=str(directory))
    positions = checkpoint.model.max_position_embeddings
    width = min(DEFAULT_MAX_TOKENS, positions) if max_tokens is None else max_tokens
    if not 2 <= width <= positions:
        raise UserError(f"--max-tokens {width}: at least 2, and at most the model's {positions} positions")
    corpus = read_corpus(data, tokenizer, head=checkpoint.head, limit=limit, width=width)
    settings = EngineSettings(precision=precision, device=device)
    rows_at_once = batch_size if checkpoint.head == "lm" else 2 * batch_size
    model = load_engine(engine, settings).model(
        ModelSpec(
            config=checkpoint.config, weights=checkpoint.weights, head=checkpoint.head, optimizer=None,
            micro_batch_size=rows_at_once,
        )
    )  # fmt: skip
    measure = _language_model if checkpoint.head == "lm" else _reward_model
    began = time.perf_counter()
    numbers = measure(model, corpus, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id, buckets=buckets(width))
    about = {
        "model": str(directory), "data": data, "format": corpus.kind, "head": checkpoint.head, "engine": engine,
        "device": device, "precision": precision, "max_tokens": width, "num_rows": corpus.num_rows,
        "num_left_out": corpus.left_out,
    }  # fmt: skip
    return about | numbers | {"seconds": time.perf_counter() - began}


def read_corpus(data: str, tokenizer: Tokenizer, *, head: str, limit: int | None, width: int) -> Corpus:
    """Read and tokenise `data`. Raises UserError where its format does not go with the head, or nothing fits."""
    text = _text_rows(data, limit)
    if text is not None:
        if head == "scalar":
            raise UserError(f"{data}: plain text; a model with a scalar head is evaluated on preference pairs")
        return _text_corpus(text, tokenizer, width)
    source = Source(path=data, eval_fraction=0.0, limit=limit)
    settings = {"max_prompt_tokens": _ANY_LENGTH, "max_response_tokens": _ANY_LENGTH, "buckets": (_ANY_LENGTH,)}
    if head == "scalar":
        recipe = DataRecipe(preferences=source, **settings)
        pairs = load_preferences(recipe, tokenizer, seed=0, max_positions=_ANY_LENGTH).train
        kept = _fitting(pairs, [max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in pairs], data, width)
        return Corpus(kind="preferences", pairs=kept, num_rows=len(kept), left_out=len(pairs) - len(kept))
    recipe = DataRecipe(demonstrations=source, **settings)
    rows = load_demonstrations(recipe, tokenizer, seed=0, max_positions=_ANY_LENGTH).train
    kept = _fitting(rows, [len(row.tokens) for row in rows], data, width)
    return Corpus(
        kind="demonstrations",
        examples=kept,
        num_rows=len(kept),
        num_bytes=sum(_response_bytes(row, tokenizer) for row in kept),
        left_out=len(rows) - len(kept),
    )


def buckets(width: int) -> tuple[int, ...]:
    """Lengths that batches are padded to: powers of two from 32 on, and `width`."""
    return (*(2**power for power in range(5, 31) if 2**power < width), width)


def _text_rows(data: str, limit: int | None) -> list[Row] | None:
    """The documents of a .txt file (one) or of a JSONL file whose rows hold `text`; None for other formats."""
    if data.startswith("task:"):
        return None
    path = Path(data)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            return [Row(row=0, where=f"{path}:1", data={"text": path.read_bytes().decode("utf-8-sig")})]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if "text" not in read_rows(path, limit=1)[0].data:
        return None
    rows = read_rows(path, limit=limit)
    for row in rows:
        if not isinstance(row.data.get("text"), str):
            raise UserError(f"{row.where}: `text` must be text, as in the first row")
    return rows


def _text_corpus(rows: list[Row], tokenizer: Tokenizer, width: int) -> Corpus:
    examples: list[TokenExample] = []
    num_bytes = 0
    for row in rows:
        text = row.data["text"]
        tokens = np.asarray(tokenizer.encode(text, add_special_tokens=True), np.int32)
        if len(tokens) < 2:
            raise UserError(f"{row.where}: {len(tokens)} tokens: a text needs one to count and one before it")
        num_bytes += len(text.encode()) - _bytes_of(tokens[:1], tokenizer)
        for start in range(0, len(tokens) - 1, width - 1):
            window = tokens[start : start + width]
            trained = np.arange(len(window)) > 0
            examples.append(TokenExample(row=row.row, tokens=window, trained=trained))
    return Corpus(kind="text", examples=examples, num_rows=len(rows), num_bytes=num_bytes)


def _fitting(examples: list[Example], lengths: list[int], data: str, width: int) -> list[Example]:
    kept = [example for example, length in zip(examples, lengths, strict=True) if length <= width]
    if not kept:
        raise UserError(
            f"{data}: not one of {len(examples)} rows has at most {width} tokens (the shortest has {min(lengths)}): "
            "raise --max-tokens"
        )
    return kept


def _response_bytes(example: TokenExample, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the trained spans: what each adds to the text before it (a special token adds none)."""
    edges = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0, append=0))
    lengths = [_bytes_of(example.tokens[:edge], tokenizer) for edge in edges]
    return sum(end - start for start, end in zip(lengths[::2], lengths[1::2], strict=True))


def _bytes_of(tokens: Int[np.ndarray, " time"], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of `tokens`; a character that ends after them belongs to the token that ends it."""
    return len(tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}").encode())


def _language_model(
    model: Model, corpus: Corpus, *, batch_size: int, pad_token_id: int, buckets: Sequence[int]
) -> dict[str, Any]:
    """Sums are over rows, each rounded once (fsum), so that nothing depends on how rows are batched."""
    examples = sorted(corpus.examples, key=lambda example: len(example.tokens))
    nats: list[float] = []
    hits = tokens = 0
    with Progress(math.ceil(len(examples) / batch_size), "eval") as bar:
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            batch = sft_batch(rows, buckets=buckets, pad_token_id=pad_token_id, multiple_of=batch_size)
            counted = batch.arrays["mask"] > 0
            logprobs = model.logprobs(batch.tokens, temperature=1.0)
            matches = model.greedy_matches(batch.tokens)
            nats += [-math.fsum(row[mask].tolist()) for row, mask in zip(logprobs, counted, strict=True)]
            hits += int((matches & counted).sum())
            tokens += int(counted.sum())
            bar.advance(tokens=int(batch.tokens.attention.sum()), shown={"loss": math.fsum(nats) / tokens})
    total = math.fsum(nats)
    if not math.isfinite(total):
        raise InvariantError(f"the model's log-probabilities are not finite: their sum is {-total}")
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "accuracy": hits / tokens,
        "bits_per_byte": total / math.log(2) / corpus.num_bytes if corpus.num_bytes else None,
        "num_tokens": tokens,
        "num_bytes": corpus.num_bytes,
    }


def _reward_model(
    model: Model, corpus: Corpus, *, batch_size: int, pad_token_id: int, buckets: Sequence[int]
) -> dict[str, Any]:
    pairs = sorted(corpus.pairs, key=lambda pair: max(len(pair.chosen.tokens), len(pair.rejected.tokens)))
    scores: list[float] = []
    with Progress(math.ceil(len(pairs) / batch_size), "eval") as bar:
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            batch = pair_batch(part, buckets=buckets, pad_token_id=pad_token_id, multiple_of=batch_size)
            found = model.scores(batch.tokens)[batch.arrays["end_mask"] > 0]  # in the order of rows
            scores += found.astype(np.float64).tolist()
            bar.advance(tokens=int(batch.tokens.attention.sum()))
    chosen, rejected = np.asarray(scores[::2]), np.asarray(scores[1::2])
    margins = chosen - rejected
    if not np.isfinite(margins).all():
        raise InvariantError("the model's scores are not finite")
    bins = reliability(margins, num_bins=NUM_BINS)

    def mean(values: np.ndarray) -> float:
        return math.fsum(values.tolist()) / len(values)

    return {
        "loss": mean(np.logaddexp(0.0, -margins)),
        "accuracy": mean(margins > 0),
        "margin": mean(margins),
        "chosen": mean(chosen),
        "rejected": mean(rejected),
        "calibration_error": expected_calibration_error(bins),
        "brier": brier_score(margins),
        "bins": [asdict(one) for one in bins],
        "num_pairs": len(margins),
    }


def describe(result: dict[str, Any]) -> str:
    """The numbers as text, one to a line."""
    units = {
        "loss": "nats per token" if result["head"] == "lm" else "nats per pair, -log sigmoid(margin)",
        "perplexity": "exp(loss)",
        "accuracy": "tokens that were the model's first choice" if result["head"] == "lm" else "chosen above rejected",
        "bits_per_byte": "of the text that the counted tokens stand for",
        "margin": "mean of chosen - rejected",
        "calibration_error": f"of sigmoid(margin), {NUM_BINS} bins over [0.5, 1]",
        "brier": "mean of (1 - sigmoid(margin))^2",
    }
    lines = [f"{result['model']} on {result['data']} ({result['format']}, {result['engine']}, {result['precision']})"]
    for name, unit in units.items():
        if name in result:
            value = result[name]
            lines.append(f"{name:<18} {'-' if value is None else format(value, '.6g'):<12} {unit}")
    counts = {name.removeprefix("num_"): result[name] for name in result if name.startswith("num_")}
    lines.append(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    if result["num_left_out"]:
        lines.append(f"left out: {result['num_left_out']} rows longer than {result['max_tokens']} tokens")
    return "\n".join(lines)
