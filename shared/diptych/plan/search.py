"""Which layout: every mesh that divides the models, ranked by an analytic model of its memory and time.

The model is coarse (it knows no compiler), so the caller compiles the best and takes the next where that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from diptych.errors import UserError
from diptych.families.family import model_slots
from diptych.layout import DECODE_RULES, MeshShape, check_slots
from diptych.plan import costs, memory
from diptych.plan.hardware import Topology
from diptych.plan.memory import ITEMSIZE, total_numbers
from diptych.plan.roofline import Seconds, seconds
from diptych.plan.workload import Held, Rollouts, Workload, filled

LANES = 128  # fewer columns of a parameter on a device, and a TPU's compiler sums gradients where it could scatter them
ACTIVATION_TRAFFIC = 30  # how often a layer's input passes through memory, forward and backward
RESERVE = 0.9  # share of the memory that a layout may take by this model, which sees no fragmentation


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, and what the analytic model says of it: bytes of a device at its fullest, seconds of an iteration (or
    of a step of each stage). micro: rows of rl at a time; 0 without rl."""

    train: MeshShape
    decode: MeshShape
    micro: int
    bytes: float
    seconds: float

    @property
    def recipe_lines(self) -> str:
        """What to write into the recipe."""
        train = ", ".join(f"{name}: {size}" for name, size in self.train.sizes.items())
        decode = f"data: {self.decode.data}, tensor: {self.decode.tensor}"
        lines = f"layout:\n  train: {{{train}}}\n  decode: {{{decode}}}"
        return f"{lines}\nrl:\n  micro_batch_size: {self.micro}" if self.micro else lines


def search(workload: Workload, topology: Topology) -> list[Candidate]:
    """All layouts that fit by the analytic model, the fastest first. UserError where none does."""
    found = [
        _candidate(placed(workload, train, decode, micro), topology, train, decode, micro)
        for train, decode, micro in _layouts(workload, topology)
    ]
    limit = topology.chip.memory
    fitting = [one for one in found if one.bytes <= RESERVE * limit]
    if not fitting:
        least = min((one.bytes for one in found), default=math.inf)
        raise UserError(
            f"--search: no layout fits {topology.name}: the smallest needs about {least / 2**30:.1f} GiB of each "
            f"device's {limit / 2**30:.1f}; take a larger slice, precision: bfloat16, layout.offload or an adapter"
        )
    return sorted(fitting, key=lambda one: (one.seconds, one.bytes))


def placed(workload: Workload, train: MeshShape, decode: MeshShape, micro: int) -> Workload:
    """The workload on other meshes (roles that the recipe lays out their own way stay there)."""
    old, layout = workload.settings.layout, replace(workload.settings.layout, train=train, decode=decode)

    def moved(held: Held) -> Held:
        return replace(held, mesh=layout.of(held.role)) if old.of(held.role) is old.train else held

    rollouts = workload.rollouts
    if rollouts is not None:
        rollouts = replace(
            rollouts,
            policy=moved(rollouts.policy),
            critic=moved(rollouts.critic),
            reference=None if rollouts.reference is None else moved(rollouts.reference),
            reward=None if rollouts.reward is None else moved(rollouts.reward),
            decode=decode,
            micro=micro,
        )
    return replace(
        workload,
        settings=replace(workload.settings, layout=layout),
        supervised=tuple(replace(step, model=moved(step.model)) for step in workload.supervised),
        rollouts=rollouts,
    )


def _layouts(workload: Workload, topology: Topology) -> Iterator[tuple[MeshShape, MeshShape, int]]:
    count = topology.num_chips
    held = [step.model for step in workload.supervised]
    rollouts = workload.rollouts
    held += rollouts.models if rollouts is not None else []
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            train = MeshShape(data=count // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            if not all(_divides(one, train) for one in held):
                continue
            if rollouts is None:
                yield train, MeshShape(data=count), 0
                continue
            micros = [rows for rows in _divisors(rollouts.mini_rows) if rows % train.rows == 0]
            for decode_tensor in _divisors(count):
                decode = MeshShape(data=count // decode_tensor, tensor=decode_tensor)
                if can_switch(train, decode) and _decodes(rollouts.policy, decode):
                    yield from ((train, decode, rows) for rows in micros)


def can_switch(train: MeshShape, decode: MeshShape) -> bool:
    """Is the decode mesh made of the train mesh's axes (`diptych_jax.switch.meshes`)?"""
    shared = math.gcd(train.tensor, decode.tensor)
    more = decode.tensor // shared
    from_data = more // math.gcd(more, train.fsdp)
    return not (shared < train.tensor and more > 1) and train.data % from_data == 0


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _divides(held: Held, train: MeshShape) -> bool:
    try:
        check_slots(model_slots(held.config, "lm"), train, key="")
    except UserError:
        return False
    return True


def _decodes(held: Held, decode: MeshShape) -> bool:
    try:
        check_slots(model_slots(held.config, "lm"), decode, key="", rules=DECODE_RULES)
    except UserError:
        return False
    return True


def _candidate(workload: Workload, topology: Topology, train: MeshShape, decode: MeshShape, micro: int) -> Candidate:
    resident = {phase: sum(parts.values()) for phase, parts in memory.resident(workload).items()}
    size, flash = ITEMSIZE[workload.compute], topology.chip.kind == "tpu" and workload.settings.attention != "xla"
    total = Seconds()
    for step in workload.supervised:
        resident[step.stage] += _activations(workload, step.model, step.micro, step.columns, training=True, flash=flash)
        total = total + _step(workload, topology, step.model, step.rows, step.micro, step.columns, step.columns)
    rollouts = workload.rollouts
    if rollouts is not None:
        for phase, training in (("scoring", False), ("update", True)):
            resident[phase] += max(
                _activations(workload, one, rollouts.micro, rollouts.columns, training=training, flash=flash)
                for one in rollouts.models
            )
        # Logits of the rows that decode, in float32, a few times over; prefill's widest layer.
        local = math.ceil(rollouts.rows / decode.data)
        config = rollouts.policy.config
        resident["rollout"] += 4 * local / decode.tensor * config.vocab_size * 4 + costs.activations(
            config, rows=local, columns=rollouts.prompt, tensor=decode.tensor, itemsize=size, remat="full", chunk=1,
            head="lm", training=False, flash=False,
        )  # fmt: skip
        total = total + _rollout_seconds(workload, topology, rollouts)
        for one in rollouts.models:
            scored = rollouts.new if one.head == "lm" else rollouts.columns
            total = total + _forward_seconds(workload, topology, one, rollouts, scored)
            if one.optimizer is not None:
                total = total + _step(
                    workload, topology, one, rollouts.mini_rows, rollouts.micro, rollouts.columns, scored
                ).times(rollouts.steps)
    return Candidate(train=train, decode=decode, micro=micro, bytes=max(resident.values()), seconds=total.bound)


def _activations(workload: Workload, held: Held, micro: int, columns: int, *, training: bool, flash: bool) -> float:
    rows, size = filled(micro, held.mesh) / held.mesh.rows, ITEMSIZE[workload.compute]
    # A layer's parameters, and embedding and head, whole along fsdp while they are used; their gradients too.
    numbers = total_numbers(held.config, held.head)
    ends = held.config.vocab_size * held.config.hidden_size * (2 if held.head == "lm" else 1)
    gathered = (2 * (numbers - ends) / held.config.num_layers + ends) / held.mesh.tensor * size
    gradients = (ends / held.mesh.tensor * 4) if training and held.optimizer is not None else 0.0
    return gathered + gradients + costs.activations(
        held.config, rows=rows, columns=columns, tensor=held.mesh.tensor, itemsize=size,
        remat=workload.settings.remat, chunk=workload.chunk, head=held.head,
        training=training and held.optimizer is not None, flash=flash,
    )  # fmt: skip


def _links(topology: Topology, devices: int) -> int:
    """Over how many links a group of so many devices sends at once, laid along the grid as well as can be."""
    links = [2 if topology.is_ring(axis) else 1 for axis in range(len(topology.sizes))]
    if devices >= topology.num_chips:
        return sum(links)
    return max(links) if devices >= max(topology.sizes) else 1


def _network(topology: Topology, moves: Iterator[tuple[float, int, float]] | list[tuple[float, int, float]]) -> float:
    """Seconds of (bytes that a device sends, devices of a group, messages one after another)."""
    chip = topology.chip
    return sum(
        sent / (_links(topology, devices) * chip.link) + count * devices / 2 * chip.hop
        for sent, devices, count in moves
        if devices > 1
    )


def _forward_seconds(workload: Workload, topology: Topology, held: Held, rollouts: Rollouts, scored: int) -> Seconds:
    mesh, size, chip = held.mesh, ITEMSIZE[workload.compute], topology.chip
    calls, rows = math.ceil(rollouts.rows / rollouts.micro), filled(rollouts.micro, held.mesh)
    flops = costs.forward(held.config, rows=rows, columns=rollouts.columns, scored=scored, head=held.head).all
    whole = total_numbers(held.config, held.head) / mesh.tensor * size
    local = rows / mesh.rows * rollouts.columns * held.config.hidden_size * size
    layers = held.config.num_layers
    return seconds(
        flops / mesh.size / chip.peak(workload.compute),
        (3 * whole + ACTIVATION_TRAFFIC / 3 * local * layers) / chip.hbm,
        _network(topology, [
            (whole * (1 - 1 / mesh.fsdp), mesh.fsdp, 7.0 * layers),
            (2 * layers * 2 * local * (1 - 1 / mesh.tensor), mesh.tensor, 4.0 * layers),
        ]),
    ).times(calls)  # fmt: skip


def _step(
    workload: Workload, topology: Topology, held: Held, rows: int, micro: int, columns: int, scored: int
) -> Seconds:
    """One optimizer step."""
    mesh, size, chip = held.mesh, ITEMSIZE[workload.compute], topology.chip
    many, micro = rows // micro, filled(micro, held.mesh)
    flops = costs.training(
        held.config, rows=many * micro, columns=columns, scored=scored, head=held.head, remat=workload.settings.remat,
        chunks=micro / mesh.rows * scored / workload.chunk,
    )  # fmt: skip
    numbers = total_numbers(held.config, held.head)
    whole, layers = numbers / mesh.tensor * size, held.config.num_layers
    local = micro / mesh.rows * columns * held.config.hidden_size * size
    summed = 1 if held.config.hidden_size / mesh.fsdp >= LANES else 2
    moves = [
        ((2 + summed) * whole * (1 - 1 / mesh.fsdp), mesh.fsdp, 21.0 * layers),
        (2 * whole / mesh.fsdp * (1 - 1 / mesh.data), mesh.data, 7.0 * layers),
        (5 * layers * 2 * local * (1 - 1 / mesh.tensor), mesh.tensor, 10.0 * layers),
    ]
    states = numbers / (mesh.tensor * mesh.fsdp) * 4 * 7
    return seconds(
        flops / mesh.size / chip.peak(workload.compute),
        (many * (6 * whole + ACTIVATION_TRAFFIC * local * layers) + states) / chip.hbm,
        many * _network(topology, moves),
    )


def _rollout_seconds(workload: Workload, topology: Topology, rollouts: Rollouts) -> Seconds:
    mesh, size, chip, config = rollouts.decode, ITEMSIZE[workload.compute], topology.chip, rollouts.policy.config
    local = math.ceil(rollouts.rows / mesh.data)
    copy = memory.decode_copy(rollouts, workload.compute)
    cache = memory.cache_bytes(rollouts, workload.compute)
    flops = costs.decoding(config, rows=local, prompt=rollouts.prompt, new=rollouts.new) / mesh.tensor
    state = local * config.hidden_size * size
    layers = config.num_layers
    reduced = 2 * layers * 2 * state * (1 - 1 / mesh.tensor) * (rollouts.prompt + rollouts.new)
    return seconds(
        flops / chip.peak(workload.compute),
        rollouts.new * (copy + 0.75 * cache) / chip.hbm,
        _network(topology, [(reduced, mesh.tensor, 4.0 * layers * rollouts.new)]),
    )
