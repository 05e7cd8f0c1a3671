"""Every family on both engines against transformers: outputs, gradients, weights, decoding (float64, and float32).

`pytest parity_tests -k families` ends with the table of family x check. Prompts are up to 600 positions long and padded
on the left; windows and the limits of dynamic and longrope scaling are crossed (families.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import diptych_jax.decode
import diptych_torch.decode
from diptych import random
from diptych.data.batches import join
from diptych.engine import Completions, Sampling
from diptych.families.family import supported_families
from diptych.parity.tolerances import TOLERANCES
from parity_tests.families import (
    CASES,
    EXPERTS,
    NEW,
    PROMPTS,
    VARIANTS,
    loss_of,
    prompt_batch,
    train_batch,
    vanishing_gradients,
)  # fmt: skip
from parity_tests.family_checks import (
    ENGINES,
    Subject,
    build,
    bytes_differ,
    cache_error,
    gradient_error,
    output_error,
    outputs,
    outputs_and_gradients,
    quick_compilation,
    tokens_differ,
    wanted,
)  # fmt: skip

PRECISIONS = ("float64", "float32")
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=NEW, stop_token_ids=(5,))
SAMPLED = Sampling(temperature=0.9, top_k=0, top_p=0.95, max_new_tokens=NEW, stop_token_ids=(5,))
BALANCE = 0.3
# The trunk's gradients are checked under the other head; here those of the head itself, on each kind of trunk.
SCORE_GRADIENTS = ("llama", "gemma2", "mixtral", "opt, norm after, projected", "gpt2", "rnn")


def in_one_worker(names):
    """Each case in one worker, so that it is compiled once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.fixture(scope="module", params=in_one_worker(CASES))
def subject(request) -> Iterator[Subject]:
    subject = Subject(request.param)
    yield subject
    subject.release()


@pytest.fixture(scope="module", params=in_one_worker([name for name in CASES if name not in VARIANTS]))
def full(request) -> Iterator[Subject]:
    """The cases that get every check."""
    subject = Subject(request.param)
    yield subject
    subject.release()


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def limit(name: str, precision: str = "float64") -> float:
    return TOLERANCES[name].at(precision)  # pyright: ignore[reportArgumentType]


def test_every_family_is_here():
    assert {config["model_type"] for config in CASES.values()} == set(supported_families())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logprobs(subject, precision, judge):
    compare_outputs(subject, "lm", precision, judge)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores(full, precision, judge):
    compare_outputs(full, "scalar", precision, judge)


def test_gradients(subject, judge):
    compare_gradients(subject, "lm", "float64", judge)


def test_gradients_in_float32(full, judge):
    compare_gradients(full, "lm", "float32", judge)


@pytest.fixture(scope="module", params=in_one_worker(SCORE_GRADIENTS))
def scored(request) -> Iterator[Subject]:
    subject = Subject(request.param)
    yield subject
    subject.release()


def test_gradients_of_scores(scored, judge):
    compare_gradients(scored, "scalar", "float64", judge)


def compare_outputs(subject: Subject, head, precision, judge) -> None:
    """Both engines' log-probabilities or scores against the plain model's."""
    expected, _ = subject.oracle(head, precision)
    assert np.abs(expected).max() > (3 if head == "lm" else 0.1)  # hot
    what = "logprobs" if head == "lm" else "scores"
    for engine in ENGINES:
        found = outputs(subject.model(engine, head, precision), subject.batch)
        assert found.dtype == precision
        error = output_error(found, expected, wanted(subject.batch, head))
        judge(subject.name, f"{what} {precision}", error, limit("model", precision))


def compare_gradients(subject: Subject, head, precision, judge) -> None:
    """Every leaf of both engines' gradients, of two micro-batches, against torch autograd on the plain model."""
    _, expected = subject.oracle(head, precision)
    batch, vanishing = train_batch(subject.batch, head), vanishing_gradients(subject.config)
    what = "gradients" if head == "lm" else "score gradients"
    for engine in ENGINES:
        found = subject.model(engine, head, precision).gradients(loss_of(head), batch)
        error = gradient_error(found, expected, vanishing=vanishing)
        judge(subject.name, f"{what} {precision}", error, limit("gradient_relative_l2", precision))


def test_weights_come_back_byte_for_byte(subject, judge):
    for engine in ENGINES:
        for precision in PRECISIONS:
            held = subject.weights("lm", precision)
            judge(subject.name, "weights", bytes_differ(subject.model(engine, "lm", precision).weights(), held), 0)


def jax_pieces(model, sampling: Sampling, uniforms: np.ndarray, pieces: tuple[int, ...]) -> Completions:
    return diptych_jax.decode.generate(
        model._model, prompt_batch(), sampling, uniforms, pad_token_id=0, prefill=pieces
    )  # fmt: skip


def torch_pieces(model, sampling: Sampling, uniforms: np.ndarray, size: int) -> Completions:
    return diptych_torch.decode.generate(
        model._network, prompt_batch(), sampling, uniforms, pad_token_id=0, device=torch.device("cpu"), prefill=size
    )


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_decoding(subject, sampling, judge):
    """Both engines draw the same tokens, in whichever pieces the prompts are read, and with a cache the
    log-probabilities are those of the full forward; greedy tokens are the likeliest by the plain model."""
    prompts, kind = prompt_batch(), "greedy" if sampling is GREEDY else "sampled"
    uniforms = random.uniforms(1, "families/decode", step=0, rows=range(len(PROMPTS)), num_positions=NEW)
    models = {engine: subject.model(engine) for engine in ENGINES}
    done = models["torch"].generate(prompts, sampling, uniforms, pad_token_id=0)
    assert sampling is GREEDY or len(np.unique(done.tokens)) > 10
    # Each kind compiles one JAX program: the greedy one reads prompts whole, the sampled one in two pieces.
    pieces = (max(PROMPTS),) if sampling is GREEDY else (max(PROMPTS) - 5, 5)
    rollouts = {"torch": done}
    rollouts |= {f"torch {size}": torch_pieces(models["torch"], sampling, uniforms, size) for size in (1, 5, 13)}
    if sampling is SAMPLED or subject.name not in VARIANTS:
        rollouts["jax"] = jax_pieces(models["jax"], sampling, uniforms, pieces)
    for name, rollout in rollouts.items():
        judge(subject.name, f"{kind} tokens", tokens_differ(rollout, done), 0)
        error = cache_error(models[name.split()[0]], prompts, rollout, sampling, wide=name == "jax")
        judge(subject.name, "cache", error, limit("decode"))
    if sampling is GREEDY:
        judge(subject.name, "greedy tokens", unlikely_tokens(subject, done), 0)


def unlikely_tokens(subject: Subject, done: Completions) -> int:
    """How many greedy tokens are not the plain model's likeliest."""
    plain, whole = subject.plain("lm"), join(prompt_batch(), done)
    wrong = 0
    for row, real in enumerate(whole.attention):
        tokens = torch.tensor(whole.tokens[row][real], dtype=torch.int64)
        with torch.no_grad():
            likeliest = plain.outputs(tokens).argmax(dim=-1)[PROMPTS[row] - 1 : -1]
        wrong += int((likeliest != tokens[PROMPTS[row] :]).sum())
    return wrong


@pytest.fixture(scope="module", params=in_one_worker(EXPERTS))
def experts(request) -> Iterator[Subject]:
    subject = Subject(request.param)
    yield subject
    subject.release()


def test_balance_of_experts(experts, judge):
    """transformers' balance loss of the whole step, for one micro-batch and for two."""
    batch, loss = train_batch(experts.batch, "lm"), loss_of("lm", balance=BALANCE)
    plain = experts.plain("lm")
    _, expected = outputs_and_gradients(plain, experts.batch, balance=BALANCE)
    value = float(plain.balance_loss(experts.batch).detach())  # pyright: ignore[reportAttributeAccessIssue]
    _, without = experts.oracle("lm", "float64")
    assert gradient_error(without, expected) > 1e-2  # canary: a balance loss that is left out shows
    for engine in ENGINES:
        for rows in (4, 2):
            model = build(engine, experts.config, experts.weights("lm", "float64"), rows=rows)
            found = model.gradients(loss, batch)
            judge(experts.name, "balance", gradient_error(found, expected), limit("gradient_relative_l2"))
        metrics = model.evaluate(loss, batch)
        judge(experts.name, "balance", abs(metrics["router/balance_loss"] - value), limit("function"))
