"""Seeded bugs: each must put the very comparison of test_families.py far beyond its limit, in float32's too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.engine import Completions, Sampling, TokenBatch
from diptych.parity.tolerances import TOLERANCES
from parity_tests.families import (
    CASES,
    NEW,
    PROMPTS,
    hot_weights,
    left_padded,
    loss_of,
    prompt_batch,
    targets,
    train_batch,
    vanishing_gradients,
)  # fmt: skip
from parity_tests.family_checks import (
    ENGINES,
    build,
    bytes_differ,
    cache_error,
    gradient_error,
    output_error,
    outputs,
    outputs_and_gradients,
    quick_compilation,
    tokens_differ,
)  # fmt: skip
from parity_tests.plain_models import plain_model

LLAMA, Q, K, O = (
    "model.layers.0.self_attn.", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
)  # fmt: skip


def config(**changes: Any):
    return lambda case, weights, batch: ({**case, **changes}, weights, batch)


def weights(change):
    return lambda case, held, batch: (case, change(dict(held)), batch)


def positions(change):
    def changed(case, held, batch):
        moved = np.where(batch.attention, change(batch.positions), 0).astype(np.int32)
        return case, held, TokenBatch(tokens=batch.tokens, attention=batch.attention, positions=moved)

    return changed


def interleave(held):
    """Rows of query and key as if neighbouring columns of a head were a pair, not the columns of its two halves."""
    for name in (Q, K):
        heads = held[name].reshape(-1, 8, held[name].shape[1])
        held[name] = heads.reshape(-1, 2, 4, heads.shape[2]).swapaxes(1, 2).reshape(held[name].shape).copy()
    return held


def transposed(held):
    assert held[O].shape[0] == held[O].shape[1]
    return held | {O: held[O].T.copy()}


def without(name):
    return lambda held: held | {name: np.zeros_like(held[name])}


def exchanged(a, b):
    return lambda held: held | {a: held[b], b: held[a]}


BUGS = {
    "gelu kind": ("gpt2", config(activation_function="gelu")),
    "gelu cut short": ("gpt_neox, sequential", config(hidden_act="gelu")),
    "rms eps": ("llama", config(rms_norm_eps=1e-6)),
    "layer eps": ("gpt_neox", config(layer_norm_eps=1e-6)),
    "rope base": ("llama", config(rope_theta=10000.0)),
    "local rope base": ("gemma3_text", config(rope_local_base_freq=1e6)),
    "rope layout": ("llama", weights(interleave)),
    "rope scaling dropped": ("llama, yarn", config(rope_scaling=None)),
    "partial rotary": ("phi3", config(partial_rotary_factor=1.0)),
    "short factors past the limit": ("phi3, longrope", config(original_max_position_embeddings=512)),
    "positions skip one": ("llama", positions(lambda p: p + (p > 3))),
    "positions from one": ("opt", positions(lambda p: p + 1)),
    "transposed square projection": ("llama", weights(transposed)),
    "attention softcap dropped": ("gemma2", config(attn_logit_softcapping=None)),
    "logit softcap dropped": ("gemma2", config(final_logit_softcapping=None)),
    "window one too wide": ("mistral", config(sliding_window=6)),
    "window one too narrow": ("mistral", config(sliding_window=4)),
    "window in every layer": ("qwen2, window", config(max_window_layers=0)),
    "missing attention bias": ("llama, bias, tied", weights(without(LLAMA + "v_proj.bias"))),
    "missing mlp bias": ("gpt2", weights(without("transformer.h.0.mlp.c_fc.bias"))),
    "experts not normalised": ("qwen3_moe", config(norm_topk_prob=False)),
    "gate and up exchanged": (
        "mixtral",
        weights(exchanged(*(f"model.layers.0.block_sparse_moe.experts.1.w{n}.weight" for n in (1, 3)))),
    ),
    "nonlinearity": ("rnn", config(nonlinearity="relu")),
}


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def short_batch() -> TokenBatch:
    """Past a window of 5 and a limit of 48, and short."""
    tokens, real, where = left_padded((52, 40), 52, "canary")
    return TokenBatch(tokens=tokens, attention=real, positions=where)


def right_and_wrong(name, bug):
    case, batch = CASES[name], short_batch()
    held = hot_weights(case, "lm", "float64")
    expected = outputs_and_gradients(plain_model(case, held, "lm"), batch)
    return case, held, batch, expected, bug(case, held, batch)


@pytest.mark.parametrize("bug", BUGS)
def test_canary_a_wrong_model_is_seen(bug):
    """On torch all bugs; on JAX one of each class, to save compilations."""
    name, seed = BUGS[bug]
    case, held, batch, (expected, _), wrong = right_and_wrong(name, seed)
    for engine in ENGINES if bug in ON_BOTH else ("torch",):
        error = output_error(outputs(build(engine, *wrong[:2]), wrong[2]), expected, targets(batch))
        assert TOLERANCES["model"].float32 < error < np.inf
    right = output_error(outputs(build("torch", case, held), batch), expected, targets(batch))
    assert right <= TOLERANCES["model"].float64


# gelu kind, eps, RoPE base, RoPE layout, position, transposed projection,
# softcap, window, bias.
ON_BOTH = (
    "gelu kind", "rms eps", "rope base", "rope layout", "positions skip one", "positions from one",
    "transposed square projection", "attention softcap dropped", "window one too wide", "missing attention bias",
)  # fmt: skip


@pytest.mark.parametrize("bug", ["rms eps", "window one too narrow", "transposed square projection"])
def test_canary_gradients_of_a_wrong_model_are_seen(bug):
    name, seed = BUGS[bug]
    _, _, _, (_, expected), wrong = right_and_wrong(name, seed)
    found = build("torch", *wrong[:2]).gradients(loss_of("lm"), train_batch(wrong[2], "lm"))
    assert TOLERANCES["gradient_relative_l2"].float32 < gradient_error(found, expected) < np.inf


def test_canary_one_wrong_leaf_is_seen():
    case, batch = CASES["gpt2"], short_batch()
    _, right = outputs_and_gradients(plain_model(case, hot_weights(case, "lm", "float64"), "lm"), batch)
    vanishing = vanishing_gradients(case)
    assert gradient_error(right, right, vanishing=vanishing) < 1e-15
    tolerated = TOLERANCES["gradient_relative_l2"].float32
    for name, value in right.items():
        flipped = right | {name: -value if name not in vanishing else value + 1e-3}
        assert gradient_error(flipped, right, vanishing=vanishing) > tolerated, name
        lost = {other: kept for other, kept in right.items() if other != name}
        assert gradient_error(lost, right, vanishing=vanishing) == np.inf, name
    transposed = "transformer.h.0.attn.c_proj.weight"
    assert gradient_error(right | {transposed: right[transposed].T}, right, vanishing=vanishing) > tolerated


def test_canary_one_bit_of_a_weight_is_seen():
    held = hot_weights(CASES["qwen2"], "lm", "float32")
    assert bytes_differ({name: value.copy() for name, value in held.items()}, held) == 0
    name = "model.layers.1.mlp.up_proj.weight"
    changed = held[name].copy()
    changed[3, 4] = np.nextafter(changed[3, 4], np.float32(2))
    assert bytes_differ(held | {name: changed}, held) == 1
    assert bytes_differ(held | {name: held[name].astype(np.float64)}, held) == 1
    assert bytes_differ(dict(reversed(held.items())), held) == len(held)


def test_canary_a_wrong_cache_and_a_wrong_token_are_seen(monkeypatch):
    """Keys written one column late; positions that stand still; a token changed."""
    import diptych_torch.slots as slots

    case = CASES["llama"]
    model: Any = build("torch", case, hot_weights(case, "lm", "float64"))
    how = Sampling(temperature=0.9, top_k=0, top_p=1.0, max_new_tokens=NEW, stop_token_ids=())
    uniforms = random.uniforms(1, "families/canary", step=0, rows=range(len(PROMPTS)), num_positions=NEW)

    def rollout() -> Completions:
        return model.generate(prompt_batch(), how, uniforms, pad_token_id=0)

    right = rollout()
    assert cache_error(model, prompt_batch(), right, how) <= TOLERANCES["decode"].float64

    class LateKeys(slots.Cache):
        def update(self, keys, values, layer_idx):
            return super().update(keys.roll(1, dims=2), values, layer_idx)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "Cache", LateKeys)
        assert cache_error(model, prompt_batch(), rollout(), how) > TOLERANCES["decode"].float32
    network = type(model._network)
    forward = network.hidden_states

    def late(self, tokens, where, *rest):
        return forward(self, tokens, where + int(where.shape[1] == 1), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(network, "hidden_states", late)
        assert cache_error(model, prompt_batch(), wrong := rollout(), how) > TOLERANCES["decode"].float32
    changed = right.tokens.copy()
    changed[2, 3] += 1
    other = Completions(
        tokens=changed, mask=right.mask, logprobs=right.logprobs, margins=right.margins, finish=right.finish
    )
    assert tokens_differ(other, right) == 1
    assert tokens_differ(right, right) == 0
    assert tokens_differ(wrong, right) > 0
    assert cache_error(model, prompt_batch(), other, how) > TOLERANCES["decode"].float32


def test_canary_the_table_shows_what_failed():
    from parity_tests.check_table import measurements, note, table

    properties = [[note("llama", "logprobs", 1e-14, 1e-12)], [note("llama", "logprobs", 2e-12, 1e-12)]]
    properties += [[note("gpt2", "weights", 0, 0), ("another", 1)], []]
    lines = table(measurements(properties))
    assert len(lines) == 3
    assert lines[1].split() == ["llama", "FAIL", "2.0e-12"]
    assert lines[2].split() == ["gpt2", "0"]
    assert table([]) == []
