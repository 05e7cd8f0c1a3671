"""From what programs do to seconds: the longest of computing, reading memory and talking to other devices.

A roofline is a bound, not a forecast: the three are taken to overlap perfectly, and each to run at its published peak
(times `efficiency`, where one is given). Nothing else is assumed about utilisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diptych.plan.hardware import Accelerator
from diptych.plan.programs import PHASES, Collective, Phase, Program


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """One phase of an iteration (or an optimizer step), on every device at once."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    bound: float = 0.0  # the sum over programs of each one's longest term

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            compute=self.compute + other.compute,
            memory=self.memory + other.memory,
            network=self.network + other.network,
            bound=self.bound + other.bound,
        )

    def times(self, factor: float) -> Seconds:
        return Seconds(
            compute=self.compute * factor,
            memory=self.memory * factor,
            network=self.network * factor,
            bound=self.bound * factor,
        )

    @property
    def limit(self) -> str:
        """Which term is the longest."""
        terms = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(terms, key=lambda name: terms[name])


def seconds(compute: float, memory: float, network: float) -> Seconds:
    """The roofline of one program."""
    return Seconds(compute=compute, memory=memory, network=network, bound=max(compute, memory, network))


def program_seconds(program: Program, chip: Accelerator, *, precision: str, efficiency: float) -> Seconds:
    """All calls of one program. Compute is what the compiled program multiplies on each device, or the traced
    function's share where the compiled text does not show it (kernels), whichever is more."""
    return seconds(
        max(program.device_flops, program.share) / (chip.peak(precision) * efficiency),
        program.hbm / (chip.hbm * efficiency),
        sum(collective_seconds(one, chip, efficiency=efficiency) for one in program.collectives),
    ).times(program.calls)


def collective_seconds(one: Collective, chip: Accelerator, *, efficiency: float = 1.0) -> float:
    """Bytes over the links that a device sends over at once, and the way that the messages of each have to go."""
    return one.bytes / (one.links * chip.link * efficiency) + one.count * one.hops * chip.hop


def phase_seconds(
    programs: Sequence[Program], chip: Accelerator, *, precision: str, efficiency: float = 1.0
) -> dict[Phase, Seconds]:
    """The phases that have programs, in their order; programs run one after another."""
    found: dict[Phase, Seconds] = {}
    for phase in PHASES:
        of_phase = [one for one in programs if one.phase == phase]
        if of_phase:
            total = Seconds()
            for one in of_phase:
                total = total + program_seconds(one, chip, precision=precision, efficiency=efficiency)
            found[phase] = total
    return found


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What follows for a whole iteration. generated, trained: tokens per second of the whole machine; trained counts
    every pass. dollars: per million generated (without rl: trained) tokens."""

    seconds: float
    generated: float
    trained: float
    dollars: float
    dollars_per_hour: float


def rates(bounds: Iterable[float], *, generated: int, trained: int, num_chips: int, price: float) -> Rates:
    """bounds: seconds of the phases of an iteration. price: dollars per chip and hour."""
    total = sum(bounds)
    paid = generated or trained
    return Rates(
        seconds=total,
        generated=generated / total,
        trained=trained / total,
        dollars=num_chips * price * total / 3600 / paid * 1e6,
        dollars_per_hour=num_chips * price,
    )
