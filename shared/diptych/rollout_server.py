"""Rollouts by a server of your own (vLLM, SGLang, any other process): weights in, tokens and log-probabilities out.

`rollout.engine: FILE.py:NAME` or `MODULE:NAME` names a factory. It is called once, in process 0, with a `ServerStart`
and returns a `RolloutServer` (docs/rollouts.md shows one). The run sends the policy's weights whenever they have
changed, asks for completions, checks every answer, and closes the server at its end. Before the first rollout the gate
(`diptych.stages.gate`) compares what it generates with the training forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from diptych.engine import Completions, Finish, Precision, Sampling
from diptych.errors import InvariantError, UserError

BUILT_IN = ("auto", "native", "deepspeed")
"""Values of `rollout.engine` that an engine answers itself; any other names a server."""


@dataclass(frozen=True, kw_only=True)
class ServerStart:
    """What a factory is given. config: the contents of the policy's config.json. tokenizer_directory: its tokenizer's
    files. precision: what the trainer computes in, and the server had better, too."""

    config: Mapping[str, Any]
    tokenizer_directory: Path
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Request:
    """One rollout. prompts: the token ids of each row, without padding. uniforms: float32 [rows, max_new_tokens] in
    [0, 1), one for each token that may be drawn: a server that samples by inverse CDF on them (docs/algorithms.md)
    draws the tokens that the native engine would."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    uniforms: Float[np.ndarray, "rows new"]

    @property
    def seeds(self) -> list[int]:
        """32 bits for each row, for a server with a generator of its own: of the row's uniforms, and so keyed as they
        are (law 5)."""
        marks = (hashlib.blake2b(row.astype("<f4").tobytes(), digest_size=4) for row in self.uniforms)
        return [int.from_bytes(mark.digest(), "little") for mark in marks]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server returns; a list for each row, of 1 to max_new_tokens entries, without padding.

    version: of the weights that generated, read from what the server holds, not from the last call. tokens: they end
    with the first of `sampling.stop_token_ids` (it belongs to the response), or are max_new_tokens long. logprobs: of
    each token in nats, of the softmax of logits / temperature (greedy: temperature 1) over *all* tokens, before top-k
    and top-p. margins: as in `diptych.engine.Completions`; asked for where temperature is 0 (half the difference of the
    two largest probabilities), and may be None elsewhere.
    """

    version: str
    tokens: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    margins: Sequence[Sequence[float]] | None = None


@runtime_checkable
class RolloutServer(Protocol):
    """What a factory returns. An exception that a method raises stops the run with its own traceback."""

    precision: Precision
    """What the server computes in. Where it is coarser than the trainer's, rl.importance_cap must be set."""

    def load_weights(self, tensors: Mapping[str, np.ndarray], *, version: str, done: bool) -> None:
        """Take in a part of the policy's weights: whole tensors by Hugging Face name, in the trainer's master precision
        (float32; float64 in float64), any adapter merged in. All parts of one version come one after the other, the
        last with `done`; only then may it generate with them. The arrays are the server's to keep."""
        ...

    def generate(self, request: Request) -> Answer:
        """Complete every prompt."""
        ...

    def close(self) -> None:
        """The run is over, well or badly."""
        ...


def is_server(engine: str) -> bool:
    """Whether a value of `rollout.engine` names a server."""
    return engine not in BUILT_IN


def read_answer(
    answer: Answer, request: Request, *, version: str, vocab_size: int, pad_token_id: int, dtype: Any, where: str
) -> Completions:
    """An answer as what an engine's sampler returns; margins that were not given are infinite, logprobs of `dtype`.

    Raises InvariantError, naming the server (`where`), for weights of another version than `version` and for numbers
    that are not finite, and UserError for whatever is not as `Answer` says.
    """
    if not isinstance(answer, Answer):
        raise UserError(f"{where}: generate must return an Answer, not {type(answer).__name__}")
    if answer.version != version:
        raise InvariantError(
            f"{where} generated with weights of version {answer.version!r}, and the policy's are {version!r}: its "
            "weights are stale, it was started again, or another run writes to it"
        )
    sampling, num_rows = request.sampling, len(request.prompts)
    greedy = sampling.temperature == 0
    if greedy and answer.margins is None:
        raise UserError(f"{where}: no margins, and a greedy request asks for them: near-ties are told by them")
    new = sampling.max_new_tokens
    tokens = np.full((num_rows, new), pad_token_id, np.int32)
    mask = np.zeros((num_rows, new), bool)
    logprobs = np.zeros((num_rows, new), dtype)
    margins = np.zeros((num_rows, new), dtype)
    for name in ("tokens", "logprobs") if answer.margins is None else ("tokens", "logprobs", "margins"):
        if len(getattr(answer, name)) != num_rows:
            raise UserError(f"{where}: {name} of {len(getattr(answer, name))} rows for {num_rows} prompts")
    for row in range(num_rows):
        drawn = _tokens(answer.tokens[row], sampling, vocab_size, f"{where}: row {row}")
        count = len(drawn)
        tokens[row, :count], mask[row, :count] = drawn, True
        logprobs[row, :count] = _numbers(answer.logprobs[row], count, f"{where}: row {row}: logprobs")
        margins[row, :count] = (
            np.inf if answer.margins is None else _numbers(answer.margins[row], count, f"{where}: row {row}: margins")
        )
    last = tokens[np.arange(num_rows), mask.sum(axis=1) - 1]
    finish = np.where(np.isin(last, sampling.stop_token_ids), Finish.STOP, Finish.LENGTH).astype(np.int32)
    return Completions(tokens=tokens, mask=mask, logprobs=logprobs, margins=margins, finish=finish)


def _tokens(given: Sequence[int], sampling: Sampling, vocab_size: int, where: str) -> np.ndarray:
    """One row's tokens, int64. UserError where they are none, or do not end as they must."""
    new = sampling.max_new_tokens
    try:
        tokens = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: tokens must be a flat list of integers, got {given!r:.80}") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{where}: tokens must be a flat list of integers, got {given!r:.80}")
    if not 1 <= len(tokens) <= new:
        raise UserError(f"{where}: {len(tokens)} tokens, where 1 to {new} (rollout.max_new_tokens) were asked for")
    strange = (tokens < 0) | (tokens >= vocab_size)
    if strange.any():
        raise UserError(
            f"{where}: token {tokens[strange][0]} at position {int(strange.argmax())} is not in the vocabulary of "
            f"{vocab_size}: the server runs another model or tokenizer"
        )
    stops = np.isin(tokens, sampling.stop_token_ids)
    if stops[:-1].any():
        raise UserError(f"{where}: it goes on after the stop token at position {int(stops.argmax())}")
    if len(tokens) < new and not stops[-1]:
        raise UserError(
            f"{where}: it ends after {len(tokens)} of {new} tokens without a stop token: return the stop token itself "
            f"as the last one, and end rows at nothing but {list(sampling.stop_token_ids)}"
        )
    return tokens


def _numbers(given: Sequence[float], count: int, what: str) -> np.ndarray:
    """One row's numbers, float64, `count` of them. UserError where there are others, InvariantError where one is not
    finite."""
    try:
        numbers = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be a flat list of numbers, got {given!r:.80}") from error
    if numbers.shape != (count,):
        raise UserError(f"{what}: shape {list(numbers.shape)}, and the row has {count} tokens")
    if not np.isfinite(numbers).all():
        position = int((~np.isfinite(numbers)).argmax())
        raise InvariantError(f"{what}: {numbers[position]} at position {position}: every one must be finite")
    return numbers
