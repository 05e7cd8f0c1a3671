"""A recipe on a machine, planned: read, compiled, measured, and held against the machine's limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.errors import UserError
from diptych.plan import memory
from diptych.plan.hardware import Accelerator, GiB, Topology, read_gpu, read_topology
from diptych.plan.memory import Parts
from diptych.plan.programs import Program, load_planner
from diptych.plan.roofline import Rates, Seconds, phase_seconds, rates
from diptych.plan.search import Candidate, placed, search
from diptych.plan.workload import Workload, filled, read_workload
from diptych.plan.zero import ZeroPlan, plan_zero, trained_tokens
from diptych.recipe.schema import Recipe

WORKING = "activations, temporaries"
MAX_COMPILED = 3  # layouts that a search compiles at most


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for. price, gpu_price: dollars per chip and hour; None: the table's. gpus: None: as
    many as there are chips."""

    efficiency: float = 1.0
    price: float | None = None
    gpu: str = "h100"
    gpus: int | None = None
    gpu_price: float | None = None
    search: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer. memory: phase -> part -> bytes of a device, the phase at its fullest. too_large: in words, what does
    not fit; None where all does. rates: None where programs were refused. counted: (program, exact bytes of its weights
    and moments, the compiler's)."""

    workload: Workload
    topology: Topology
    options: Options
    programs: tuple[Program, ...]
    memory: dict[str, Parts]
    seconds: dict[str, Seconds]
    rates: Rates | None
    zero: tuple[ZeroPlan, ...]
    gpu: Accelerator
    num_gpus: int
    counted: tuple[tuple[str, float, float], ...]
    too_large: str | None
    found: Candidate | None = None
    candidates: int = 0

    @property
    def price(self) -> float:
        return self.topology.chip.price if self.options.price is None else self.options.price

    @property
    def fits(self) -> bool:
        return self.too_large is None

    def json(self) -> dict[str, Any]:
        """Everything as plain data; bytes, seconds, tokens per second, dollars."""
        chip, layout = self.topology.chip, self.workload.settings.layout
        return {
            "recipe": self.workload.name,
            "topology": self.topology.name,
            "chip": dataclasses.asdict(chip) | {"price": self.price},
            "layout": {"train": layout.train.sizes, "decode": layout.decode.sizes},
            "precision": self.workload.compute,
            "efficiency": self.options.efficiency,
            "fits": self.fits,
            "too_large": self.too_large,
            "memory": self.memory,
            "seconds": {phase: dataclasses.asdict(one) | {"limit": one.limit} for phase, one in self.seconds.items()},
            "rates": self.rates and dataclasses.asdict(self.rates),
            "counted_bytes": [
                {"program": name, "counted": counted, "compiled": compiled} for name, counted, compiled in self.counted
            ],
            "programs": [dataclasses.asdict(one) for one in self.programs],
            "deepspeed": {
                "gpu": dataclasses.asdict(self.gpu),
                "gpus": self.num_gpus,
                "stages": [
                    {
                        "stage": one.stage, "phase": one.phase, "memory": one.parts, "total": one.total,
                        "host": one.host, "fits": one.fits,
                        "seconds": {phase: dataclasses.asdict(part) for phase, part in one.times.items()},
                        "rates": dataclasses.asdict(one.rates),
                    }
                    for one in self.zero
                ],
            },
            "search": self.found and {
                "layouts": self.candidates, "train": self.found.train.sizes, "decode": self.found.decode.sizes,
                "micro_batch_size": self.found.micro,
            },
            "assumptions": assumptions(self),
        }  # fmt: skip


def make_plan(recipe: Recipe, topology: str, options: Options, *, report: Callable[[str], None]) -> Plan:
    """Plan `recipe` on `topology`. report: told of every compilation. UserError for what cannot be planned at all; a
    layout that does not fit comes back with `too_large`."""
    machine = read_topology(topology)
    gpu = read_gpu(options.gpu)
    workload = read_workload(recipe, machine, search=options.search)
    if not workload.supervised and workload.rollouts is None:
        raise UserError(f"{recipe.name}: 'stages': nothing to plan")
    if not options.search:
        return _planned(workload, machine, options, gpu, report)
    found = search(workload, machine)
    report(f"search: {len(found)} layouts fit by the analytic model")
    last: Plan | None = None
    for candidate in found[:MAX_COMPILED]:
        report(f"search: compiling train {candidate.train}, decode {candidate.decode}")
        chosen = placed(workload, candidate.train, candidate.decode, candidate.micro)
        last = _planned(chosen, machine, options, gpu, report)
        last = dataclasses.replace(last, found=candidate, candidates=len(found))
        if last.fits:
            break
        report(f"search: {last.too_large}")
    assert last is not None
    return last


def _planned(
    workload: Workload, machine: Topology, options: Options, gpu: Accelerator, report: Callable[[str], None]
) -> Plan:
    resident = memory.resident(workload)
    too_large = _too_large(resident, machine)
    # What cannot fit by its weights and moments alone is not compiled.
    programs = [] if too_large else load_planner("jax").plan_programs(workload, machine, report=report)
    used = _with_working_memory(resident, programs)
    refused = [one for one in programs if one.refused]
    if too_large is None and refused:
        too_large = _refused(refused[0], used, machine)
    too_large = too_large or _too_large(used, machine)
    num_gpus = options.gpus or machine.num_chips
    times: dict[str, Seconds] = {}
    if not refused:
        times |= phase_seconds(programs, machine.chip, precision=workload.compute, efficiency=options.efficiency)
    price = machine.chip.price if options.price is None else options.price
    gpu_price = gpu.price if options.gpu_price is None else options.gpu_price
    return Plan(
        workload=workload,
        topology=machine,
        options=options,
        programs=tuple(programs),
        memory=used,
        seconds=times,
        rates=_rates(workload, times, machine.num_chips, price),
        zero=tuple(plan_zero(workload, gpu, num_gpus, efficiency=options.efficiency, price=gpu_price)),
        gpu=gpu,
        num_gpus=num_gpus,
        counted=tuple(_counted(workload, programs)),
        too_large=too_large,
    )


def _with_working_memory(resident: dict[str, Parts], programs: list[Program]) -> dict[str, Parts]:
    """The parts of each phase with what its hungriest program needs beside them."""
    used = {phase: dict(parts) for phase, parts in resident.items()}
    for phase, parts in used.items() if programs else ():
        working = 0.0
        for one in programs:
            if one.phase != phase:
                continue
            is_gradients = one.name.endswith("gradients")
            counted = (
                parts["KV cache"] if one.name == "decode" else parts.get("gradients", 0.0) if is_gradients else
                parts["decode copy"] if one.name.startswith("switch") else 0.0
            )  # fmt: skip
            extra = one.extra + (0.0 if one.name.endswith("optimizer") else one.batch)
            working = max(working, extra - (one.output if one.name.startswith("switch") else min(counted, extra)))
        parts[WORKING] = working
    return used


def _too_large(phases: dict[str, Parts], machine: Topology) -> str | None:
    """In words, of the phases that do not fit the one that comes nearest: the others lack more."""
    limit = machine.chip.memory
    too_large = {phase: parts for phase, parts in phases.items() if sum(parts.values()) > limit}
    if not too_large:
        return None
    phase = min(too_large, key=lambda phase: sum(too_large[phase].values()))
    parts = too_large[phase]
    part = max(parts, key=lambda name: parts[name])
    return (
        f"{phase} needs {sum(parts.values()) / GiB:.1f} GiB of each device's {limit / GiB:.1f}; the largest part is "
        f"{part} with {parts[part] / GiB:.1f} GiB: {_advice(part)}"
    )


def _refused(program: Program, used: dict[str, Parts], machine: Topology) -> str:
    parts = {name: size for name, size in used[program.phase].items() if name != WORKING}
    held = sum(parts.values())
    return (
        f"{program.phase}: the compiler refuses {program.name!r} ({program.refused}); weights, moments and copies take "
        f"{held / GiB:.1f} of {machine.chip.memory / GiB:.1f} GiB, so what is too large is its {WORKING}: "
        f"{_advice(WORKING)}"
    )


def _advice(part: str) -> str:
    if part == WORKING:
        return "lower the micro-batch size or logprob_chunk, or give layout.train.tensor more devices (--search looks)"
    if part in ("decode copy", "KV cache"):
        return "give layout.decode.tensor more devices, or sample fewer rows"
    if part.startswith(("reference", "reward")):
        return f"put it into layout.offload, or give layout.{part.split()[0]} more fsdp"
    return "give layout.train more fsdp or tensor, take a larger slice, or train an adapter"


def _counted(workload: Workload, programs: list[Program]) -> list[tuple[str, float, float]]:
    """Weights and moments of each program's arguments: counted from the shapes, and as the compiler lays them out."""
    held = {one.name: one for step in workload.supervised for one in (step.model,)}
    if workload.rollouts is not None:
        held |= {one.name: one for one in workload.rollouts.models}
    found = []
    for one in programs:
        name, _, what = one.name.partition(" ")
        if one.refused or (one.name != "decode" and (name not in held or one.name.startswith("switch"))):
            continue
        if one.name == "decode":
            assert workload.rollouts is not None
            exact = memory.decode_copy(workload.rollouts, workload.compute)
        else:
            parts = memory.held_bytes(held[name], workload)
            weights = parts[f"{name} weights"]
            exact = sum(parts.values()) if what == "optimizer" and held[name].adapter is None else weights
            if held[name].adapter is not None and what == "optimizer":
                trained = memory.trained_numbers(held[name]) * memory.ITEMSIZE[workload.masters]
                exact = sum(parts.values()) - weights + trained
        found.append((one.name, exact, one.argument - one.batch))
    return found


def _rates(workload: Workload, times: dict[str, Seconds], num_chips: int, price: float) -> Rates | None:
    """Of an iteration of rl, where the recipe has one; else of a step of its first stage."""
    if not times:
        return None
    rollouts = workload.rollouts
    if rollouts is not None:
        bounds = [times[phase].bound for phase in ("rollout", "scoring", "update")]
        return rates(
            bounds, generated=rollouts.rows * rollouts.new, trained=trained_tokens(rollouts), num_chips=num_chips,
            price=price,
        )  # fmt: skip
    step = workload.supervised[0]
    return rates(
        [times[step.stage].bound], generated=0, trained=step.rows * step.columns, num_chips=num_chips, price=price
    )


def assumptions(plan: Plan) -> list[str]:
    """Everything that the numbers stand on, one sentence each."""
    chip, gpu, efficiency = plan.topology.chip, plan.gpu, plan.options.efficiency
    precision = plan.workload.compute
    lines = [
        f"{chip.title}: {chip.peak(precision) / 1e12:.4g} TFLOP/s in {precision}, {chip.memory / GiB:.2f} GiB usable "
        f"at {chip.hbm / 1e9:.0f} GB/s, links of {chip.link / 1e9:.0f} GB/s one way, {chip.hop * 1e6:.0f} us a hop; "
        f"${plan.price:.2f} per chip and hour ({'--price' if plan.options.price is not None else chip.price_source})",
        "a phase takes the sum over its programs of the longest of compute, memory and network: a lower bound, "
        + ("every peak reached in full" if efficiency == 1 else f"at {efficiency:.0%} of every peak (--efficiency)"),
        "every prompt fills its bucket and every response takes all its tokens; checkpoints, evaluations, loading and "
        "the host's part are left out",
    ]
    rollouts = plan.workload.rollouts
    if rollouts is not None:
        waste = {one.name for one in rollouts.models if filled(rollouts.micro, one.mesh) != rollouts.micro}
        if waste:
            lines.append(
                f"micro-batches of {rollouts.micro} rows are filled up to the mesh for {', '.join(sorted(waste))}"
            )
        lines.append(
            f"DeepSpeed on {plan.num_gpus} x {gpu.title}: {gpu.peak(precision) / 1e12:.0f} TFLOP/s, "
            f"{gpu.memory / GiB:.0f} GiB at {gpu.hbm / 1e9:.0f} GB/s, {gpu.link / 1e9:.0f} GB/s inside a node of 8, "
            f"{gpu.fabric / 1e9:.0f} GB/s and GPU between nodes; by arithmetic, nothing compiled; what is "
            "offloaded crosses over in no time"
        )
    return lines
