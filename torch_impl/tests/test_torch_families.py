"""Every family against the plain transformers model of the same checkpoint, in float64."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from diptych.engine import Loss, OptimizerSpec, PromptBatch, Sampling, TokenBatch
from diptych.errors import UserError
from diptych.families.decoder import Experts, Norm
from diptych.families.family import read_model, supported_families, tensor_shapes
from diptych_torch import attention, decode, experts, model, training
from diptych_torch.experts import compute_experts
from diptych_torch.float64 import KeepFloat64
from torch_impl.tests.plain import (
    CASES,
    LENGTH,
    TOLERANCE,
    VOCAB,
    WINDOW,
    Plain,
    PlainRNN,
    hot,
    ragged,
    read_plain,
    weighted,
    weighted_batch,
)


def test_every_family_is_here():
    assert {config["model_type"] for config in CASES.values()} == set(supported_families())


@pytest.fixture
def make_plain(tmp_path: Path) -> Callable[..., Any]:
    def make(config: dict[str, Any], weights: dict[str, np.ndarray], head: str = "lm") -> Any:
        return PlainRNN(config, weights) if config["model_type"] == "rnn" else Plain(config, weights, head, tmp_path)

    return make


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_weights_are_those_of_the_plain_model(make_model, make_plain, name, head):
    config, tolerance = CASES[name], TOLERANCE.get(name, 1e-12)
    weights, batch = hot(config, head), ragged()
    ours = make_model(config=config, weights=weights, head=head, precision="float64")
    plain = make_plain(config, weights, head)
    found = ours.logprobs(batch, temperature=1.0) if head == "lm" else ours.scores(batch)
    expected = read_plain(plain, batch, head)
    np.testing.assert_allclose(found[batch.attention], expected.detach()[batch.attention], rtol=0, atol=tolerance)
    assert expected.detach().abs().max() > (3 if head == "lm" else 0.2)  # the model is hot

    data = weighted_batch(batch)
    weighted(expected, weight=torch.tensor(data.arrays["weight"]), **data.denominators)[0].backward()
    gradients = ours.gradients(Loss(function=weighted, reads="logprobs" if head == "lm" else "scores"), data)
    theirs = plain.gradients()
    assert gradients.keys() == weights.keys() == theirs.keys()
    for tensor, value in theirs.items():
        # Biases that shift all logits of a softmax alike have gradients of 0, in rounding.
        scale = max(np.linalg.norm(value), 1e-4)
        assert np.linalg.norm(gradients[tensor] - value) < 10 * tolerance * scale, tensor

    assert list(ours.weights()) == list(weights)
    for tensor, value in ours.weights().items():
        assert value.tobytes() == weights[tensor].tobytes(), tensor


class OneAtATime(Mapping[str, np.ndarray]):
    """A mapping that makes a tensor when it is asked for, and sees to it that the last one is gone by then."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights
        self.last: Callable[[], Any] = lambda: None

    def __getitem__(self, name: str) -> np.ndarray:
        assert self.last() is None, "a tensor is kept"
        array = self.weights[name].copy()
        self.last = weakref.ref(array)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_model_is_built_tensor_by_tensor(make_model, name):
    weights = hot(CASES[name])
    lazy = OneAtATime(weights)
    ours = make_model(config=CASES[name], weights=lazy, precision="float64")
    for tensor, value in ours.weights().items():
        np.testing.assert_array_equal(value, weights[tensor])
    kept = lazy["lm_head.weight" if name == "mixtral" else "transformer.wpe.weight"]
    with pytest.raises(AssertionError, match="a tensor is kept"):  # canary
        lazy["model.norm.weight"]
    del kept
    lost = {tensor: value for tensor, value in weights.items() if "ln_f" not in tensor and "model.norm" not in tensor}
    with pytest.raises(UserError, match="missing"):
        make_model(config=CASES[name], weights=OneAtATime(lost))
    misshapen = {tensor: value[:-1] if value.shape[0] == VOCAB else value for tensor, value in weights.items()}
    with pytest.raises(UserError, match="has shape"):
        make_model(config=CASES[name], weights=OneAtATime(misshapen))


def how(**changes: Any) -> Sampling:
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 9, "stop_token_ids": (5,)}
    return Sampling(**{**settings, **changes})


def left_padded(batch: TokenBatch, width: int = 14) -> PromptBatch:
    """The last columns of a batch: ragged, longer than a window."""
    attention = batch.attention[:, -width:]
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0).astype(np.int32)
    return PromptBatch(tokens=batch.tokens[:, -width:], attention=attention, positions=positions)


@pytest.mark.parametrize("name", [name for name in CASES if "longrope" not in name and "dynamic" not in name])
def test_decoding_is_the_full_forward_and_prefill_splits_anywhere(make_model, name):
    config = CASES[name]
    ours = make_model(config=config, weights=hot(config), precision="float64", micro_batch_size=4)
    prompts, device = left_padded(ragged()), torch.device("cpu")
    noise = np.random.default_rng(1).random((4, 9), dtype=np.float32)
    for sampling, prefill in ((how(), 5), (how(temperature=1.5), 13), (how(temperature=1.5), 1)):
        done = ours.generate(prompts, sampling, noise, pad_token_id=2)
        pieces = decode.generate(
            ours._network, prompts, sampling, noise, pad_token_id=2, device=device, prefill=prefill
        )
        np.testing.assert_array_equal(pieces.tokens, done.tokens)
        np.testing.assert_allclose(pieces.logprobs, done.logprobs, rtol=0, atol=1e-12)
        real = np.concatenate([prompts.attention, done.mask], axis=1)
        whole = TokenBatch(
            tokens=np.concatenate([prompts.tokens, done.tokens], axis=1),
            attention=real,
            positions=(np.maximum(real.cumsum(axis=1) - 1, 0) * real).astype(np.int32),
            first=14,
        )
        again = ours.logprobs(whole, temperature=sampling.scoring_temperature)[:, 14:]
        np.testing.assert_allclose(done.logprobs[done.mask], again[done.mask], rtol=0, atol=1e-12)
        if sampling.temperature > 0:
            assert len(np.unique(done.tokens)) > 8
            continue
        with torch.no_grad():
            tokens, where = (torch.tensor(array, dtype=torch.int64) for array in (whole.tokens, whole.positions))
            hidden = ours._network.hidden_states(tokens, where, torch.tensor(real))[:, 13:-1]
            greedy = ours._network.logits(hidden.flatten(0, 1)).argmax(dim=-1).view(4, 9).numpy()
        np.testing.assert_array_equal(greedy[done.mask], done.tokens[done.mask])


@pytest.mark.parametrize(
    ("name", "message"),
    [("phi3, longrope", "longrope RoPE"), ("llama, dynamic", "dynamic RoPE"), ("gpt2", "64 positions")],
)
def test_text_that_would_outgrow_the_positions_is_refused(make_model, name, message):
    ours = make_model(config=CASES[name], weights=hot(CASES[name]), precision="float64", micro_batch_size=4)
    longest = {"phi3, longrope": 2, "llama, dynamic": 6, "gpt2": 50}[name]
    prompts, noise = left_padded(ragged()), np.zeros((4, longest + 1), np.float32)
    ours.generate(prompts, how(max_new_tokens=longest), noise[:, 1:], pad_token_id=2)
    with pytest.raises(UserError, match=message):
        ours.generate(prompts, how(max_new_tokens=longest + 1), noise, pad_token_id=2)


def test_positions_without_a_row_are_refused(make_model):
    ours = make_model(config=CASES["opt"], weights=hot(CASES["opt"]), precision="float64")
    batch = ragged()
    batch.positions[0, -1] = 64
    with pytest.raises(ValueError, match="positions"):
        ours.logprobs(batch, temperature=1.0)


# -- canaries ---------------------------------------------------------------------------------------------------------


def _softcap(network: Any, patch: Any) -> None:
    del network
    AttentionInterface.register(attention.NAME, lambda *a, **k: attention.attend(*a, **{**k, "softcap": None}))


def _eps(network: Any, patch: Any) -> None:
    del patch
    for module in network.modules():
        for name in {"eps", "variance_epsilon"} & set(vars(module)):
            setattr(module, name, 1.1 * getattr(module, name))


def _window(network: Any, patch: Any) -> None:
    del network
    mask = attention.causal_mask
    patch.setattr(model, "causal_mask", lambda a, q, w: mask(a, q, w and w + 1))


def _window_in_every_layer(network: Any, patch: Any) -> None:
    patch.setattr(network, "config", replace(network.config, windows=(WINDOW,) * 2))


def _embedding_scale(network: Any, patch: Any) -> None:
    embedding = network.transformer.get_input_embeddings()
    patch.setattr(embedding, "embed_scale", embedding.embed_scale.float())


def _ropes_swapped(network: Any, patch: Any) -> None:
    rotary = network.trunk.rotary_emb
    patch.setattr(rotary, "rope_of_type", {name: 1 - index for name, index in rotary.rope_of_type.items()})


def _attention_factor(network: Any, patch: Any) -> None:
    rotary = network.trunk.rotary_emb
    patch.setattr(rotary, "ropes", tuple(replace(rope, attention_factor=1.0) for rope in rotary.ropes))


def _alibi(network: Any, patch: Any) -> None:
    del network
    patch.setattr(model, "alibi", lambda *inputs: attention.alibi(*inputs) * 0)


def _last_expert_lost(network: Any, patch: Any) -> None:
    del network
    patch.setattr(
        experts.ExpertsInterface,
        "_global_mapping",
        {**experts.ExpertsInterface._global_mapping, experts.NAME: lambda m, x, i, w: compute_experts(
            m, x, i[:, :1].contiguous(), w[:, :1]
        )},
    )  # fmt: skip


def _padding_read(network: Any, patch: Any) -> None:
    for layer in network.trunk.layers:
        forward = layer.forward
        patch.setattr(layer, "forward", lambda x, a, g, s, f=forward: f(x, torch.ones_like(a), torch.ones_like(g), s))


def _logit_softcap(network: Any, patch: Any) -> None:
    patch.setattr(network, "config", replace(network.config, logit_softcap=None))


def _positions_from_one(network: Any, patch: Any) -> None:
    forward = network.hidden_states
    patch.setattr(network, "hidden_states", lambda t, p, a, c=None: forward(t, p + 1, a, c))


def _activation(network: Any, patch: Any) -> None:
    for module in network.modules():
        if hasattr(module, "gelu_impl"):
            patch.setattr(module, "gelu_impl", torch.nn.GELU(approximate="tanh"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("opt", {"norm": Norm(kind="layer", eps=1e-6)}), ("olmo2", {"norm": Norm(kind="rms", eps=1e-6)}),
        ("gpt2", {"activation": "gelu"}), ("gpt_neox", {"activation": "gelu_tanh"}),
        ("bloom", {"activation": "gelu_tanh"}), ("phi3", {"activation": "relu"}), ("opt", {"attention_scale": 1.0}),
        ("gemma2", {"attention_scale": 0.25}), ("gemma2", {"attention_softcap": None}),
        ("qwen3_moe", {"experts": Experts(count=6, top_k=2, inner=16, normalized=False)}),
        ("mixtral", {"experts": Experts(count=5, top_k=1, inner=40, normalized=True)}),
    ],
    ids=str,
)  # fmt: skip
def test_canary_a_config_that_transformers_reads_in_another_way_is_refused(make_model, monkeypatch, name, changes):
    monkeypatch.setattr(model, "read_model", lambda config: replace(read_model(config), **changes))
    with pytest.raises(UserError, match="in transformers"):
        make_model(config=CASES[name], weights=hot(CASES[name]))


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    AttentionInterface.register(attention.NAME, attention.attend)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("gemma2", _softcap), ("gemma2", _logit_softcap), ("gemma2", _embedding_scale), ("gemma2", _window),
        ("mistral", _window), ("qwen2", _window), ("qwen2", _window_in_every_layer), ("gemma3_text", _ropes_swapped),
        ("llama, yarn", _attention_factor), ("bloom", _alibi), ("bloom", _activation), ("mixtral", _last_expert_lost),
        ("rnn", _padding_read), ("opt", _positions_from_one), ("gpt2", _positions_from_one), ("opt", _eps),
        ("gpt_neox", _eps), ("gemma3_text", _eps), ("olmo2", _eps),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_canary_seeded_bugs_are_seen(make_model, make_plain, monkeypatch, restored, name, bug):
    config = CASES[name]
    weights, batch = hot(config), ragged()
    ours = make_model(config=config, weights=weights, precision="float64")
    bug(ours._network, monkeypatch)
    found = ours.logprobs(batch, temperature=1.0)
    expected = read_plain(make_plain(config, weights), batch, "lm").detach().numpy()
    assert np.abs(found - expected)[batch.attention].max() > 100 * 1e-12


@pytest.mark.parametrize("name", ["bloom", "gpt2", "rnn"])
def test_canary_a_memory_that_is_off_is_seen(make_model, monkeypatch, name):
    """Positions that stand still in the cache, or a state that a prefill in pieces starts anew."""
    ours = make_model(config=CASES[name], weights=hot(CASES[name]), precision="float64")
    forward = ours._network.hidden_states

    def broken(tokens: Any, positions: Any, attention: Any, cache: Any = None) -> Any:
        if cache is not None and name == "rnn":
            cache.layers = [layer * 0 for layer in cache.layers]
        return forward(tokens, positions if len(attention[0]) <= 14 else positions * 0 + 9, attention, cache)

    given = (left_padded(ragged()), how(temperature=1.5), np.full((4, 9), 0.7, np.float32))
    settings = {"pad_token_id": 2, "device": torch.device("cpu"), "prefill": 5}
    right = decode.generate(ours._network, *given, **settings)
    monkeypatch.setattr(ours._network, "hidden_states", broken)
    assert np.abs(decode.generate(ours._network, *given, **settings).logprobs - right.logprobs).max() > 1e-6


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_canary_a_misplaced_tensor_is_seen(make_model, make_plain, name):
    """The map between names is not symmetric: two tensors of one shape, exchanged, show."""
    config = CASES[name]
    weights, batch = hot(config), ragged()
    prefix = "model.layers.1.block_sparse_moe.experts."
    pair = ("embed_out.weight", "gpt_neox.embed_in.weight") if name == "gpt_neox" else (
        f"{prefix}1.w1.weight", f"{prefix}1.w3.weight"
    )  # fmt: skip
    other = {**weights, pair[0]: weights[pair[1]], pair[1]: weights[pair[0]]}
    found = make_model(config=config, weights=other, precision="float64").logprobs(batch, temperature=1.0)
    expected = read_plain(make_plain(config, weights), batch, "lm").detach().numpy()
    assert np.abs(found - expected)[batch.attention].max() > 1e-6


# -- experts ----------------------------------------------------------------------------------------------------------


def balance_of_transformers(plain: Any, batch: TokenBatch, config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The balance loss of a whole batch from transformers' router logits of unpadded rows: by Fedus et al. 2022, eq. 4
    to 6, in float64, and by transformers' function, which rounds the fractions of tokens to float32."""
    logits = []
    for tokens, real in zip(batch.tokens, batch.attention, strict=True):
        row = torch.tensor(tokens[real], dtype=torch.int64)[None]
        with KeepFloat64():
            logits.append(plain.trunk(input_ids=row, output_router_logits=True).router_logits)
    layers: Any = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    count: Any
    count, top_k = config.get("num_experts", config.get("num_local_experts")), config["num_experts_per_tok"]
    routed = torch.cat(layers).softmax(dim=-1)
    chosen = torch.nn.functional.one_hot(routed.topk(top_k, dim=-1).indices, count).sum(dim=1).double()
    with KeepFloat64():
        theirs: Any = load_balancing_loss_func(layers, count, top_k)
    return count * (chosen.mean(dim=0) * routed.mean(dim=0)).sum(), float(theirs.detach())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, not normalised"])
def test_the_balance_loss_is_that_of_transformers_for_any_micro_batch(make_model, make_plain, name):
    config = CASES[name]
    weights, data = hot(config), weighted_batch(ragged(6))
    plain = make_plain(config, weights)
    exact, theirs = balance_of_transformers(plain, data.tokens, config)
    (0.3 * exact).backward()
    balance = float(exact.detach())
    assert balance == pytest.approx(theirs, rel=1e-6)
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    expected = {name: dict(plain.model.named_parameters())[name].grad.numpy() for name in routers}
    nothing = Loss(function=lambda outputs, **_: (outputs.sum() * 0, {}), reads="logprobs", balance=0.3)
    both = Loss(function=weighted, reads="logprobs", balance=0.3)
    results = []
    for size in (1, 3, 6):
        ours = make_model(config=config, weights=weights, precision="float64", micro_batch_size=size)
        metrics = ours.evaluate(nothing, data)
        assert metrics["router/balance_loss"] == pytest.approx(balance, rel=1e-12)
        assert metrics["loss"] == pytest.approx(0.3 * metrics["router/balance_loss"], rel=1e-13)
        assert 1 < metrics["router/load_max"] < 5
        gradients = ours.gradients(nothing, data)
        for router, value in expected.items():
            found = gradients[router.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else router]
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-11 * np.abs(value).max())
        results.append((metrics | ours.evaluate(both, data), ours.gradients(both, data)))
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-12)
        for tensor, value in gradients.items():
            np.testing.assert_allclose(value, results[0][1][tensor], rtol=0, atol=1e-14)


def test_canary_fractions_of_a_micro_batch_alone_are_seen(make_model, monkeypatch):
    config, data = CASES["mixtral"], weighted_batch(ragged(6))
    nothing = Loss(function=lambda outputs, **_: (outputs.sum() * 0, {}), reads="logprobs", balance=1.0)
    ours = make_model(config=config, weights=hot(config), precision="float64", micro_batch_size=2)
    right = ours.evaluate(nothing, data)["loss"]
    monkeypatch.setattr(training, "_choices", lambda *_: None)
    assert abs(ours.evaluate(nothing, data)["loss"] - right) > 1e-3


@pytest.mark.parametrize(("name", "stage"), [("mixtral", 2), ("mixtral", 3), ("rnn", 3), ("bloom", 3)])
def test_training_works_at_every_zero_stage(make_model, monkeypatch, name, stage):
    """Two updates with state and average under the checkpoint's names; the stages agree (float32)."""
    from diptych_torch import zero

    monkeypatch.setattr(zero, "PERSISTENCE_THRESHOLD", 0)
    config, data = CASES[name], weighted_batch(ragged())
    spec = OptimizerSpec(name="adamw", eps=1e-3, ema_decay=0.5)
    loss = Loss(function=weighted, reads="logprobs", balance=0.1)
    results = []
    for one in (0, stage):
        ours = make_model(config=config, weights=hot(config), optimizer=spec, stage=one)
        for _ in range(2):
            metrics = ours.update(loss, data, learning_rate=1e-3)
        assert ("router/balance_loss" in metrics) == (name == "mixtral")
        state = ours.optimizer_state()
        shapes = tensor_shapes(read_model(config), "lm")
        for tensors in (ours.weights(), ours.ema_weights(), state.first, state.second):
            assert {tensor: value.shape for tensor, value in tensors.items()} == shapes
        twin = make_model(config=config, weights=ours.weights(), optimizer=spec, stage=one)
        twin.load_optimizer_state(state)
        for again in (ours, twin):
            again.update(loss, data, learning_rate=1e-3)
        for tensor, value in ours.weights().items():
            np.testing.assert_allclose(twin.weights()[tensor], value, rtol=0, atol=1e-6)
        results.append(ours.weights())
        moved = {tensor: np.abs(value - hot(config)[tensor]).max() for tensor, value in results[-1].items()}
        assert min(moved.values()) > 1e-6, moved  # every tensor is trained
    for tensor, value in results[0].items():
        np.testing.assert_allclose(results[-1][tensor], value, rtol=0, atol=2e-6)


def test_experts_without_tokens_have_gradients_of_zero():
    class Held(torch.nn.Module):
        num_experts = 3
        act_fn = staticmethod(torch.nn.functional.silu)

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 4, generator=generator, dtype=torch.float64))
            self.down_proj = torch.nn.Parameter(torch.randn(3, 4, 4, generator=generator, dtype=torch.float64))

    held, x = Held(), torch.ones(2, 4, dtype=torch.float64)
    compute_experts(
        held, x, torch.tensor([[2, 0], [0, 2]]), torch.full((2, 2), 0.5, dtype=torch.float64)
    ).sum().backward()
    for weight in (held.gate_up_proj, held.down_proj):
        assert weight.grad is not None
        assert not weight.grad[1].any()
        assert weight.grad[0].any()
        assert weight.grad[2].any()


# -- the recurrent model as a transformers model ----------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_recurrent_model_is_a_transformers_model(make_model, tmp_path, head):
    """Read from a directory by the Auto classes, with a 2D mask; written and read again; in two pieces."""
    config = CASES["rnn"]
    weights, batch = hot(config, head), ragged()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 1}))
    classes: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    theirs = classes.from_pretrained(tmp_path, dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "again")
    theirs = classes.from_pretrained(tmp_path / "again", dtype=torch.float64)
    tokens, mask = torch.tensor(batch.tokens, dtype=torch.int64), torch.tensor(batch.attention, dtype=torch.int64)
    logits = theirs(input_ids=tokens, attention_mask=mask).logits.detach()
    ours = make_model(config=config, weights=weights, head=head, precision="float64")
    if head == "scalar":
        np.testing.assert_allclose(logits[:, 0], ours.scores(batch)[:, -1], rtol=0, atol=1e-12)
    else:
        found = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0].numpy()
        real = batch.attention[:, 1:] & batch.attention[:, :-1]
        expected = ours.logprobs(batch, temperature=1.0)[:, 1:]
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-12)
        first = theirs(input_ids=tokens[:, :9], attention_mask=mask[:, :9], use_cache=True)
        rest = theirs(input_ids=tokens[:, 9:], attention_mask=mask, past_key_values=first.past_key_values)
        np.testing.assert_allclose(rest.logits.detach(), logits[:, 9:], rtol=0, atol=1e-12)
        assert first.past_key_values.get_seq_length() == LENGTH
