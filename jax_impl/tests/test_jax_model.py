"""The model against transformers (float32) and against a NumPy float64 forward pass written out below.

Hot weights, ragged left padding, grouped heads, distances up to 500 positions; every comparison has canaries, seeded
bugs that must put it far beyond its tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest

from diptych.engine import Loss, TokenBatch, TrainBatch
from diptych.families.family import read_model
from diptych.families.rope import frequencies

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    "untied": {},
    "tied-mha": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "linear-mqa": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 1},
    "llama3": {"rope_scaling": LLAMA3, "head_dim": 16, "rope_theta": 500000.0},
}
TEMPERATURE = 0.7


def _oracle(config, weights, batch, *, temperature, head="lm", bug=None):
    """A Llama in NumPy float64, one row at a time without padding. `bug` seeds an error."""
    cfg = read_model(config)
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, kv_heads, size = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    eps = cfg.norm.eps * (10 if bug == "eps" else 1)

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def rotate(x, angles):  # x [T, heads, size]
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        if bug == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    result = np.zeros(batch.tokens.shape)
    for row in range(len(batch)):
        real = batch.attention[row]
        tokens, positions = batch.tokens[row][real], batch.positions[row][real].astype(np.float64)
        if bug == "positions":
            positions = positions + (positions > 3)
        angles = positions[:, None] * frequencies(cfg.ropes[0])[0].astype(np.float64)
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(cfg.num_layers):
            p = f"model.layers.{layer}."
            y = norm(x, w[p + "input_layernorm.weight"])
            q, k, v = ((y @ w[p + f"self_attn.{n}_proj.weight"].T).reshape(len(x), -1, size) for n in ("q", "k", "v"))
            q, k = rotate(q, angles), rotate(k, angles)
            group = heads // kv_heads
            k, v = (np.tile(t, (1, group, 1)) if bug == "heads" else np.repeat(t, group, 1) for t in (k, v))
            s = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
            s = np.where(np.tri(len(x), k=1 if bug == "leak" else 0, dtype=bool), s, -np.inf)
            y = np.einsum("nts,snh->tnh", softmax(s), v).reshape(len(x), -1)
            x = x + y @ w[p + "self_attn.o_proj.weight"].T
            y = norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
        x = norm(x, np.ones(cfg.hidden_size) if bug == "final-gain" else w["model.norm.weight"])
        if head == "scalar":
            result[row][real] = x @ w["score.weight"][0]
            continue
        unembed = w["model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
        logprobs = np.log(softmax(x @ unembed.T / (1 if bug == "temperature" else temperature)))
        result[row][np.flatnonzero(real)[1:]] = logprobs[np.arange(len(x) - 1), tokens[1:]]
    return result


def _hugging_face(config, weights, batch, *, scalar=False):
    """Logits (or scores) of transformers' eager model, and the model, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    changes = {"num_labels": 1} if scalar else {}  # with a pad_token_id torch would drop that row of the gradient
    hf_config = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}, **changes)
    hf_config._attn_implementation = "eager"
    model = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(hf_config)
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    model.tie_weights()
    inputs = {
        "input_ids": torch.from_numpy(batch.tokens.astype(np.int64)),
        "attention_mask": torch.from_numpy(batch.attention.astype(np.int64)),
        "position_ids": torch.from_numpy(batch.positions.astype(np.int64)),
    }
    hidden = model.model(**inputs).last_hidden_state
    return (model.score(hidden)[..., 0] if scalar else model.lm_head(hidden)), model


def _real_targets(batch: TokenBatch) -> np.ndarray:
    """Columns t >= first where both token t and the token before it are real."""
    real = batch.attention & np.roll(batch.attention, 1, axis=1)
    return real & (np.arange(batch.tokens.shape[1]) >= batch.first)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_logprobs_equal_the_numpy_forward(case, precision, tiny_model, tiny_config, hot_weights, ragged_batch):
    batch = ragged_batch(3, 20)
    config = tiny_config(**CASES[case])
    weights = hot_weights(config, "lm")
    found = tiny_model(precision, **CASES[case], logprob_chunk=17).logprobs(batch, temperature=TEMPERATURE)
    assert found.dtype == precision
    real = _real_targets(batch)
    want = _oracle(config, weights, batch, temperature=TEMPERATURE)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[real], want[real], rtol=0, atol={"float32": 2e-5, "float64": 1e-12}[precision])


@pytest.mark.parametrize("bug", ["eps", "interleaved", "positions", "heads", "leak", "final-gain", "temperature"])
def test_canary_the_numpy_forward_sees_seeded_bugs(bug, tiny_config, hot_weights, ragged_batch):
    batch = ragged_batch(3, 20)
    config = tiny_config()
    weights = hot_weights(config, "lm")
    right, wrong = (_oracle(config, weights, batch, temperature=TEMPERATURE, bug=b) for b in (None, bug))
    assert np.abs(right - wrong)[_real_targets(batch)].max() > 10 * 2e-5


@pytest.mark.parametrize("case", CASES)
def test_logprobs_equal_transformers(case, tiny_model, tiny_config, hot_weights, ragged_batch):
    batch = ragged_batch(4, 20, first=3)
    config = tiny_config(**CASES[case])
    logprobs, _ = _hugging_face_logprobs(config, hot_weights(config, "lm"), batch)
    found = tiny_model(**CASES[case]).logprobs(batch, temperature=TEMPERATURE)
    assert (found[:, :3] == 0).all()
    want, real = np.pad(logprobs.detach().numpy(), ((0, 0), (1, 0))), _real_targets(batch)
    np.testing.assert_allclose(found[real], want[real], rtol=0, atol=2e-5)


def _hugging_face_logprobs(config, weights, batch):
    import torch

    logits, hf_model = _hugging_face(config, weights, batch)
    targets = torch.from_numpy(batch.tokens[:, 1:].astype(np.int64))
    return torch.log_softmax(logits[:, :-1] / TEMPERATURE, -1).gather(-1, targets[..., None])[..., 0], hf_model


# Tied and untied, grouped and not; two micro-batches and several chunks of the vocabulary's tokens in the second.
@pytest.mark.parametrize(
    ("case", "cuts"),
    [("tied-mha", {}), ("untied", {"micro_batch_size": 2, "logprob_chunk": 9})],
    ids=["tied", "untied"],
)
def test_gradients_equal_transformers(case, cuts, tiny_model, tiny_config, hot_weights, ragged_batch):
    import torch

    batch = ragged_batch(4, 20, first=3)
    config = tiny_config(**CASES[case])
    model = tiny_model(**CASES[case], **cuts)
    real = _real_targets(batch)
    factors = np.where(real, np.random.default_rng(5).normal(0, 1, real.shape), 0).astype(np.float32)
    logprobs, hf_model = _hugging_face_logprobs(config, hot_weights(config, "lm"), batch)
    ((logprobs * torch.from_numpy(factors[:, 1:])).sum() / 7.0).backward()
    loss = Loss(function=_weighted_sum, reads="logprobs", temperature=TEMPERATURE)
    gradients = model.gradients(loss, TrainBatch(tokens=batch, arrays={"factors": factors}, denominators={"num": 7.0}))
    _compare_gradients(gradients, hf_model)


def test_scores_and_gradients_equal_transformers(tiny_model, tiny_config, hot_weights, ragged_batch):
    import torch

    batch = ragged_batch(4, 20)
    config = tiny_config(tie_word_embeddings=True)
    weights = hot_weights(config, "scalar")
    model = tiny_model(head="scalar", tie_word_embeddings=True)
    factors = np.where(batch.attention, np.random.default_rng(5).normal(0, 1, batch.tokens.shape), 0).astype(np.float32)

    scores, hf_model = _hugging_face(config, weights, batch, scalar=True)
    real = batch.attention
    found = model.scores(batch)
    np.testing.assert_allclose(found[real], scores.detach().numpy()[real], rtol=0, atol=2e-5)
    oracle = _oracle(config, weights, batch, temperature=1, head="scalar")
    np.testing.assert_allclose(
        tiny_model("float64", head="scalar", tie_word_embeddings=True).scores(batch)[real], oracle[real], atol=1e-12
    )

    ((scores * torch.from_numpy(factors)).sum() / 7.0).backward()
    loss = Loss(function=_weighted_sum, reads="scores")
    gradients = model.gradients(loss, TrainBatch(tokens=batch, arrays={"factors": factors}, denominators={"num": 7.0}))
    _compare_gradients(gradients, hf_model)


@pytest.mark.parametrize("case", ["untied", "llama3"])
def test_long_positions(case, tiny_model, tiny_config, hot_weights, ragged_batch):
    batch = ragged_batch(2, 500, first=400)
    config = tiny_config(**CASES[case])
    weights = hot_weights(config, "lm")
    real = _real_targets(batch)
    logits, _ = _hugging_face(config, weights, batch)
    log_softmax = logits.detach().log_softmax(-1).numpy()
    want = np.take_along_axis(log_softmax[:, :-1], batch.tokens[:, 1:, None], -1)[..., 0]
    found = tiny_model(**CASES[case], logprob_chunk=64).logprobs(batch, temperature=1.0)
    np.testing.assert_allclose(found[:, 1:][real[:, 1:]], want[real[:, 1:]], rtol=0, atol=2e-5)
    if case == "llama3":  # canary: without the scaling the same weights say something else
        plain = tiny_model(head_dim=16, rope_theta=500000.0, logprob_chunk=64).logprobs(batch, temperature=1.0)
        assert np.abs(plain - found)[real].max() > 1e-2


def test_float64_gradient_is_the_slope_of_the_loss(tiny_model, sft, sft_batch):
    model, batch = tiny_model("float64"), sft_batch()
    gradients, weights = model.gradients(sft, batch), model.weights()
    draws = np.random.default_rng(6)
    direction = {name: draws.normal(0, 1, w.shape) for name, w in weights.items()}
    values = []
    for step in (1e-5, -1e-5):
        model.load_weights({name: w + step * direction[name] for name, w in weights.items()})
        values.append(model.evaluate(sft, batch)["loss"])
    slope = (values[0] - values[1]) / 2e-5
    along = sum(float((gradients[name] * direction[name]).sum()) for name in weights)
    assert abs(slope - along) < 1e-6 * abs(along)
    assert abs(slope + along) > 1e-3 * abs(along)  # canary: a flipped sign is seen


def test_padding_reaches_neither_values_nor_gradients(tiny_model, ragged_batch):
    batch = ragged_batch(4, 20, first=3)
    other_tokens = np.where(batch.attention, batch.tokens, (batch.tokens + 17) % 64).astype(np.int32)
    other = TokenBatch(tokens=other_tokens, attention=batch.attention, positions=batch.positions, first=3)
    factors = np.where(_real_targets(batch), 1.0, 0).astype(np.float32)
    loss = Loss(function=_weighted_sum, reads="logprobs", temperature=TEMPERATURE)
    model = tiny_model(micro_batch_size=2, logprob_chunk=9)
    a, b = (
        model.gradients(loss, TrainBatch(tokens=t, arrays={"factors": factors}, denominators={"num": 1.0}))
        for t in (batch, other)
    )
    for name, gradient in a.items():
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient, b[name], err_msg=name)
    everywhere, columns = np.ones_like(batch.attention), np.arange(20, dtype=np.int32)
    unmasked = TokenBatch(tokens=other_tokens, attention=everywhere, positions=columns * everywhere, first=3)
    leaked = model.logprobs(unmasked, temperature=1.0) - model.logprobs(batch, temperature=1.0)
    assert np.abs(leaked[_real_targets(batch)]).max() > 1e-3  # canary: with the mask ignored, padding shows


def _weighted_sum(outputs, *, factors, num):
    return (outputs * factors).sum() / num, {}


def _compare_gradients(found: dict[str, np.ndarray], hf_model) -> None:
    wanted = {name: p.grad.numpy().astype(np.float64) for name, p in hf_model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape
        error = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
        assert error < 2e-5, f"{name}: relative L2 {error}"
        # Canary: the same numbers in another order would be seen.
        assert np.linalg.norm(np.flip(want) - want) / np.linalg.norm(want) > 1e-2, name
