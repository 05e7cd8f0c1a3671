"""The same recipe on DeepSpeed: what each GPU holds at every ZeRO stage, and the same roofline.

Rajbhandari et al. 2020 (ZeRO: Memory Optimizations Toward Training Trillion Parameter Models), section 5: of a model
with P parameters on N GPUs each holds

    stage     weights       gradients     optimizer (AdamW)
    0         w P           g P           o P
    1         w P           g P           o P / N
    2         w P           g P / N       o P / N
    3         w P / N       g P / N       o P / N

with w = 4, g = 4, o = 8 bytes in float32, and w = 2, g = 2, o = 12 (a float32 copy and two moments) in bfloat16. Frozen
models are whole on every GPU up to stage 2 and split at stage 3. Decoding takes the training weights: at stage 3 they
are gathered, whole, for the rollout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig
from diptych.plan import costs
from diptych.plan.hardware import GPUS_PER_NODE, Accelerator
from diptych.plan.memory import ITEMSIZE, Parts, total_numbers
from diptych.plan.roofline import Rates, Seconds, rates, seconds
from diptych.plan.workload import Held, Rollouts, Workload

STAGES = (0, 1, 2, 3)
# Bytes for each parameter: weights, gradients, optimizer.
BYTES = {"float32": (4, 4, 8), "float64": (8, 8, 16), "bfloat16": (2, 2, 12)}


@dataclass(frozen=True, kw_only=True)
class ZeroPlan:
    """One stage on N GPUs. parts: bytes of each GPU at its fullest; micro: rows of a GPU at a time."""

    stage: int
    parts: Parts
    times: dict[str, Seconds]
    rates: Rates
    fits: bool

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def trained_bytes(numbers: float, stage: int, num_gpus: int, precision: str) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state of a GPU, of a model that trains all of its `numbers` parameters."""
    weights, gradients, states = BYTES[precision]
    return (
        numbers * weights / (num_gpus if stage == 3 else 1),
        numbers * gradients / (num_gpus if stage >= 2 else 1),
        numbers * states / (num_gpus if stage >= 1 else 1),
    )


def model_bytes(held: Held, stage: int, num_gpus: int, precision: str) -> Parts:
    """What one model keeps on each GPU. (An adapter's own gradients and moments, of a hundredth of the parameters, are
    left out.)"""
    numbers, name = total_numbers(held.config, held.head), held.name
    weights, gradients, states = trained_bytes(numbers, stage, num_gpus, precision)
    parts: Parts = {f"{name} weights": weights}
    if held.optimizer is not None and held.adapter is None:
        parts |= {f"{name} gradients": gradients, f"{name} optimizer": states}
        if held.optimizer.ema_decay is not None:
            parts[f"{name} average"] = numbers * 4 / (num_gpus if stage >= 1 else 1)
    return parts


def plan_zero(
    workload: Workload, gpu: Accelerator, num_gpus: int, *, efficiency: float, price: float
) -> list[ZeroPlan]:
    """Every stage; [] where the recipe has no rl stage."""
    rollouts = workload.rollouts
    if rollouts is None:
        return []
    return [_plan(workload, rollouts, gpu, num_gpus, stage, efficiency, price) for stage in STAGES]


def _plan(
    workload: Workload, rollouts: Rollouts, gpu: Accelerator, num_gpus: int, stage: int, efficiency: float, price: float
) -> ZeroPlan:
    precision, config = workload.compute, rollouts.policy.config
    size = ITEMSIZE[precision]
    parts: Parts = {}
    for one in rollouts.models:
        parts |= model_bytes(one, stage, num_gpus, precision)
    policy = total_numbers(config, "lm")
    in_rollout: Parts = {
        "decode copy": policy * size if stage == 3 else 0.0,
        "KV cache": math.ceil(rollouts.rows / num_gpus) * rollouts.columns * cache_per_token(config, size),
    }
    in_update: Parts = {
        "activations": costs.activations(
            config, rows=math.ceil(rollouts.micro / num_gpus), columns=rollouts.columns, tensor=1, itemsize=size,
            remat="full", chunk=workload.chunk, head="lm", training=True, flash=precision == "bfloat16",
        )
    }  # fmt: skip
    # The two never lie there together; the fuller one counts.
    parts |= max((in_rollout, in_update), key=lambda part: sum(part.values()))
    times = _times(workload, rollouts, gpu, num_gpus, stage, efficiency)
    tokens = rollouts.rows * rollouts.new
    return ZeroPlan(
        stage=stage,
        parts=parts,
        times=times,
        rates=rates(
            [one.bound for one in times.values()], generated=tokens, trained=trained_tokens(rollouts),
            num_chips=num_gpus, price=price,
        ),
        fits=sum(parts.values()) <= gpu.memory,
    )  # fmt: skip


def cache_per_token(config: ModelConfig, itemsize: int) -> float:
    """Bytes of keys and values of one column of one row."""
    if not isinstance(config, DecoderConfig):
        return 0.0
    return 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def trained_tokens(rollouts: Rollouts) -> int:
    """Response tokens that an iteration's optimizer steps go through."""
    return rollouts.steps * rollouts.mini_rows * rollouts.new


def _times(
    workload: Workload, rollouts: Rollouts, gpu: Accelerator, num_gpus: int, stage: int, efficiency: float
) -> dict[str, Seconds]:
    precision, size = workload.compute, ITEMSIZE[workload.compute]
    peak, hbm = gpu.peak(precision) * efficiency, gpu.hbm * efficiency
    # One GPU's share of what leaves its node, or of the links inside it where all are in one.
    wire = (gpu.link if num_gpus <= GPUS_PER_NODE else min(gpu.link, GPUS_PER_NODE * gpu.fabric)) * efficiency
    share = (num_gpus - 1) / num_gpus
    config, rows, columns, prompt, new = (
        rollouts.policy.config, rollouts.rows, rollouts.columns, rollouts.prompt, rollouts.new,
    )  # fmt: skip
    policy = total_numbers(config, "lm") * size
    local = math.ceil(rows / num_gpus)
    # Every step of decoding reads all weights, and on the average half of the new columns beside the prompt's.
    cache = local * (prompt + new / 2) * cache_per_token(config, size)
    rollout = seconds(
        costs.decoding(config, rows=local, prompt=prompt, new=new) / peak,
        new * (policy + cache) / hbm,
        policy * share / wire if stage == 3 else 0.0,
    )
    micros = math.ceil(rows / rollouts.micro)
    scoring, update = Seconds(), Seconds()
    for one in rollouts.models:
        held = total_numbers(one.config, one.head) * size
        scored = new if one.head == "lm" else columns
        passes = 2 if one.role == "policy" and rollouts.reference is None else 1
        work = costs.forward(one.config, rows=rows, columns=columns, scored=scored, head=one.head).all / num_gpus
        scoring = scoring + seconds(
            work / peak, micros * held / hbm, micros * held * share / wire if stage == 3 else 0.0
        ).times(passes)
        if one.optimizer is None:
            continue
        step_micros = math.ceil(rollouts.mini_rows / rollouts.micro)
        work = costs.training(
            one.config, rows=rollouts.mini_rows, columns=columns, scored=scored, head=one.head, remat="full"
        ) / num_gpus  # fmt: skip
        states = sum(model_bytes(one, stage, num_gpus, precision).values())
        # Stages 0 to 2: gradients summed, and (1, 2) weights gathered, once a step; stage 3: weights gathered twice and
        # gradients scattered in every micro-batch.
        moved = held * share * (2 if stage < 3 else 3 * step_micros)
        update = update + seconds(work / peak, (3 * step_micros * held + 2 * states) / hbm, moved / wire).times(
            rollouts.steps
        )
    return {"rollout": rollout, "scoring": scoring, "update": update}
