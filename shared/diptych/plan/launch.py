"""Does a run fit where it is about to start? Counted before any model is made, phase by phase (`footprint`).

Where it does not, the error names the part that is largest and settings that would make it fit: each is tried with the
same arithmetic, from those that cost least to those that cost most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diptych.engine import AdapterSpec, Memory
from diptych.errors import UserError
from diptych.plan.footprint import ESTIMATED, Phase, phases
from diptych.plan.hardware import GiB
from diptych.plan.memory import Parts
from diptych.plan.report import memory_table
from diptych.plan.workload import NOTHING, Held, Known, Rollouts, Workload, read_workload
from diptych.plan.zero import stages_of
from diptych.recipe.schema import AdapterRecipe, Recipe, Stage

SURE = 0.75  # share of an estimated part that is sure to be needed: a run is refused for no more than that
TIGHT = 0.9  # share of the memory from which on a plan that fits is called tight
MAX_PROCESSES = 4096  # looked at for an answer to "how many more?"
CHUNKS = (512, 256, 128)  # of the vocabulary, offered in place of larger ones
ADAPTER = "adapter={}"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run on `num_processes` processes that may each fill `memory`."""

    workload: Workload
    num_processes: int
    memory: Memory

    @property
    def phases(self) -> list[Phase]:
        return phases(self.workload, self.num_processes)


def plan_launch(
    recipe: Recipe,
    stages: Sequence[Stage],
    *,
    num_processes: int,
    memory: Memory,
    known: Known = NOTHING,
) -> Launch:
    """`stages` of a recipe on the torch engine. UserError for a ZeRO stage that does not train in the precision."""
    workload = read_workload(replace(recipe, stages=tuple(stages)), None, known=known)
    if not _is_valid(workload):
        stages_there = ", ".join(map(str, stages_of(recipe.precision)))
        raise UserError(f"layout.zero.stage: precision {recipe.precision} is trained at stages {stages_there}")
    if memory.device is None:  # nothing to move between the host and a device
        workload = _each(workload, lambda held: replace(held, offloaded=False))
    return Launch(workload=workload, num_processes=num_processes, memory=memory)


def describe_launch(launch: Launch) -> str:
    """The table: bytes of each GPU by part and phase, and of host memory where something lies there."""
    count, memory = launch.num_processes, launch.memory
    of_each = f"each of {count} processes" if count > 1 else "the process"
    found = launch.phases
    if memory.device is None:
        pools = {phase.name: phase.device | _in_host(phase.host) for phase in found}
        lines = memory_table(f"memory of {of_each}", pools, dict.fromkeys(pools, memory.host))
    else:
        device = {phase.name: phase.device for phase in found}
        lines = memory_table(f"memory of {of_each} on its device", device, dict.fromkeys(device, memory.device))
        host = {phase.name: phase.host for phase in found if phase.host}
        if host:
            lines += memory_table(f"memory of {of_each} in its host", host, dict.fromkeys(host, memory.host))
    tight = [one.phase for one in misfits(launch, share=TIGHT, estimated=1.0)]
    if tight and not misfits(launch):
        lines.append(f"tight: {', '.join(tight)} (above {TIGHT:.0%}; {', '.join(ESTIMATED)} are estimates)")
    return "\n".join(lines)


def check_launch(launch: Launch) -> None:
    """UserError where a phase needs more than a process may fill: which, its largest part, and what to set."""
    lacking = misfits(launch)
    if not lacking:
        return
    worst = max(lacking, key=lambda one: one.needed / one.limit)
    part = max(worst.parts, key=lambda name: worst.parts[name])
    text = (
        f"{worst.phase} needs {_size(worst.needed)} of {worst.place}, and {_size(worst.limit)} are free; the largest "
        f"part is {part} with {_size(worst.parts[part])}"
    )
    raise UserError(f"{text}: {_advice(launch)}")


# What does not fit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A phase that needs more bytes in a place than are there. needed: what it needs for sure."""

    phase: str
    place: str
    parts: Parts
    needed: float
    limit: float


def misfits(launch: Launch, *, share: float = 1.0, estimated: float = SURE) -> list[Misfit]:
    """Every phase that cannot fit into this share of the device's, or of host memory. estimated: the share of
    `ESTIMATED` that counts."""
    found: list[Misfit] = []
    memory = launch.memory
    for phase in launch.phases:
        places = [("host memory", phase.host, memory.host), ("the device's memory", phase.device, memory.device)]
        if memory.device is None:
            places = [("host memory", phase.device | _in_host(phase.host), memory.host)]
        for place, parts, limit in places:
            needed = sum(size * (estimated if name in ESTIMATED else 1.0) for name, size in parts.items())
            if limit is not None and needed > share * limit:
                found.append(Misfit(phase=phase.name, place=place, parts=parts, needed=needed, limit=float(limit)))
    return found


def _in_host(parts: Parts) -> Parts:
    """Parts under names of their own: a model may lie partly on the device and partly in the host."""
    return {f"{name} (host)": size for name, size in parts.items()}


def _size(size: float) -> str:
    return f"{size / GiB:.1f} GiB" if size > GiB / 10 else f"{size / 2**20:.1f} MiB"


# What would make it fit --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting of the recipe (`key=value`, as the command line takes it), and the workload that follows from it."""

    setting: str
    apply: Callable[[Workload], Workload]


Knob = Sequence[Change]  # one setting's values, the one that changes least first


def remedy(launch: Launch) -> list[Change]:
    """The fewest and cheapest changes that make the launch fit; [] where no settings do."""

    def fits(changes: Sequence[Change]) -> bool:
        workload = _with(launch.workload, changes)
        return _is_valid(workload) and not misfits(replace(launch, workload=workload), estimated=1.0)

    knobs = _knobs(launch)
    for knob in knobs:
        for one in knob:
            if fits([one]):
                return [one]
    # Not one alone: the strongest value of each together, until all fits; then without those that are not needed.
    chosen: list[Knob] = []
    for knob in knobs:
        chosen.append(knob)
        if fits([one[-1] for one in chosen]):
            break
    else:
        return []
    for knob in reversed(chosen[:-1]):
        without = [one for one in chosen if one is not knob]
        if fits([one[-1] for one in without]):
            chosen = without
    changes = [knob[-1] for knob in chosen]
    for index, knob in enumerate(chosen):
        changes[index] = next(
            one for one in knob if one is knob[-1] or fits([*changes[:index], one, *changes[index + 1 :]])
        )
    return changes


def _advice(launch: Launch) -> str:
    if changes := remedy(launch):
        changed = replace(launch, workload=_with(launch.workload, changes))
        fullest = max(changed.phases, key=lambda phase: phase.total)
        settings = " ".join(one.setting for one in changes)
        return f"set {settings} (then {_size(fullest.total)} at the fullest, in {fullest.name})"
    settings = [knob[-1] for knob in _knobs(launch) if not knob[-1].setting.endswith(ADAPTER)]
    for changes in ([], settings):
        workload = _with(launch.workload, changes)
        count = launch.num_processes * 2
        while _is_valid(workload) and count <= MAX_PROCESSES:
            if not misfits(replace(launch, workload=workload, num_processes=count), estimated=1.0):
                words = "".join(f" {one.setting}" for one in changes)
                return f"no settings make it fit here; {count} such processes would do{words and ', with' + words}"
            count *= 2
    return "neither settings nor more processes make it fit: take a smaller model, or devices with more memory"


def _with(workload: Workload, changes: Sequence[Change]) -> Workload:
    for one in changes:
        workload = one.apply(workload)
    return workload


def _is_valid(workload: Workload) -> bool:
    """May a recipe say so (`recipe.checks`), and does the engine train so?"""
    zero = workload.settings.layout.zero
    return (
        zero.stage in stages_of(workload.settings.precision)
        and (zero.stage > 0 or not zero.offload_optimizer)
        and (zero.stage == 3 or not zero.offload_param)
    )


def _knobs(launch: Launch) -> list[Knob]:
    """The settings that take less memory than the workload's own, the cheapest first."""
    workload, has_device = launch.workload, launch.memory.device is not None
    settings, rollouts = workload.settings, workload.rollouts
    stages = [step.stage for step in workload.supervised] + (["rl"] if rollouts is not None else [])
    knobs: list[Knob] = [_micro(workload, stage, launch.num_processes) for stage in stages]
    knobs.append([
        Change(setting=f"logprob_chunk={size}", apply=lambda one, size=size: replace(one, chunk=size))
        for size in CHUNKS if size < workload.chunk
    ])  # fmt: skip
    if settings.remat != "full":
        knobs.append([Change(setting="layout.remat=full", apply=lambda one: _set(one, remat="full"))])
    if rollouts is not None:
        knobs.append(_decode_rows(rollouts, launch.num_processes))
        waiting = tuple(one.role for one in rollouts.models if one.optimizer is None)
        if has_device and waiting and set(waiting) > set(settings.layout.offload):
            knobs.append([Change(setting=f"layout.offload=[{','.join(waiting)}]", apply=_offloaded)])
    knobs.append([_zero(stage=stage) for stage in (1, 2, 3) if stage > settings.layout.zero.stage])
    if has_device:
        knobs += [[_zero(offload_optimizer=True)], [_zero(offload_param=True)]]
    knobs += [_adapted(workload, stage) for stage in (*stages, *(["critic"] if rollouts is not None else []))]
    return [knob for knob in knobs if knob]


def _set(workload: Workload, **fields: Any) -> Workload:
    return replace(workload, settings=replace(workload.settings, **fields))


def _each(workload: Workload, change: Callable[[Held], Held], stage: str | None = None) -> Workload:
    """`change` on every model; stage: on those of one stage of sft and reward only."""
    supervised = tuple(
        replace(step, model=change(step.model)) if stage in (None, step.stage) else step for step in workload.supervised
    )
    rollouts = workload.rollouts
    if stage is None and rollouts is not None:
        names = ("policy", "critic", "reference", "reward")
        held = {name: getattr(rollouts, name) for name in names}
        rollouts = replace(rollouts, **{name: one and change(one) for name, one in held.items()})
    return replace(workload, supervised=supervised, rollouts=rollouts)


def _offloaded(workload: Workload) -> Workload:
    return _each(workload, lambda held: replace(held, offloaded=held.optimizer is None))


def _zero(**fields: Any) -> Change:
    ((name, value),) = fields.items()
    shown = "cpu" if value is True else value

    def apply(workload: Workload) -> Workload:
        layout = workload.settings.layout
        return _set(workload, layout=replace(layout, zero=replace(layout.zero, **fields)))

    return Change(setting=f"layout.zero.{name}={shown}", apply=apply)


def _micro(workload: Workload, stage: str, num_processes: int) -> Knob:
    """Smaller micro-batches: such as divide an optimizer step's rows, and give each process fewer."""
    if stage == "rl":
        assert workload.rollouts is not None
        rows, micro, ways = workload.rollouts.mini_rows, workload.rollouts.micro, 1
    else:
        step = next(one for one in workload.supervised if one.stage == stage)
        ways = 1 if stage == "sft" else 2
        rows, micro = step.rows // ways, step.micro // ways

    def apply(one: Workload, size: int) -> Workload:
        if stage == "rl":
            assert one.rollouts is not None
            return replace(one, rollouts=replace(one.rollouts, micro=size))
        supervised = (replace(step, micro=size * ways) if step.stage == stage else step for step in one.supervised)
        return replace(one, supervised=tuple(supervised))

    return [
        Change(setting=f"{stage}.micro_batch_size={size}", apply=lambda one, size=size: apply(one, size))
        for size in range(micro - 1, 0, -1)
        if rows % size == 0 and -(-size * ways // num_processes) < -(-micro * ways // num_processes)
    ]  # fmt: skip


def _decode_rows(rollouts: Rollouts, num_processes: int) -> Knob:
    """Fewer rows that decode at once, down to one of each process."""

    def apply(one: Workload, rows: int) -> Workload:
        assert one.rollouts is not None
        return replace(one, rollouts=replace(one.rollouts, sampling=replace(one.rollouts.sampling, decode_rows=rows)))

    rows = max(rollouts.rows, rollouts.evaluated)
    rows = min(rollouts.sampling.decode_rows or rows, rows)
    sizes = [rows >> halvings for halvings in range(1, rows.bit_length()) if rows >> halvings >= num_processes]
    return [
        Change(setting=f"rollout.decode_rows={size}", apply=lambda one, size=size: apply(one, size)) for size in sizes
    ]


def _adapted(workload: Workload, stage: str) -> Knob:
    """An adapter of the recipe's default rank in place of all weights."""
    default = AdapterRecipe()
    spec = AdapterSpec(rank=default.rank, alpha=default.alpha, targets=default.targets)
    rollouts = workload.rollouts

    def adapted(held: Held) -> Held:
        return replace(held, adapter=spec)

    if stage in ("sft", "reward"):
        if next(one for one in workload.supervised if one.stage == stage).model.adapter is not None:
            return []
        return [Change(setting=f"{stage}.{ADAPTER}", apply=lambda one: _each(one, adapted, stage))]
    assert rollouts is not None
    is_policy = stage == "rl"
    if (rollouts.policy if is_policy else rollouts.critic).adapter is not None:
        return []

    def apply(one: Workload) -> Workload:
        assert one.rollouts is not None
        if is_policy:  # below a new adapter is the reference
            changed = replace(one.rollouts, policy=adapted(one.rollouts.policy), reference=None)
        else:
            changed = replace(one.rollouts, critic=adapted(one.rollouts.critic))
        return replace(one, rollouts=changed)

    return [Change(setting=f"rl.{ADAPTER}" if is_policy else f"rl.critic_{ADAPTER}", apply=apply)]
