"""Clip flags of the probe batch that rounding turns: near-ties of the loss, as there are near-ties of tokens.

A PPO loss is continuous where a ratio or a value crosses the edge of its clip range, its gradient is not. Where both
sides' outputs lie within noise of an edge, on either side of it, the share of clipped tokens and the gradients differ
honestly: they are told of and not compared in that step. A wrong clip range is no such thing: the flags are taken here
from both sides' outputs with *one* range, so what differs is the outputs alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diptych.parity.trace import Step, Trace
from diptych.recipe.load import recipe_from_text
from diptych.recipe.schema import Recipe


def clip_ranges(trace: Trace) -> dict[str, float]:
    """Clip range by role, of the recipe that the trace was recorded with; {} where that is not known."""
    text = trace.provenance.get("recipe")
    if text is None:
        return {}
    return clip_ranges_of(recipe_from_text(text, name=str(trace.directory / "trace.json")))


def clip_ranges_of(recipe: Recipe) -> dict[str, float]:
    """Clip range by role."""
    return {"policy": recipe.rl.clip_range, "critic": recipe.rl.value_clip_range}


def turned_clips(a: Step, b: Step, ranges: Mapping[str, float], *, noise: float) -> dict[str, int]:
    """How many flags of each role's probe batch both sides' outputs set differently, where each of them is a near-tie:
    at most `noise` (nats, or units of value) from the edge. Roles with another flip, or with none, are left out."""
    found = {}
    for role, flags in (("policy", _ratios), ("critic", _values)):
        arrays = a.under(f"{role}/probe/arrays")
        outputs = [side.tensors.get(f"{role}/outputs") for side in (a, b)]
        if role not in ranges or outputs[0] is None or outputs[1] is None:
            continue
        if outputs[0].values.shape != outputs[1].values.shape:
            continue
        sides = [flags(one.values.astype(np.float64), arrays, ranges[role]) for one in outputs if one is not None]
        if any(one is None for one in sides):
            continue
        (flag_a, margin_a), (flag_b, margin_b) = (one for one in sides if one is not None)
        turned = (flag_a != flag_b) & arrays["mask"].astype(bool)
        if turned.any() and float(np.maximum(margin_a, margin_b)[turned].max()) <= noise:
            found[role] = int(turned.sum())
    return found


def _ratios(
    logprobs: np.ndarray, arrays: Mapping[str, np.ndarray], clip: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Which terms of `ppo_policy_loss` are clipped, and how far in nats each lies from its edge."""
    if not {"old_logprobs", "advantages", "mask"} <= arrays.keys() or arrays["mask"].shape != logprobs.shape:
        return None
    gain = arrays["advantages"] > 0
    log_ratio = logprobs - arrays["old_logprobs"]
    edge = np.where(gain, np.log1p(clip), np.log1p(-clip) if clip < 1 else -np.inf)
    beyond = np.where(gain, log_ratio > edge, log_ratio < edge) & (arrays["advantages"] != 0)
    return beyond, np.abs(log_ratio - edge)


def _values(scores: np.ndarray, arrays: Mapping[str, np.ndarray], clip: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Which terms of `ppo_value_loss` are clipped, and how far each lies from where that turns: a value at the edge of
    its range, or a return in the middle between a value and its clipped self."""
    if not {"columns", "old_values", "returns", "mask"} <= arrays.keys() or len(arrays["columns"]) != len(scores):
        return None
    values = np.take_along_axis(scores, arrays["columns"].astype(np.int64), axis=1)
    old, returns = arrays["old_values"].astype(np.float64), arrays["returns"].astype(np.float64)
    clipped = np.clip(values, old - clip, old + clip)
    outside = np.abs(values - old) - clip
    middle = np.where(outside > 0, np.abs((values + clipped) / 2 - returns), np.inf)
    return (clipped - returns) ** 2 > (values - returns) ** 2, np.minimum(np.abs(outside), middle)
