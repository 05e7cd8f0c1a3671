"""The same recipe on DeepSpeed: what each GPU holds at every ZeRO stage (`footprint`), and the same roofline.

Stage by stage with all else as the recipe has it: offloading, the settings of critic, reference and reward, adapters.
What goes between a GPU and host memory takes no time here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from diptych.engine import MASTERS, Precision
from diptych.layout import Zero
from diptych.plan import costs
from diptych.plan.footprint import Phase, cache_per_token, footprint, phases
from diptych.plan.hardware import GPUS_PER_NODE, Accelerator
from diptych.plan.memory import ITEMSIZE, Parts, total_numbers
from diptych.plan.roofline import Rates, Seconds, rates, seconds
from diptych.plan.workload import Rollouts, Workload

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class ZeroPlan:
    """One stage on N GPUs. phase: the fullest; parts: its bytes of each GPU. host: bytes of host memory for each GPU,
    at their most."""

    stage: int
    phase: str
    parts: Parts
    host: float
    times: dict[str, Seconds]
    rates: Rates
    fits: bool

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stages_of(precision: Precision) -> tuple[int, ...]:
    """The stages that train in a precision: where masters have another, those that keep masters."""
    return STAGES if precision == MASTERS[precision] else STAGES[1:]


def at_stage(workload: Workload, stage: int) -> Workload:
    """The workload with `layout.zero.stage` so; what is offloaded stays so where the stage allows it."""
    layout = workload.settings.layout
    zero = Zero(
        stage=stage,
        offload_optimizer=layout.zero.offload_optimizer and stage > 0,
        offload_param=layout.zero.offload_param and stage == 3,
    )
    return replace(workload, settings=replace(workload.settings, layout=replace(layout, zero=zero)))


def plan_zero(
    workload: Workload, gpu: Accelerator, num_gpus: int, *, efficiency: float, price: float
) -> list[ZeroPlan]:
    """Every stage; [] where the recipe has no rl stage."""
    rollouts = workload.rollouts
    if rollouts is None:
        return []
    return [
        _plan(at_stage(workload, stage), rollouts, gpu, num_gpus, efficiency, price)
        for stage in stages_of(workload.settings.precision)
    ]


def _plan(
    workload: Workload, rollouts: Rollouts, gpu: Accelerator, num_gpus: int, efficiency: float, price: float
) -> ZeroPlan:
    found: list[Phase] = phases(workload, num_gpus)
    fullest = max(found, key=lambda phase: phase.total)
    times = _times(workload, rollouts, gpu, num_gpus, efficiency)
    tokens = rollouts.rows * rollouts.new
    return ZeroPlan(
        stage=workload.settings.layout.zero.stage,
        phase=fullest.name,
        parts=fullest.device,
        host=max(phase.host_total for phase in found),
        times=times,
        rates=rates(
            [one.bound for one in times.values()], generated=tokens, trained=trained_tokens(rollouts),
            num_chips=num_gpus, price=price,
        ),
        fits=fullest.total <= gpu.memory,
    )  # fmt: skip


def trained_tokens(rollouts: Rollouts) -> int:
    """Response tokens that an iteration's optimizer steps go through."""
    return rollouts.steps * rollouts.mini_rows * rollouts.new


def _times(
    workload: Workload, rollouts: Rollouts, gpu: Accelerator, num_gpus: int, efficiency: float
) -> dict[str, Seconds]:
    precision, size, layout = workload.compute, ITEMSIZE[workload.compute], workload.settings.layout
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
        policy * share / wire if layout.zero.stage == 3 else 0.0,
    )
    micros = math.ceil(rows / rollouts.micro)
    scoring, update = Seconds(), Seconds()
    for one in rollouts.models:
        held = total_numbers(one.config, one.head) * size
        stage = layout.zero_of(one.role, is_trained=one.optimizer is not None).stage
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
            one.config, rows=rollouts.mini_rows, columns=columns, scored=scored, head=one.head,
            remat=workload.settings.remat, chunks=math.ceil(rollouts.micro / num_gpus) * scored / workload.chunk,
        ) / num_gpus  # fmt: skip
        kept = footprint(one, workload, num_gpus)
        states = sum(kept.device.values()) + sum(kept.host.values())
        # Stages 0 to 2: gradients summed, and (1, 2) weights gathered, once a step; stage 3: weights gathered twice and
        # gradients scattered in every micro-batch.
        moved = held * share * (2 if stage < 3 else 3 * step_micros)
        update = update + seconds(work / peak, (3 * step_micros * held + 2 * states) / hbm, moved / wire).times(
            rollouts.steps
        )
    return {"rollout": rollout, "scoring": scoring, "update": update}
