"""The gate: a run proves that what generates is what it trains, before its first rollout and after every resume.

A few prompts, left-padded and ragged, are completed greedily by whatever will generate in this run, and the training
forward scores the very same tokens: every one must be the token that it finds likeliest, up to near-ties, and have the
log-probability that it computes. Each position is judged on its own, given the tokens before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from diptych.data.examples import PromptExample
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Model, Precision, Sampling
from diptych.errors import InvariantError
from diptych.parity.tolerances import TOLERANCES
from diptych.recipe.schema import Recipe
from diptych.stages.rollout import Rollout, Sampler, roll_out

ROWS = 8
FEWEST_ROWS = 4
NEW_TOKENS = 24
PROMPT_TOKENS = 512  # longer prompts are passed over: the rollouts themselves are checked too (`invariants.py`)
SHOWN = 5  # broken positions in the message


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a sound sampler was found to do. gap_max: the largest difference of a log-probability, in nats."""

    rows: int
    tokens: int
    near_ties: int
    gap_max: float


def check_gate(
    sampler: Sampler,
    policy: Model,
    train: Sequence[PromptExample],
    *,
    recipe: Recipe,
    sampling: Sampling,
    tokenizer: Tokenizer,
    precision: Precision,
    name: str,
    quiet: bool = False,
) -> Gate:
    """Complete a few of the training prompts greedily by `sampler` and score the tokens by `policy`'s training forward.

    precision: decides the band (`sampler_gap` of the tolerance table). name: of the sampler, in the message. Says what
    was found in one line unless `quiet`. Raises InvariantError, naming rows, positions, tokens and both numbers, where
    they do not agree.
    """
    prompts = gate_prompts(train)
    greedy = replace(
        sampling,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=min(sampling.max_new_tokens, NEW_TOKENS),
        stop_token_ids=(),  # or a model that ends at once would show nothing
        # Where rows will take the places of finished ones, some do here.
        decode_rows=sampling.decode_rows and min(sampling.decode_rows, -(-len(prompts) // 2)),
    )
    rollout = roll_out(
        sampler,
        prompts,
        rows=range(len(prompts)),
        sampling=greedy,
        tokenizer=tokenizer,
        buckets=recipe.data.buckets,
        seed=recipe.seed,
        purpose="rl/gate",
        step=0,
    )
    scored = rollout.of_response(policy.logprobs(rollout.tokens, temperature=1.0))
    likeliest = rollout.of_response(policy.greedy_matches(rollout.tokens))
    limit = TOLERANCES["sampler_gap"].at(precision)
    done = rollout.completions
    gap = np.where(done.mask, np.abs(done.logprobs - scored), 0)
    ties = ~likeliest & near_ties(done.logprobs, done.margins, limit)
    broken = ~done.mask | ~(gap <= limit) | ~(likeliest | ties)
    if broken.any():
        raise InvariantError(
            f"rl: what generates is not what is trained. {name} completed {len(prompts)} prompts greedily, "
            f"{done.mask.size} tokens, and the training forward scored them (limit {limit:.0e} nats, {precision}):\n"
            + "\n".join(_described(rollout, prompts, scored, likeliest | ties, broken, tokenizer))
            + "\nLikely causes: decode weights that are stale, wrongly cast or in the wrong place; positions or mask "
            "of padded prompts; key-value heads or a cache mixed up; a server that runs another model. "
            "rollout.gate=false starts without this check"
        )
    found = Gate(rows=len(prompts), tokens=int(done.mask.sum()), near_ties=int(ties.sum()), gap_max=float(gap.max()))
    if not quiet:
        print(
            f"diptych: gate: {name} generates what is trained: {found.tokens} greedy tokens of {found.rows} prompts, "
            f"largest gap of a log-probability {found.gap_max:.2g} (limit {limit:.0e}), {found.near_ties} near-ties",
            file=sys.stderr,
        )
    return found


def gate_prompts(train: Sequence[PromptExample]) -> list[PromptExample]:
    """At least 4 and at most 8 prompts, of different lengths where there are any: spread evenly over the lengths of up
    to 512 tokens, the shortest first. Where there are too few, later halves of prompts are added, so that there is
    padding to be wrong about."""
    by_length = {len(prompt.tokens): prompt for prompt in reversed(train)}
    lengths = sorted(by_length)
    lengths = [length for length in lengths if length <= PROMPT_TOKENS] or lengths[:1]
    spread = np.linspace(0, len(lengths) - 1, min(ROWS, len(lengths))).round().astype(int)
    prompts = [by_length[lengths[index]] for index in spread]
    while len(prompts) < FEWEST_ROWS:
        whole = prompts[-1]
        prompts.append(replace(whole, tokens=whole.tokens[len(whole.tokens) // 2 :]))
    return prompts


def near_ties(
    logprobs: Float[np.ndarray, "rows new"], margins: Float[np.ndarray, "rows new"], limit: float
) -> Bool[np.ndarray, "rows new"]:
    """Where the greedy token and the next likeliest could change places if each log-probability moved by `limit`.

    logprobs: of the greedy tokens, p; margins: half of p - q, q the next one's. They can where q e^limit >= p e^-limit,
    that is (p - q) / 2 <= p (1 - e^(-2 limit)) / 2.
    """
    return margins <= np.exp(logprobs) * -np.expm1(-2 * limit) / 2


def _described(
    rollout: Rollout,
    prompts: Sequence[PromptExample],
    scored: Float[np.ndarray, "rows new"],
    agreed: Bool[np.ndarray, "rows new"],
    broken: Bool[np.ndarray, "rows new"],
    tokenizer: Tokenizer,
) -> list[str]:
    """A line for each of the first broken positions, and one that counts them all."""
    done = rollout.completions
    places = np.argwhere(broken)
    lines = []
    for row, position in places[:SHOWN]:
        where = f"  row {prompts[row].row + 1} of data.prompts ({len(prompts[row].tokens)} tokens), position {position}"
        if not done.mask[row, position]:
            lines.append(f"{where}: nothing, although no token may end a row here")
            continue
        token = int(done.tokens[row, position])
        lines.append(
            f"{where}: token {token} ({tokenizer.decode([token])!r}): sampler {done.logprobs[row, position]:.6g}, "
            f"training forward {scored[row, position]:.6g}"
            + ("" if agreed[row, position] else ", to which another token is likelier")
        )
    rows = sorted({int(row) for row, _ in places})
    return [*lines, f"  in all {len(places)} positions of {len(rows)} of the {len(prompts)} rows"]
