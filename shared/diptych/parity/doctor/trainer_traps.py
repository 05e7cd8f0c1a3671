"""Traps that the trainer's settings and environment show, and those that make a comparison blind. See `trap_finding`
for what a check answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diptych.parity.doctor.setups import Setup
from diptych.parity.doctor.trap_finding import (
    NOT_APPLICABLE,
    Answer,
    Finding,
    differ,
    is_low,
    last,
    on_accelerator,
    only_ours,
    same,
    says,
    shown,
)

_JAX_TRAINERS = ("jax", "tunix", "maxtext", "flax", "easydel", "levanter")
SHORT = 64  # tokens of a row below which position bugs were missed


def constant_group(setup: Setup, other: Setup | None) -> Answer:
    size, eps, zero = (setup.setting(name) for name in ("samples_per_prompt", "group_std_eps", "constant_group"))
    if size is not None and size.value == 1:
        return NOT_APPLICABLE
    if setup.is_ours:
        return []
    if zero is not None and zero.value == "zero":
        return []
    if eps is None:
        return None
    return [says(eps, "group_std_eps", "group_std_eps: 1e-4, or constant_group: zero")] if eps.value < 1e-4 else []


def ignored_labels(setup: Setup, other: Setup | None) -> Answer:
    fact = setup.setting("label_mask")
    if fact is None:
        return None
    is_jax = any(name in (setup.engine or "").lower() for name in _JAX_TRAINERS)
    return [says(fact, "label_mask", "label_mask: mask")] if is_jax and fact.value in ("ignore_index", -100) else []


def positions(setup: Setup, other: Setup | None) -> Answer:
    side, ids = setup.setting("pad_side"), setup.setting("position_ids")
    if ids is None or side is None:
        return None
    wrong = side.value == "left" and ids.value == "arange"
    return (
        [says(ids, "position_ids", "position_ids: mask (cumulative sum of the attention mask, minus 1)")]
        if wrong
        else []
    )


def padding_side(setup: Setup, other: Setup | None) -> Answer:
    """Prompts padded on the right are continued after their padding."""
    found, seen = [], False
    stated = setup.setting("pad_side")
    if stated is not None:
        seen = True
        if stated.value == "right":
            found.append(says(stated, "pad_side", f"{last(stated.key or 'pad_side')}: left"))
    for key, fact in setup.facts.get("tokenizer", {}).items():
        if key.endswith("/padding_side") and not only_ours(setup, other):
            seen = True
            if fact.value == "right" and (stated is None or stated.value != "left"):
                text = f"padding_side is right ({key.split('/')[0]}): generation goes on after the padding"
                found.append(Finding(where=fact.where, found=text, instead='"padding_side": "left"'))
    return found if seen else None


def matmul_precision(setup: Setup, other: Setup | None) -> Answer:
    fact = setup.setting("matmul_precision") or setup.get("variables", "JAX_DEFAULT_MATMUL_PRECISION")
    if fact is None:
        return None
    if fact.value in ("highest", "float32") or on_accelerator(setup) is False:
        return []
    if on_accelerator(setup) is None:
        return None
    text = f"float32 matrix products at precision {shown(fact.value)} on an accelerator: TF32 or bfloat16 passes"
    return [Finding(where=fact.where, found=text, instead="JAX_DEFAULT_MATMUL_PRECISION=highest (torch: 'highest')")]


def tf32(setup: Setup, other: Setup | None) -> Answer:
    found, seen = [], False
    for name in ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
        fact = setup.get("variables", name)
        if fact is not None:
            seen = True
            if str(fact.value) == "1":
                found.append(Finding(where=fact.where, found=f"{name} is 1", instead=f"{name}=0"))
    fact = setup.setting("tf32")
    if fact is not None:
        seen = True
        if fact.value is True:
            found.append(says(fact, "tf32", "tf32: false (matmul and cuDNN)"))
    return found if seen else None


def reductions(setup: Setup, other: Setup | None) -> Answer:
    found, seen = [], False
    flags = setup.get("variables", "XLA_FLAGS")
    if "variables" in setup.complete:
        seen = True  # not there is not set
    if flags is not None:
        seen = True
        for flag in _loose_flags(str(flags.value)):
            found.append(
                Finding(where=flags.where, found=f"XLA_FLAGS has {flag}", instead=f"{flag.split('=')[0]}=false")
            )
    fact = setup.setting("bf16_reduced_reduction")
    if fact is not None:
        seen = True
        if fact.value is True and is_low(setup):
            found.append(says(fact, "bf16_reduced_reduction", "allow_bf16_reduced_precision_reduction = False"))
    return found if seen else None


def _loose_flags(text: str) -> Iterator[str]:
    for flag in text.split():
        name, _, value = flag.partition("=")
        if re.search(r"fast_math$|fast_min_max$|excess_precision$", name) and value.lower() not in ("false", "0"):
            yield flag


def x64(setup: Setup, other: Setup | None) -> Answer:
    precision = setup.setting("precision")
    if precision is None:
        return None
    if precision.value != "float64":
        return NOT_APPLICABLE
    fact = setup.setting("x64") or setup.get("variables", "JAX_ENABLE_X64")
    if fact is None:
        return None
    if fact.value is False or str(fact.value).lower() in ("0", "false", "off"):
        text = f"float64 is asked for, and 64 bits are off ({shown(fact.value)}): JAX computes in float32, silently"
        return [Finding(where=fact.where, found=text, instead="JAX_ENABLE_X64=1")]
    return []


def eps_placement(setup: Setup, other: Setup | None) -> Answer:
    fact = setup.setting("eps_placement")
    if fact is None:
        return None
    text = str(fact.value).lower().replace("_", " ").replace("-", " ")
    return [] if text in ("algorithm 1", "outside") else [says(fact, "eps_placement", "eps_placement: algorithm 1")]


def decay_mask(a: Setup, b: Setup) -> Answer:
    decays = [setup.setting("weight_decay") for setup in (a, b)]
    if all(fact is not None and fact.value == 0 for fact in decays):
        return NOT_APPLICABLE
    return differ("weight_decay_mask")(a, b)


def schedule_offset(setup: Setup, other: Setup | None) -> Answer:
    course, warmup, offset = (setup.setting(name) for name in ("schedule", "warmup_steps", "schedule_offset"))
    if course is not None and course.value == "constant" and warmup is not None and not warmup.value:
        return NOT_APPLICABLE
    if offset is None:
        return None
    return [says(offset, "schedule_offset", "schedule_offset: 0")] if offset.value else []


def accumulation(setup: Setup, other: Setup | None) -> Answer:
    how, whole, part = (setup.setting(name) for name in ("gradient_accumulation", "batch_size", "micro_batch_size"))
    if whole is not None and part is not None and part.value >= whole.value:
        return NOT_APPLICABLE
    if how is None:
        return None
    wrong = how.value == "mean_of_means"
    return [says(how, "gradient_accumulation", "gradient_accumulation: token_mean")] if wrong else []


def init(setup: Setup, other: Setup | None) -> Answer:
    fact = setup.setting("init")
    if fact is None:
        return None
    wrong = fact.value in ("framework", "framework default", "default")
    return [says(fact, "init", "load one checkpoint on both sides")] if wrong else []


def weights_differ(a: Setup, b: Setup) -> Answer:
    left, right = (setup.facts.get("weights", {}) for setup in (a, b))
    roles = [role for role in left if role in right and "/" not in role]
    roles = [role for role in roles if len(str(left[role].value)) == len(str(right[role].value))]
    if not roles:
        return None
    return [
        Finding(
            where=right[role].where,
            found=f"{role}'s weights are {str(right[role].value)[:12]}, and {str(left[role].value)[:12]} at "
            f"{left[role].where}",
            instead="start both from one model directory (and one seed)",
        )
        for role in roles
        if left[role].value != right[role].value
    ]


def tensor_counts(a: Setup, b: Setup) -> Answer:
    left, right = (setup.facts.get("weights", {}) for setup in (a, b))
    roles = [role for role in left if role in right and role.endswith("/tensors")]
    return [
        Finding(
            where=right[role].where,
            found=f"{right[role].value} tensors of {role.split('/')[0]}, and {left[role].value} at {left[role].where}",
            instead="one name for each tensor on both sides, nothing left over",
        )
        for role in roles
        if left[role].value != right[role].value
    ] or ([] if roles else None)


def temperature(setup: Setup, other: Setup | None) -> Answer:
    sampled, scored = setup.setting("temperature"), setup.setting("logprob_temperature")
    if sampled is None:
        return None
    if scored is None:
        return [] if sampled.value == 1 else None
    if same(sampled.value, scored.value):
        return []
    return [says(scored, "logprob_temperature", f"logprob_temperature: {sampled.value}, the sampling temperature")]


def ties(setup: Setup, other: Setup | None) -> Answer:
    if setup.is_ours:
        return []
    top_k, heat = setup.setting("top_k"), setup.setting("temperature")
    if top_k is None and heat is None:
        return None
    greedy = (top_k is not None and top_k.value) or (heat is not None and heat.value == 0)
    if not greedy:
        return []
    if setup.setting("precision") is None:
        return None
    fact = top_k if top_k is not None and top_k.value else heat
    assert fact is not None
    return [says(fact, "top_k", "top_k: 0, or logits upcast to float32 first")] if is_low(setup) else []


# What makes a comparison blind.


def on_policy(setup: Setup, other: Setup | None) -> Answer:
    """One update a rollout: the ratio is 1 and the loss -mean(advantage), whatever the model computes."""
    if setup.recipe is not None and "rl" not in setup.recipe.stages:
        return NOT_APPLICABLE
    epochs, minis, moved = (setup.setting(name) for name in ("epochs", "mini_batches", "perturbation"))
    if epochs is None or minis is None:
        return None
    perturbed = (moved is not None and moved.value) or (setup.is_ours and setup.depth not in (None, "metrics"))
    if epochs.value * minis.value != 1 or perturbed:
        return []
    return [says(epochs, "epochs", "epochs: 2 (or record at depth tensors, which perturbs old log-probabilities)")]


def short_rows(setup: Setup, other: Setup | None) -> Answer:
    prompt, new = setup.setting("max_prompt_tokens"), setup.setting("max_new_tokens")
    if prompt is None or new is None:
        return None
    if prompt.value + new.value >= SHORT:
        return []
    text = f"at most {prompt.value} + {new.value} tokens a row"
    return [
        Finding(where=prompt.where, found=text, instead=f"{last(prompt.key or 'max_prompt_tokens')}: {SHORT} or more")
    ]


def bfloat16(setup: Setup, other: Setup | None) -> Answer:
    fact = setup.setting("precision")
    if fact is None:
        return None
    return [says(fact, "precision", "precision: float32 (or float64)")] if is_low(setup) else []


def clipped(setup: Setup, other: Setup | None) -> Answer:
    """Scores beyond a limit look alike, and texts that were cut are other texts."""
    found, seen = [], False
    clip = setup.setting("score_clip")
    if clip is not None:
        seen = True
        if clip.value is not None:
            found.append(says(clip, "score_clip", "score_clip above every score (a dialect's own: rl.score_clip)"))
    for key in ("data.too_long", "rl.reward.too_long"):
        fact = setup.get("recipe", key)
        if fact is not None:
            seen = True
            if fact.value == "truncate":
                found.append(Finding(where=fact.where, found=f"{key} is truncate", instead="too_long: error"))
    return found if seen else None


def stop_token(setup: Setup, other: Setup | None) -> Answer:
    if setup.recipe is not None and "rl" not in setup.recipe.stages:
        return NOT_APPLICABLE
    fact = setup.setting("trains_stop")
    if fact is None:
        return None
    if fact.value:
        return []
    text = "the stop token is in no loss: the policy does not learn to stop (DeepSpeed-Chat's pad == eos)"
    instead = "dialect: reference (or dschat-pad)" if setup.recipe is not None else "trains_stop: true"
    return [Finding(where=fact.where, found=text, instead=instead)]
