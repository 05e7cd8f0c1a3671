"""`diptych eval` against models whose every number is known, and the calibration maths."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from diptych.algorithms.calibration import brier_score, expected_calibration_error, preference_probability, reliability
from diptych.cli import main
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Model
from diptych.evaluate import buckets, evaluate, read_corpus
from diptych.weights.huggingface import initial_checkpoint, with_scalar_head, write_checkpoint

ROWS = [
    {"prompt": "Say hello", "response": "Hello there, friend"},
    {"prompt": "Count", "response": "one two three four five six seven eight nine ten eleven twelve thirteen"},
    {"prompt": "A word for naïve café?", "response": "Ünïcödé"},
    {"prompt": "x", "response": "y"},
    {"prompt": "Say hello again, but this time take your time", "response": "Hello " * 12},
]
PAIRS = [
    {"prompt": "Say hello", "chosen": "Hello there", "rejected": "No"},
    {"prompt": "Count", "chosen": "one two three four five", "rejected": "five four"},
    {"prompt": "x", "chosen": "y", "rejected": "a rather long answer to a rather short question " * 2},
]


class Bigram(Model):
    """Logits of a token are a row of a table, by the token before it; a score is a number per token, summed over the
    text so far. What lies on padding is NaN."""

    def __init__(self, settings):
        self.settings = settings
        draws = np.random.default_rng(0)
        self.table = np.round(draws.normal(size=(300, 300)), 1)  # rounded: ties are there
        self.value = draws.normal(size=300)

    def model(self, spec):
        self.spec = spec
        return self

    def logprobs(self, batch, *, temperature):
        assert temperature == 1.0
        assert len(batch) <= self.spec.micro_batch_size
        table = self.table - np.log(np.exp(self.table).sum(axis=1, keepdims=True))
        found = np.full(batch.tokens.shape, np.nan)
        found[:, 1:] = table[batch.tokens[:, :-1], batch.tokens[:, 1:]]
        found[~batch.attention] = np.nan
        found[:, 0] = 0
        return found

    def greedy_matches(self, batch):
        found = np.ones(batch.tokens.shape, bool)
        found[:, 1:] = self.table.argmax(axis=1)[batch.tokens[:, :-1]] == batch.tokens[:, 1:]
        return found | ~batch.attention

    def scores(self, batch):
        found = np.cumsum(np.where(batch.attention, self.value[batch.tokens], 0.0), axis=1)
        return np.where(batch.attention, found, np.nan)


@pytest.fixture
def engine(monkeypatch):
    made = []
    monkeypatch.setattr("diptych.evaluate.load_engine", lambda _, settings: made.append(Bigram(settings)) or made[-1])
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{"lm": DIR, "scalar": DIR} with a byte-level tokenizer of 280 tokens."""
    root = tmp_path_factory.mktemp("models")
    texts = [text for row in ROWS for text in row.values()]
    Tokenizer.train(texts, vocab_size=280, directory=root / "tokenizer")
    config = {
        "model_type": "llama", "vocab_size": 280, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    lm = initial_checkpoint(config, seed=0)
    for head, checkpoint in (("lm", lm), ("scalar", with_scalar_head(lm, seed=0))):
        write_checkpoint(root / head, checkpoint, tokenizer_directory=root / "tokenizer")
    return root


@pytest.fixture
def write(tmp_path):
    def file(rows, name="data.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return file


def numbers(result):
    return {key: value for key, value in result.items() if key != "seconds"}


def test_a_language_models_numbers_are_those_of_a_loop(models, write, engine):
    result = evaluate(models / "lm", write(ROWS), engine="jax", device="cpu", batch_size=2)
    corpus = read_corpus(write(ROWS), Tokenizer.load(models / "lm"), head="lm", limit=None, width=512)
    (model,) = engine
    assert model.settings.device == "cpu"
    nats, hits, count = 0.0, 0, 0
    for example in corpus.examples:
        for t in np.flatnonzero(example.trained):
            logits = model.table[example.tokens[t - 1]]
            nats -= logits[example.tokens[t]] - math.log(np.exp(logits).sum())
            hits += next(i for i in range(300) if logits[i] == logits.max()) == example.tokens[t]
            count += 1
    text = sum(len(row["response"].encode()) for row in ROWS)
    assert result["num_tokens"] == count
    assert result["num_bytes"] == text
    assert result["loss"] == pytest.approx(nats / count, rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-12)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text, rel=1e-12)
    assert result["accuracy"] == hits / count
    assert (result["num_rows"], result["num_left_out"], result["format"]) == (5, 0, "demonstrations")


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_padding_and_batches_change_nothing(models, write, engine, head, monkeypatch):
    data = write(ROWS if head == "lm" else PAIRS)
    results = [numbers(evaluate(models / head, data, engine="jax", batch_size=size)) for size in (1, 2, 3, 8)]
    with monkeypatch.context() as patch:
        patch.setattr("diptych.evaluate.buckets", lambda width: (512,))
        results.append(numbers(evaluate(models / head, data, engine="jax", batch_size=3)))
    assert all(result == results[0] for result in results)
    # Canary: with padding counted, it shows.
    name = "sft_batch" if head == "lm" else "pair_batch"
    import diptych.evaluate as module

    real = getattr(module, name)

    def everything(*args, **settings):
        batch = real(*args, **settings)
        return replace(batch, arrays={key: np.ones_like(value) for key, value in batch.arrays.items()})

    monkeypatch.setattr(f"diptych.evaluate.{name}", everything)
    with pytest.raises(Exception, match="not finite"):
        evaluate(models / head, data, engine="jax", batch_size=3)


@pytest.mark.parametrize("width", [2, 7, 64, 512])
def test_text_counts_every_token_but_the_first_once(models, write, engine, tmp_path, width):
    text = "Hello there, friend. Ünïcödé " * 5
    tokens = Tokenizer.load(models / "lm").encode(text, add_special_tokens=True)
    data = write([{"text": text}, {"text": "Count one two"}])
    found = evaluate(models / "lm", data, engine="jax", max_tokens=width)
    more = len(Tokenizer.load(models / "lm").encode("Count one two", add_special_tokens=True))
    assert found["num_tokens"] == len(tokens) + more - 2
    first = len(Tokenizer.load(models / "lm").decode(tokens[:1]).encode())
    assert first == len("Hello")
    assert found["num_rows"] == 2
    (tmp_path / "book.txt").write_text(text)
    book = evaluate(models / "lm", str(tmp_path / "book.txt"), engine="jax", max_tokens=width)
    assert book["num_tokens"] == len(tokens) - 1
    assert book["num_bytes"] == len(text.encode()) - first
    assert book["format"] == "text"
    whole = evaluate(models / "lm", str(tmp_path / "book.txt"), engine="jax")
    assert book["loss"] == pytest.approx(whole["loss"], rel=1e-12)  # a bigram model needs no longer context


def test_a_first_token_that_is_half_a_character_has_no_bytes(models, engine, tmp_path):
    (tmp_path / "letter.txt").write_text("\u0416 is a letter")
    tokens = Tokenizer.load(models / "lm").encode("\u0416 is a letter", add_special_tokens=True)
    found = evaluate(models / "lm", str(tmp_path / "letter.txt"), engine="jax")
    assert (found["num_tokens"], found["num_bytes"]) == (len(tokens) - 1, 2 + len(" is a letter"))


def test_rows_that_are_too_long_are_left_out_and_counted(models, write, engine, capsys):
    assert main(["eval", str(models / "lm"), "--data", write(ROWS), "--engine", "jax", "--max-tokens", "40"]) == 0
    text = capsys.readouterr().out
    assert "left out: 2 rows longer than 40 tokens" in text
    assert main(["eval", str(models / "lm"), "--data", write(ROWS), "--engine", "jax", "--max-tokens", "3"]) == 2
    assert "not one of 5 rows has at most 3 tokens" in capsys.readouterr().err


def test_json_and_limit(models, write, engine, capsys):
    command = ["eval", str(models / "lm"), "--data", write(ROWS), "--engine", "torch", "--json", "--limit", "2"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_rows"] == 2
    assert found["engine"] == "torch"
    assert found.keys() >= {"loss", "perplexity", "accuracy", "bits_per_byte", "num_tokens", "num_bytes", "seconds"}


def test_a_reward_models_numbers_are_those_of_a_loop(models, write, engine):
    result = evaluate(models / "scalar", write(PAIRS), engine="jax", batch_size=2)
    corpus = read_corpus(write(PAIRS), Tokenizer.load(models / "scalar"), head="scalar", limit=None, width=512)
    value = engine[0].value
    margins = np.asarray([value[p.chosen.tokens].sum() - value[p.rejected.tokens].sum() for p in corpus.pairs])
    assert result["num_pairs"] == 3
    assert result["accuracy"] == (margins > 0).mean()
    assert result["margin"] == pytest.approx(margins.mean(), rel=1e-12)
    assert result["margin"] == pytest.approx(result["chosen"] - result["rejected"], rel=1e-12)
    assert result["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-12)
    assert result["brier"] == pytest.approx(np.mean((1 / (1 + np.exp(margins))) ** 2), rel=1e-12)
    assert sum(one["count"] for one in result["bins"]) == 3
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("head", "rows", "options", "message"),
    [
        ("scalar", [{"text": "hello"}], [], "is evaluated on preference pairs"),
        ("scalar", ROWS, [], "unknown format"),
        ("lm", PAIRS, [], "unknown format"),
        ("lm", [{"text": "hello"}, {"prompt": "a", "response": "b"}], [], "data.jsonl:2: `text` must be text"),
        ("lm", [{"text": ""}], [], "0 tokens"),
        ("lm", ROWS, ["--batch-size", "0"], "must be at least 1"),
        ("lm", ROWS, ["--max-tokens", "513"], "at most the model's 512 positions"),
    ],
)
def test_bad_input_is_one_line(models, write, engine, capsys, head, rows, options, message):
    assert main(["eval", str(models / head), "--data", write(rows), "--engine", "jax", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not engine


def test_buckets_end_with_the_width():
    assert buckets(512) == (32, 64, 128, 256, 512)
    assert buckets(40) == (32, 40)
    assert buckets(8) == (8,)


def test_calibration_of_margins_that_mean_what_they_say():
    draws = np.random.default_rng(0)
    margins = draws.normal(0, 2, 40_000)
    signed = np.where(draws.uniform(size=len(margins)) < preference_probability(np.abs(margins)), 1, -1)
    honest = np.abs(margins) * signed  # right with just the probability that it claims
    assert expected_calibration_error(reliability(honest, num_bins=10)) < 0.01
    # Canaries: four times the margin claims too much, a quarter too little; accuracy is the same.
    for factor in (4.0, 0.25):
        assert expected_calibration_error(reliability(factor * honest, num_bins=10)) > 0.05
        assert brier_score(factor * honest) > brier_score(honest) + 0.005


def test_calibration_by_hand():
    margins = np.log([5.0, 5.0, 5.0, 1 / 5.0, 1.0, 99.0])  # p = 5/6 5/6 5/6 1/6 .5 .99
    bins = reliability(margins, num_bins=5)
    assert [one.count for one in bins] == [1, 0, 0, 4, 1]
    assert bins[3].confidence == pytest.approx(5 / 6)
    assert bins[3].accuracy == 0.75
    assert bins[0].accuracy == 0.5  # a tie is half right
    assert bins[1].confidence is None
    assert expected_calibration_error(bins) == pytest.approx(4 / 6 * (5 / 6 - 0.75) + 1 / 6 * 0.01)
    assert brier_score(margins) == pytest.approx((3 / 36 + 25 / 36 + 0.25 + 0.0001) / 6)
    assert preference_probability(np.asarray([-800.0, 800.0])).tolist() == [0.0, 1.0]
