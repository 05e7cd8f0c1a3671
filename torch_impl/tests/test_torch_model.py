"""Log-probabilities, scores and gradients against transformers (float32) and a NumPy Llama (float64)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from diptych.engine import Loss, TrainBatch
from diptych.errors import UserError
from diptych.families.family import read_model
from diptych.families.rope import frequencies as rope_frequencies
from diptych_torch import float64, model, names, rotary
from diptych_torch.logprobs import chunked_logprobs

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "pad token": {"pad_token_id": 5, "tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "all key-value heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "large eps": {"rms_norm_eps": 0.1},
}


def numpy_hidden(config: Any, weights: Any, batch: Any) -> np.ndarray:
    """The Llama forward pass, row by row without its padding, in NumPy float64. Padding stays 0."""
    shape: Any = read_model(config)
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    frequencies = rope_frequencies(shape.ropes[0])[0].astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return w[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.norm.eps)

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ w[name].T).reshape(len(x), -1, shape.head_dim).transpose(1, 0, 2)

    def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate(
            [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], axis=-1
        )

    hidden = np.zeros((*batch.tokens.shape, shape.hidden_size))
    for row, real in enumerate(batch.attention):
        x = w["model.embed_tokens.weight"][batch.tokens[row, real]]
        angles = batch.positions[row, real][:, None].astype(np.float64) * frequencies
        for layer in range(shape.num_layers):
            prefix = f"model.layers.{layer}."
            y = norm(x, prefix + "input_layernorm.weight")
            q, k, v = (heads(y, f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
            groups = shape.num_heads // shape.num_kv_heads
            k, v = (np.repeat(z, groups, axis=0) for z in (rotate(k, angles), v))
            logits = rotate(q, angles) @ k.transpose(0, 2, 1) / np.sqrt(shape.head_dim)
            logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            read = (p / p.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(x), -1)
            x = x + read @ w[prefix + "self_attn.o_proj.weight"].T
            y = norm(x, prefix + "post_attention_layernorm.weight")
            gate = y @ w[prefix + "mlp.gate_proj.weight"].T
            inner = gate / (1 + np.exp(-gate)) * (y @ w[prefix + "mlp.up_proj.weight"].T)
            x = x + inner @ w[prefix + "mlp.down_proj.weight"].T
        hidden[row, real] = norm(x, "model.norm.weight")
    return hidden


def numpy_logprobs(config: Any, weights: Any, batch: Any, temperature: float) -> np.ndarray:
    unembedding = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = numpy_hidden(config, weights, batch)[:, :-1] @ unembedding.T.astype(np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    drawn = np.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return np.pad(drawn, ((0, 0), (1, 0)))


def transformers_outputs(config: Any, weights: Any, batch: Any, head: str) -> np.ndarray:
    """Full logits (lm) or scores (scalar) of a model that transformers builds and runs all by itself, float32."""
    settings = {name: value for name, value in config.items() if name != "model_type"}
    family = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    theirs = family.from_config(AutoConfig.for_model("llama", num_labels=1, **settings), attn_implementation="eager")
    state = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    with torch.no_grad():
        hidden = theirs.model(
            torch.tensor(batch.tokens, dtype=torch.int64),
            attention_mask=torch.tensor(batch.attention, dtype=torch.int64),
            position_ids=torch.tensor(batch.positions, dtype=torch.int64),
        ).last_hidden_state
        return (theirs.lm_head(hidden) if head == "lm" else theirs.score(hidden)[..., 0]).numpy()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_numpy_llama(make_model, make_config, hot_weights, make_batch, wanted, name, precision):
    config = make_config(**CONFIGS[name])
    weights, batch = hot_weights(config), make_batch(offset=3000 if precision == "float64" else 200)
    ours = make_model(config=config, weights=weights, precision=precision).logprobs(batch, temperature=0.7)
    expected = np.where(wanted(batch), numpy_logprobs(config, weights, batch, 0.7), 0)
    assert ours.dtype == precision
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[precision])
    assert np.abs(expected).max() > 3  # the model is hot


@pytest.mark.parametrize("chunk", [7, 1024])
def test_greedy_matches_are_the_first_largest_logits(make_model, make_config, hot_weights, make_batch, wanted, chunk):
    config, batch = make_config(), make_batch(rows=6, vocab=3, first=3)
    weights = hot_weights(config)
    head = weights["lm_head.weight"]
    head[:3] *= 20  # the largest logit is one of the batch's tokens
    head[2] = head[1]  # a tie: the first of the two is the likeliest
    ours = make_model(weights=weights, precision="float64", logprob_chunk=chunk).greedy_matches(batch)
    logits = numpy_hidden(config, weights, batch)[:, :-1] @ head.T
    logits[..., 2] = logits[..., 1]
    largest = np.pad(logits.argmax(-1) == batch.tokens[:, 1:], ((0, 0), (1, 0)))
    assert ours.dtype == bool
    np.testing.assert_array_equal(ours, largest & wanted(batch))
    tied = (logits.max(-1) == logits[..., 2]) & (batch.tokens[:, 1:] == 2) & wanted(batch)[:, 1:]
    assert tied.any()  # canary: "as large as the largest" would call these matches
    assert (largest & ~wanted(batch)).any()  # canary: a forgotten mask is seen
    assert (ours & wanted(batch)).any()


def test_greedy_matches_where_nothing_is_wanted(make_model, make_batch):
    assert not make_model().greedy_matches(make_batch(first=11)).any()
    with pytest.raises(ValueError, match="head 'lm'"):
        make_model(head="scalar").greedy_matches(make_batch())


def test_only_the_weights_that_are_asked_for_are_read(make_model, make_config, hot_weights, monkeypatch):
    model, read = make_model(), []
    monkeypatch.setattr(names, "host_copy", lambda array, copy=names.host_copy: read.append(array.shape) or copy(array))
    some = ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    found = model.weights(some)
    assert list(found) == some
    assert sorted(read) == [(16, 32), (32,)]
    for name, value in found.items():
        np.testing.assert_array_equal(value, hot_weights(make_config())[name].astype(np.float32))


@pytest.mark.parametrize("name", ["untied", "tied", "llama3 rope", "wide heads"])
def test_logprobs_are_those_of_transformers(make_model, make_config, hot_weights, make_batch, wanted, name):
    config = make_config(**CONFIGS[name])
    weights, batch = hot_weights(config), make_batch(first=4)
    logprobs = torch.tensor(transformers_outputs(config, weights, batch, "lm")).div(0.7).log_softmax(-1).numpy()
    expected = np.take_along_axis(logprobs[:, :-1], batch.tokens[:, 1:, None], axis=-1)[..., 0]
    expected = np.where(wanted(batch), np.pad(expected, ((0, 0), (1, 0))), 0)
    ours = make_model(config=config, weights=weights).logprobs(batch, temperature=0.7)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_scores_are_those_of_a_numpy_llama_and_of_transformers(
    make_model, make_config, hot_weights, make_batch, precision
):
    config = make_config(tie_word_embeddings=True)
    weights, batch = hot_weights(config, "scalar"), make_batch()
    ours = make_model(config=config, weights=weights, head="scalar", precision=precision).scores(batch)
    expected = (numpy_hidden(config, weights, batch) @ weights["score.weight"].T)[..., 0]
    real = batch.attention
    np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=TOLERANCE[precision])
    theirs = transformers_outputs(config, weights, batch, "scalar")
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=TOLERANCE["float32"])
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("bug", ["future leaks", "padding leaks", "eps", "positions", "no upcast", "target shifted"])
def test_canary_seeded_bugs_are_seen(make_model, make_config, hot_weights, make_batch, wanted, monkeypatch, bug):
    config = make_config()
    weights, batch = hot_weights(config), make_batch(offset=3000)
    expected = numpy_logprobs(config, weights, batch, 0.7)
    seen = batch
    if bug == "future leaks":
        monkeypatch.setattr(model, "causal_mask", lambda s, q, w: (s > 0)[:, None, None, :].expand(-1, 1, q, -1))
    elif bug == "padding leaks":
        monkeypatch.setattr(
            model, "causal_mask", lambda s, q, w: torch.ones_like(s).bool()[:, None, :, None].repeat(1, 1, 1, q).tril()
        )
    elif bug == "eps":
        config = make_config(rms_norm_eps=1e-6)
    elif bug == "positions":
        seen = make_batch(offset=0)
        seen.positions[:] = 2 * seen.positions
    elif bug == "no upcast":
        monkeypatch.setattr(
            float64.KeepFloat64, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **k or {})
        )
    elif bug == "target shifted":
        expected = np.roll(expected, 1, axis=1)
    ours = make_model(config=config, weights=weights, precision="float64").logprobs(seen, temperature=0.7)
    assert np.abs(ours - expected)[wanted(batch)].max() > 1e3 * TOLERANCE["float64"]


def test_padding_changes_nothing_and_stays_finite(make_model, make_batch, wanted):
    """A row alone and the same row beside others under padding; a row of nothing but padding."""
    ours, batch = make_model(precision="float64"), make_batch(rows=4)
    batch.attention[3] = False
    together = ours.logprobs(batch, temperature=1.0)
    assert np.isfinite(together).all()
    for row in range(3):
        real = batch.attention[row]
        alone = type(batch)(
            tokens=batch.tokens[row : row + 1, real],
            attention=np.ones((1, real.sum()), bool),
            positions=batch.positions[row : row + 1, real],
        )
        np.testing.assert_allclose(ours.logprobs(alone, temperature=1.0)[0], together[row, real], rtol=0, atol=1e-12)
    assert not together[~wanted(batch)].any()


def nll(logprobs: Any, *, weight: Any, total: float) -> Any:
    return -(logprobs * weight).sum() / total, {}


def test_gradients_are_finite_differences(make_model, make_config, hot_weights, make_batch, wanted):
    """float64, every tensor, along a random direction; tied, with padding, with a pad token that is also a real one."""
    config = make_config(tie_word_embeddings=True, pad_token_id=5)
    weights, batch = hot_weights(config), make_batch()
    batch.tokens[2, 3] = 5
    mask = wanted(batch)
    data = TrainBatch(
        tokens=batch, arrays={"weight": mask.astype(np.float32)}, denominators={"total": float(mask.sum())}
    )
    loss = Loss(function=nll, reads="logprobs", temperature=0.7)
    ours = make_model(config=config, weights=weights, precision="float64")
    gradients = ours.gradients(loss, data)
    assert gradients.keys() == weights.keys()
    rng, h = np.random.default_rng(3), 1e-5
    for name in weights:
        direction = rng.normal(size=weights[name].shape)
        values = []
        for sign in (1, -1):
            ours.load_weights({**weights, name: weights[name] + sign * h * direction})
            values.append(ours.evaluate(loss, data)["loss"])
        slope = (values[0] - values[1]) / (2 * h)
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-8), name
    assert np.abs(gradients["model.embed_tokens.weight"][5]).max() > 1e-6  # no hole for the pad token


def test_all_padding_row_has_finite_gradients(make_model, make_batch):
    batch = make_batch()
    batch.attention[3] = False
    data = TrainBatch(tokens=batch, arrays={"weight": np.ones(batch.tokens.shape)}, denominators={"total": 1.0})
    gradients = make_model().gradients(Loss(function=nll, reads="logprobs"), data)
    assert all(np.isfinite(value).all() for value in gradients.values())


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_chunk_size_changes_nothing(make_model, make_batch, wanted, chunk, precision):
    batch = make_batch(rows=6, first=3)
    mask = wanted(batch)
    data = TrainBatch(
        tokens=batch, arrays={"weight": mask.astype(np.float32)}, denominators={"total": float(mask.sum())}
    )
    loss = Loss(function=nll, reads="logprobs", temperature=1.3)
    results = [
        make_model(precision=precision, micro_batch_size=6, logprob_chunk=size) for size in (chunk, int(mask.sum()))
    ]
    one, other = (result.logprobs(batch, temperature=1.3) for result in results)
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[precision])
    one, other = (result.gradients(loss, data) for result in results)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=TOLERANCE[precision])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(("chunk", "is_bounded"), [(16, True), (10_000, False)])
def test_the_full_logits_never_exist(make_model, make_config, make_batch, wanted, chunk, is_bounded):
    """Nothing is larger than the embedding matrix, in scoring, forward and backward; with one chunk (canary) it is."""
    vocab = 2048
    config, batch = make_config(vocab_size=vocab), make_batch(rows=8, length=40, vocab=vocab)
    mask = wanted(batch)
    data = TrainBatch(tokens=batch, arrays={"weight": mask.astype(np.float32)}, denominators={"total": 1.0})
    ours = make_model(config=config, micro_batch_size=8, logprob_chunk=chunk)
    limit = vocab * config["hidden_size"]
    assert mask.sum() * vocab > 3 * limit
    for work in (
        lambda: ours.logprobs(batch, temperature=0.7),
        lambda: ours.gradients(Loss(function=nll, reads="logprobs", temperature=0.7), data),
    ):
        with Largest() as largest:
            work()
        assert (largest.elements <= limit) == is_bounded
        assert largest.elements >= limit // 2  # the mode saw something


def test_entropy_is_right_and_carries_no_gradient():
    hidden = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(10) % 6
    for chunk in (3, 100):
        logprobs, entropy = chunked_logprobs(
            hidden, targets, lambda x: x @ matrix.T, temperature=0.5, chunk=chunk, entropy=True
        )
        expected = torch.distributions.Categorical(logits=hidden @ matrix.T / 0.5)
        assert entropy is not None
        assert not entropy.requires_grad
        torch.testing.assert_close(entropy, expected.entropy().detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logprobs, expected.log_prob(targets), rtol=1e-12, atol=1e-12)


def test_first_leaves_out_earlier_columns(make_model, make_batch, wanted):
    ours = make_model()
    every, late = (ours.logprobs(make_batch(first=first), temperature=1.0) for first in (1, 6))
    np.testing.assert_allclose(late[:, 6:], every[:, 6:], rtol=0, atol=1e-6)
    assert not late[:, :6].any()
    assert every[:, 1:6].any()
    last = ours.logprobs(make_batch(first=11), temperature=1.0)  # nothing is wanted
    assert not last.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda w: w.update({"model.bias": np.ones(3)}), "left over model.bias"),
        (lambda w: w.update({"lm_head.weight": np.ones((64, 31))}), "lm_head.weight has shape"),
        (lambda w: w.update({"score.weight": np.ones((1, 32))}), "left over score.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(make_model, make_config, hot_weights, change, message):
    weights = hot_weights(make_config())
    good = make_model()
    change(weights)
    with pytest.raises(UserError, match=message):
        make_model(weights=weights)
    with pytest.raises(UserError, match=message):
        good.load_weights(weights)


@pytest.mark.parametrize(
    "changes", [{"model_type": "t5"}, {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, {"mlp_bias": True}]
)
def test_other_families_are_refused(make_model, make_config, hot_weights, changes):
    with pytest.raises(UserError):
        make_model(config=make_config(**changes), weights=hot_weights(make_config()))


def test_canary_other_rotary_frequencies_are_refused(make_model, monkeypatch):
    monkeypatch.setattr(rotary, "frequencies", lambda rope: rope_frequencies(rope) * np.float32(1.0001))
    with pytest.raises(UserError, match="rotary"):
        make_model()


def test_float64_survives_casts_down():
    x = torch.tensor([1 / 3], dtype=torch.float64)
    with float64.KeepFloat64():
        assert x.float().dtype == x.to(torch.float32).dtype == x.to(dtype=torch.float32).dtype == torch.float64
        assert torch.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert torch.tensor([1]).float().dtype == torch.float32
        assert torch.tensor([1.0]).to(torch.float32).dtype == torch.float32
    assert x.float().dtype == torch.float32
