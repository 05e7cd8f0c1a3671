"""Whose PPO? The choices on which published systems disagree, as data, and the one function that reads them.

Identical tensors through seven trainers give seven different policy losses, because each answers a few questions in
its own way: on which slot does the score land, is the stop token trained, how far does the value loss reach, how are
advantages whitened. A `Dialect` is one set of answers; `experience` turns a rollout into what the losses need.
docs/algorithms.md has the table and the numbers; tests pin them to values computed by the systems' own code.

The *slot after*: arrays are [rows, new] and `new` is the longest response allowed, so a response of n < new tokens,
its stop token included, has a slot n that no token of its own fills. The state before it is the finished response.
`trl` and `dschat-pad` put the score there, so it reaches the stop token only through lambda and a critic value that
the policy never acts on. A response of full length has no such slot: there those dialects put the score on its last
token, stopped or not, and the value mask is one longer for all rows but these. (So for them a wider array changes the
numbers; `new` must be the sampler's max_new_tokens. The other dialects do not see padding at all.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from diptych.algorithms.advantages import Whitening, gae, whiten
from diptych.algorithms.shaping import add_scores, clip_scores, kl_estimate, kl_penalty, only
from diptych.errors import InvariantError, UserError


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One reading of PPO. n: response tokens of a row, stop token included; slots count from 0."""

    name: str
    """The key in `DIALECTS`."""
    source: str
    """Whose reading this is."""
    score_slot: Literal["stop", "after"]
    """The score lands on the last token, slot n - 1 (the stop token where the row has one), or on the slot after, n."""
    kl_after: bool
    """With score_slot "after": does the slot after pay the KL penalty too, on whatever padding token lies there?"""
    trains_stop: bool
    """Is the stop token in the policy mask? If not, the policy never learns to stop (DeepSpeed-Chat's pad == eos)."""
    value_mask: Literal["policy", "one_longer"]
    """The value loss covers the policy mask, or the response and the slot after it."""
    whitening: Whitening | None
    """How advantages are whitened over the policy mask; None: not at all."""
    score_clip: float | None
    """Scores are limited to +- this; None: not. A recipe's own `score_clip` goes first."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What a rollout means for the losses: [rows, new], response-aligned, in the dtype of the log-probabilities."""

    rewards: Float[np.ndarray, "rows new"]
    """KL penalty and score (whitened where asked for); 0 after the row's last live slot."""
    values: Float[np.ndarray, "rows new"]
    """The critic's values as GAE saw them, `old_values` of the value loss; 0 after the row's last live slot."""
    advantages: Float[np.ndarray, "rows new"]
    """As the policy loss takes them, whitened; 0 outside policy_mask."""
    returns: Float[np.ndarray, "rows new"]
    """GAE's advantage before whitening, plus the value; 0 outside value_mask."""
    policy_mask: Bool[np.ndarray, "rows new"]
    """Slots of the policy loss."""
    value_mask: Bool[np.ndarray, "rows new"]
    """Slots of the value loss."""
    num_policy_tokens: float
    """Sum of policy_mask: the policy loss's denominator where these rows make up the whole step."""
    num_value_tokens: float
    """Sum of value_mask, likewise for the value loss."""
    kl: Float[np.ndarray, "rows new"]
    """The KL estimate, nats per token; 0 outside the response."""
    kl_per_response: Float[np.ndarray, " rows"]
    """kl summed over the response, nats."""
    num_clipped_scores: int
    """Rows whose score was limited by the score clip."""


_ADD_1E8 = Whitening(variance="population", eps=1e-8)
_VERL = Whitening(variance="bessel", eps=1e-8, count_eps=1e-8)
_PLAIN = Dialect(
    name="",
    source="",
    score_slot="stop",
    kl_after=False,
    trains_stop=True,
    value_mask="policy",
    whitening=None,
    score_clip=None,
)


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            replace(
                _PLAIN,
                name="reference",
                source="N+ implementation details (Huang et al. 2024), the score on the stop token and in the masks",
                whitening=_ADD_1E8,
            ),
            replace(
                _PLAIN,
                name="openrlhf",
                source="OpenRLHF 0.11",
                whitening=Whitening(variance="population", eps=1e-8, eps_form="floor"),
            ),
            replace(_PLAIN, name="verl", source="verl 0.10.dev and NeMo RL 0.7", whitening=_VERL),
            replace(
                _PLAIN,
                name="trl",
                source="TRL 1.12, its last PPOTrainer",
                score_slot="after",
                value_mask="one_longer",
                whitening=Whitening(variance="bessel", eps=1e-8),
            ),
            replace(
                _PLAIN,
                name="dschat",
                source="DeepSpeed-Chat with its default pad == eos",
                trains_stop=False,
                score_clip=5.0,
            ),
            replace(
                _PLAIN,
                name="dschat-pad",
                source="DeepSpeed-Chat with a pad token of its own",
                score_slot="after",
                kl_after=True,
                score_clip=5.0,
            ),
            replace(
                _PLAIN,
                name="torchtune",
                source="torchtune 0.6: as trl, but whitening adds the mean back: advantages not centred (a defect)",
                score_slot="after",
                value_mask="one_longer",
                whitening=Whitening(variance="bessel", eps=1e-8, count_eps=1e-8, keep_mean=True),
            ),
        )
    }
)


def experience(
    dialect: Dialect | str,
    *,
    logprobs: Float[np.ndarray, "rows new"],
    ref_logprobs: Float[np.ndarray, "rows new"],
    values: Float[np.ndarray, "rows new"],
    scores: Float[np.ndarray, " rows"],
    mask: Bool[np.ndarray, "rows new"],
    ended: Bool[np.ndarray, " rows"],
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    score_clip: float | None,
) -> Experience:
    """Rewards, advantages, returns and masks of a whole rollout, as `dialect` reads it.

    logprobs, ref_logprobs, values: [rows, new], response-aligned; values[b, t] is the critic's value of the state
    before token t, and slots after the response hold whatever the critic says there. scores: [rows]. mask: True on
    response tokens, the stop token included, from slot 0 on without a hole. ended: the row ended with a stop token.
    whiten_rewards: divide rewards by their scale over live slots, keeping the mean (N+ details, shift_mean=False).
    score_clip: limit scores to +- this; None: the dialect's own limit, if it has one.

    Order: clip scores, KL penalty, add scores, zero after the end, whiten rewards, GAE, whiten advantages. Works in
    the dtype of its inputs, float32 or float64, which they must share.

    Raises UserError for an unknown dialect or whiten_rewards with a dialect that does not whiten, ValueError for
    inputs that break the contract, InvariantError where a rollout leaves nothing to train on.
    """
    dialect = get_dialect(dialect) if isinstance(dialect, str) else dialect
    if whiten_rewards and dialect.whitening is None:
        raise UserError(f"rl.whiten_rewards: dialect {dialect.name!r} has no whitening; set rl.whiten_rewards to false")
    _check_inputs(logprobs, ref_logprobs, values, scores, mask, ended)
    new = mask.shape[1]
    lengths = mask.sum(axis=1)
    slots = np.arange(new)

    # Which slots carry rewards and values at all, which pay the KL penalty, and where the score lands.
    reach = lengths + 1 if dialect.score_slot == "after" else lengths
    live = slots < reach[:, None]
    score_slots = np.minimum(reach, new) - 1
    pays_kl = live if dialect.kl_after else mask
    trained = lengths if dialect.trains_stop else lengths - ended
    policy_mask = slots < trained[:, None]
    value_mask = slots < (lengths + 1)[:, None] if dialect.value_mask == "one_longer" else policy_mask
    if not policy_mask.any():
        raise InvariantError(
            f"every response of this rollout is a lone stop token, which dialect {dialect.name!r} does not train: "
            "nothing to learn from (has the policy collapsed, or does the prompt end with a stop token?)"
        )

    limit = dialect.score_clip if score_clip is None else score_clip
    limited = clip_scores(scores, limit=limit)
    kl = kl_estimate(logprobs, ref_logprobs, estimator=kl_estimator)
    rewards = add_scores(only(kl_penalty(kl, kl_coef=kl_coef), pays_kl), limited, slots=score_slots)
    if whiten_rewards and dialect.whitening is not None:
        rewards = whiten(rewards, live, whitening=replace(dialect.whitening, keep_mean=True))
    live_values = only(values, live)
    advantages, returns = gae(rewards, live_values, gamma=gamma, lam=lam)
    if dialect.whitening is not None:
        advantages = whiten(advantages, policy_mask, whitening=dialect.whitening)
    response_kl = only(kl, mask)
    return Experience(
        rewards=rewards,
        values=live_values,
        advantages=only(advantages, policy_mask),
        returns=only(returns, value_mask),
        policy_mask=policy_mask,
        value_mask=value_mask,
        num_policy_tokens=float(policy_mask.sum()),
        num_value_tokens=float(value_mask.sum()),
        kl=response_kl,
        kl_per_response=response_kl.sum(axis=1),
        num_clipped_scores=int((limited != scores).sum()),
    )


def get_dialect(name: str) -> Dialect:
    """The dialect called `name`. Raises UserError for an unknown one."""
    if name not in DIALECTS:
        raise UserError(f"rl.dialect: unknown dialect {name!r}; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def _check_inputs(
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    values: np.ndarray,
    scores: np.ndarray,
    mask: np.ndarray,
    ended: np.ndarray,
) -> None:
    """ValueError unless shapes, dtypes and the mask are what `experience` promises to understand."""
    rows, new = logprobs.shape
    for name, array, shape in (
        ("ref_logprobs", ref_logprobs, (rows, new)),
        ("values", values, (rows, new)),
        ("scores", scores, (rows,)),
        ("mask", mask, (rows, new)),
        ("ended", ended, (rows,)),
    ):
        if array.shape != shape:
            raise ValueError(f"experience: {name} has shape {array.shape}, expected {shape} (logprobs: {(rows, new)})")
    dtypes = {array.dtype for array in (logprobs, ref_logprobs, values, scores)}
    if len(dtypes) != 1 or dtypes.isdisjoint({np.dtype(np.float32), np.dtype(np.float64)}):
        raise ValueError(f"experience: float inputs must share float32 or float64, got {sorted(map(str, dtypes))}")
    if mask.dtype != np.bool_ or ended.dtype != np.bool_:
        raise ValueError(f"experience: mask and ended must be bool, got {mask.dtype} and {ended.dtype}")
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("experience: each row of mask must be True from slot 0 to the last response token, then False")
