"""What the names in a trace's step mean, in the order in which an error travels: the RLHF ladder.

A step of rl is one iteration; what is recorded of its updates is the *first* of the policy and the first of the critic.
Rows are rollout rows, columns response-aligned unless said otherwise; `ROLES` are "policy" and "critic". Supervised
stages (sft, reward) have one model, role "model".

    name                        layout          mask           what
    rows                        rows                           row ids of the prompts (int64)
    prompts/tokens, /attention  rows prompt     prompts/attention
    response/tokens, /mask      rows new        response/mask  what this side sampled by itself
    response/margins            rows new        response/mask  distance of each draw to its boundary
    response/finish             rows
    response/logprobs           rows new        response/mask  the sampler's own log-probabilities
    used/tokens, used/mask, used/finish                        the responses that the step went on with (replay: given)
    scores                      rows                           rewards before shaping
    ref_logprobs, logprobs      rows new        used/mask
    values                      rows slots      used/slots     used/slots: where the value counts
    kl                          rows                           KL penalty of each response (nats)
    shaped                      rows new        used/slots     rewards as GAE saw them
    returns, advantages         rows new        value_mask, policy_mask
    policy_mask, value_mask     rows new
    ROLE/probe/...              batch ...                      the probe batch (below), phase "given"
    ROLE/outputs                batch time      ROLE/probe/attention   log-probabilities or scores of the probe batch
    ROLE/gradient/TENSOR        as stored                      gradient of the loss on the probe batch
    ROLE/first/TENSOR, second/  as stored                      optimizer moments after the first update
    ROLE/weights/TENSOR         as stored                      weights after it
    ROLE/next_outputs           batch time      ROLE/probe/attention   outputs of the probe batch under them
    ROLE/taps/NAME              (families.taps) ROLE/probe/attention   values (depths layers, ops)
    ROLE/tap_gradients/NAME     the same                       gradients of the loss by them
    ROLE/forced_gradient/TENSOR as stored                      gradients with every tap forced (replays only)
    ROLE/start/weights/TENSOR, start/first/, start/second/     what the step started from, phase "given"

and in a step's metrics, beside what the run logs: ROLE/loss and ROLE/loss/METRIC (the loss on the probe batch),
ROLE/grad_norm (of the first update, before clipping), ROLE/update/METRIC (its metrics), ROLE/step (updates before this
step), ROLE/learning_rate. With tensors, what the run logged of its later updates is left out: in float32 they start
from weights that have parted by rounding.

The probe batch is a few rows of the first mini-batch with old log-probabilities and values perturbed by keyed noise, so
that ratios leave 1 and both clips work: on fresh ones the PPO loss is -mean(advantage) whatever the model computes.
ROLE/probe/ holds tokens, attention, positions and the loss's arrays (`arrays/NAME`, `denominators/NAME` as 0-d float64,
`first` as 0-d int64). A supervised stage's probe batch is the first rows of the step's batch; `batch/tokens` and
`batch/attention` hold the whole.

In a replay (`provenance["replay"]` names the trace) everything that the recorded side *gave* to the next rung is fed to
this side: starting weights and moments, responses, scores, log-probabilities, values, the probe batch, and with taps
every tap. So every rung is compared on equal inputs, and a red rung is red by its own doing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["equal", "max_abs", "relative_l2", "metric"]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One line of the ladder. names: what belongs to it, exactly or as a beginning that ends in a slash; ROLE stands
    for policy, critic, model. kind: how it is compared. tolerance: its line of the tolerance table; None: equal."""

    name: str
    title: str
    names: tuple[str, ...]
    kind: Kind
    tolerance: str | None = None


LADDER: tuple[Rung, ...] = (
    Rung(
        name="tokens",
        title="tokens and masks",
        names=(
            "rows", "prompts/", "response/tokens", "response/mask", "response/finish", "used/", "policy_mask",
            "value_mask", "batch/", "ROLE/probe/",
        ),
        kind="equal",
    ),
    Rung(name="sampler", title="sampler's log-probs", names=("response/logprobs",), kind="max_abs", tolerance="decode"),
    Rung(name="rewards", title="rewards", names=("scores",), kind="max_abs", tolerance="model"),
    Rung(name="reference", title="reference log-probs", names=("ref_logprobs",), kind="max_abs", tolerance="model"),
    Rung(
        name="policy",
        title="policy log-probs",
        names=("logprobs", "policy/outputs", "model/outputs"),
        kind="max_abs",
        tolerance="model",
    ),
    Rung(name="values", title="values", names=("values", "critic/outputs"), kind="max_abs", tolerance="model"),
    Rung(name="kl", title="KL", names=("kl",), kind="max_abs", tolerance="model"),
    Rung(name="returns", title="returns", names=("shaped", "returns"), kind="max_abs", tolerance="model"),
    Rung(name="advantages", title="advantages", names=("advantages",), kind="max_abs", tolerance="model"),
    Rung(name="loss", title="loss", names=("ROLE/loss", "ROLE/loss/"), kind="metric", tolerance="trajectory_relative"),
    Rung(
        name="gradients",
        title="gradients per tensor",
        names=("ROLE/gradient/",),
        kind="relative_l2",
        tolerance="probe_gradient_relative_l2",
    ),
    Rung(name="norm", title="clip norm", names=("ROLE/grad_norm",), kind="metric", tolerance="norm_relative"),
    Rung(
        name="optimizer",
        title="optimizer state",
        names=("ROLE/first/", "ROLE/second/", "ROLE/step", "ROLE/learning_rate"),
        kind="relative_l2",
        tolerance="moment_relative_l2",
    ),
    Rung(
        name="weights",
        title="new weights",
        names=("ROLE/weights/",),
        kind="relative_l2",
        tolerance="weights_relative_l2",
    ),
    Rung(name="next", title="next log-probs", names=("ROLE/next_outputs",), kind="max_abs", tolerance="model"),
    Rung(name="metrics", title="logged metrics", names=(), kind="metric", tolerance="trajectory_relative"),
)  # fmt: skip
ROLES = ("policy", "critic", "model")

# Logged numbers that are not the algorithm's: how long things took, and rounding noise around 0.
NOT_COMPARED: Mapping[str, str] = {
    "timing_s/": "seconds",
    "switch/": "bytes and seconds of the decode copy",
    "compilations": "programs compiled",
    "time": "a clock",
    "eps": "episodes per second",
    "tokens_per_second": "a speed",
    "rollout/logprob_gap": "rounding noise around 0",
    "policy/first_ratio_deviation": "rounding noise around 0",
    "rollout/token_mult_prob_error": "rounding noise around 1",
}


def rung_of(name: str) -> Rung | None:
    """The rung of a tensor or scalar; None for taps and starting points, which are no rung of their own."""
    role = next((role for role in ROLES if name.startswith(f"{role}/")), None)
    for rung in LADDER:
        for pattern in rung.names:
            one = pattern if role is None else pattern.replace("ROLE/", f"{role}/")
            if name == one or (one.endswith("/") and name.startswith(one)):
                return rung
    return None
