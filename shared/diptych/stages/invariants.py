"""Run-time invariants of PPO: what must hold on every start, whatever the model. A broken one stops the run.

Each limit is in `diptych.parity.tolerances`; each message names what was seen, where, and the likely causes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from diptych.engine import Precision
from diptych.errors import InvariantError
from diptych.parity.tolerances import TOLERANCES
from diptych.stages.rollout import Rollout


def check_sampler_gap(gap: float, rollout: Rollout, precision: Precision, iteration: int) -> None:
    """The sampler's log-probabilities are those of the training forward: generation runs the model that is trained."""
    limit = TOLERANCES["sampler_gap"].at(precision)
    if not gap <= limit:
        raise InvariantError(
            f"rl iteration {iteration + 1}: the sampler's log-probabilities differ from the training forward's by up "
            f"to {gap:.3g} (limit {limit:.0e}) over {int(rollout.completions.mask.sum())} tokens: stale decode "
            f"weights, wrong positions of padded prompts, or a broken cache; of a rollout server also other kernels, "
            f"which rl.importance_cap allows for"
        )


def check_reference(
    logprobs: Float[np.ndarray, "rows new"],
    ref_logprobs: Float[np.ndarray, "rows new"],
    mask: Bool[np.ndarray, "rows new"],
    precision: Precision,
) -> None:
    """Before the first update the policy and the reference are equal, so the KL between them is 0."""
    difference = float(np.abs(logprobs - ref_logprobs)[mask].max())
    limit = TOLERANCES["reference_kl"].at(precision)
    if not difference <= limit:
        raise InvariantError(
            f"rl iteration 1: policy and reference have equal weights, yet their log-probabilities differ by up to "
            f"{difference:.3g} (limit {limit:.0e}): another temperature, dropout, or another checkpoint on one side"
        )


def check_first_ratio(deviation: float, precision: Precision, iteration: int) -> None:
    """The first update of an iteration sees the weights that scored the rollout, so every ratio is 1."""
    limit = TOLERANCES["first_ratio"].at(precision)
    if not deviation <= limit:
        raise InvariantError(
            f"rl iteration {iteration + 1}: the first update's ratio to the old log-probabilities deviates from 1 by "
            f"up to {deviation:.3g} (limit {limit:.0e}): dropout, other masks or positions, or another "
            f"temperature in the update than in scoring; where the old log-probabilities are the sampler's "
            f"(rl.old_logprobs), also stale decode weights or a broken cache"
        )
