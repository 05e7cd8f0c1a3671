"""Lockstep: two engines put on the same weights and optimizer state before every step, every number compared.

Free-running float32 curves part in any two implementations after some hundred steps; the error of a single step does
not grow. Each step walks the ladder: sampled tokens, log-probabilities, values, rewards, gradients per tensor, metrics,
optimizer moments, new weights. Both sides are updated on *one* rollout (the first side's), with old log-probabilities
and values perturbed by keyed noise, so that ratios leave 1 and both clips are at work: on fresh ones the loss is
-mean(advantage) whatever the model computes (docs/parity.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diptych import random
from diptych.data.examples import PromptExample
from diptych.engine import Model
from diptych.parity.compare import Difference, max_abs, metrics, relative_l2, tensors
from diptych.parity.tolerances import TOLERANCES
from diptych.stages.rl import PPO, Scored
from diptych.stages.rollout import Rollout

RUNGS = (
    "model",
    "decode",
    "gradient_relative_l2",
    "trajectory_relative",
    "function",
    "moment_relative_l2",
    "weights_relative_l2",
)  # of the table of tolerances, walked in every step
PERTURBATION = 0.3  # standard deviation of the noise on old log-probabilities and values: well past a clip of 0.2


@dataclass(frozen=True, kw_only=True)
class NearTie:
    """A token that the engines drew differently, the uniform being on a boundary of the cumulative distribution."""

    step: int
    row: int
    position: int
    tokens: tuple[int, int]
    margin: float


@dataclass(frozen=True, kw_only=True)
class LockstepReport:
    """differences: everything beyond its tolerance, in order; near_ties: token flips that noise explains; tokens:
    sampled tokens compared."""

    differences: list[Difference] = field(default_factory=list)
    near_ties: list[NearTie] = field(default_factory=list)
    tokens: int = 0


def lockstep(a: PPO, b: PPO, train: Sequence[PromptExample], *, steps: int) -> LockstepReport:
    """Walk both sides through `steps` PPO updates. `b` takes over `a`'s weights and optimizer state after each."""
    report = LockstepReport()
    tokens = 0
    for step in range(steps):
        prompts = a.prompts(train, step)
        rollout = a.roll_out(prompts, purpose="rl/rollout", step=step)
        other = b.roll_out(prompts, purpose="rl/rollout", step=step)
        tokens += int(rollout.completions.mask.sum())
        found, ties = compare_tokens(rollout, other, step, limit=TOLERANCES["model"].at(a.recipe.precision))
        report.near_ties.extend(ties)
        found += compare_step(a, b, rollout, prompts, step)
        report.differences.extend(found)
        for ours, theirs in ((a.models.policy, b.models.policy), (a.models.critic, b.models.critic)):
            theirs.load_weights(ours.weights())
            theirs.load_optimizer_state(ours.optimizer_state())
    return replace(report, tokens=tokens)


def compare_tokens(a: Rollout, b: Rollout, step: int, *, limit: float) -> tuple[list[Difference], list[NearTie]]:
    """Tokens are equal up to near-ties: where a row first differs, the uniform was within `limit` of a boundary."""
    differences: list[Difference] = []
    ties: list[NearTie] = []
    left, right = a.completions, b.completions
    differs = (left.tokens != right.tokens) | (left.mask != right.mask)
    for row in np.flatnonzero(differs.any(axis=1)):
        position = int(differs[row].argmax())
        pair = (int(left.tokens[row, position]), int(right.tokens[row, position]))
        margin = float(min(left.margins[row, position], right.margins[row, position]))
        if margin <= limit and left.mask[row, position] and right.mask[row, position]:
            ties.append(NearTie(step=step, row=int(row), position=position, tokens=pair, margin=margin))
        else:
            detail = f"row {row}, position {position}: tokens {pair}"
            differences.append(Difference(name=f"step {step}/tokens", value=margin, limit=limit, detail=detail))
    return differences, ties


def compare_step(a: PPO, b: PPO, rollout: Rollout, prompts: Sequence[PromptExample], step: int) -> list[Difference]:
    """Everything after the tokens, on one rollout."""
    precision = a.recipe.precision
    limit = {rung: TOLERANCES[rung].at(precision) for rung in RUNGS}
    name = f"step {step}"
    mask = rollout.completions.mask
    mine, theirs = a.score(rollout, prompts), b.score(rollout, prompts)
    found = max_abs(f"{name}/logprobs", mine.logprobs, theirs.logprobs, limit=limit["model"], mask=mask)
    found += max_abs(f"{name}/ref_logprobs", mine.ref_logprobs, theirs.ref_logprobs, limit=limit["model"], mask=mask)
    found += max_abs(f"{name}/values", mine.values, theirs.values, limit=limit["model"], mask=mask)
    found += max_abs(f"{name}/scores", mine.scores, theirs.scores, limit=limit["model"])
    found += max_abs(
        f"{name}/sampler_logprobs", rollout.completions.logprobs, theirs.logprobs, limit=limit["decode"] * 2, mask=mask
    )
    replayed = perturb(mine, a.recipe.seed, step)
    rows = np.arange(len(mine.scores))
    for role, loss, batch, rate in (
        ("policy", a.policy_loss, a.policy_batch(replayed, rows), a.policy_rate(step)),
        ("critic", a.value_loss, a.value_batch(replayed, rows), a.critic_rate(step)),
    ):
        ours: Model = getattr(a.models, role)
        other: Model = getattr(b.models, role)
        found += tensors(
            f"{name}/{role}/gradient",
            ours.gradients(loss, batch),
            other.gradients(loss, batch),
            limit=limit["gradient_relative_l2"],
        )
        made = (ours.update(loss, batch, learning_rate=rate), other.update(loss, batch, learning_rate=rate))
        # Losses are sums of terms of both signs: differences below the function tolerance are rounding.
        found += metrics(f"{name}/{role}", *made, limit=limit["trajectory_relative"], floor=limit["function"])
        states = (ours.optimizer_state(), other.optimizer_state())
        moment_limit = limit["moment_relative_l2"]
        found += tensors(f"{name}/{role}/first", states[0].first, states[1].first, limit=moment_limit)
        found += tensors(f"{name}/{role}/second", states[0].second, states[1].second, limit=2 * moment_limit)
        new = (ours.weights(), other.weights())
        for tensor in new[0]:
            found += relative_l2(
                f"{name}/{role}/weights/{tensor}", new[0][tensor], new[1][tensor], limit=limit["weights_relative_l2"]
            )
    return found


def perturb(scored: Scored, seed: int, step: int) -> Scored:
    """The same rollout as if older weights had made it: keyed normal noise on old log-probabilities and values."""
    draws = random.generator(seed, "parity/perturbation", step=step)
    shape = scored.logprobs.shape
    noise = draws.standard_normal((2, *shape)).astype(scored.logprobs.dtype) * PERTURBATION
    older = replace(scored.experience, values=scored.experience.values + noise[1])
    return replace(scored, logprobs=scored.logprobs + noise[0], experience=older)
