"""What an engine's planner tells of each of its compiled programs; found by name, so that the hinge imports no engine.

A planner is a module with

    plan_programs(workload, topology, *, report) -> list[Program]

that compiles the engine's own programs ahead of time, for devices that need not be there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diptych.errors import UserError

Phase = Literal["rollout", "scoring", "update", "sft", "reward"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update", "sft", "reward")
CollectiveKind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]

PLANNERS: Mapping[str, tuple[str, Sequence[str]]] = {"jax": ("diptych_jax.plan", ("jax", "flax", "optax"))}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over groups of one shape in one run of a program.

    count: how many run. bytes: what one device sends over its links, all of them together. links: over how many links
    at once. hops: how far the messages of one travel, one after the other.
    """

    kind: CollectiveKind
    devices: int
    links: int
    hops: int
    count: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program. All bytes and compiled FLOPs are of one device and one call.

    calls: per iteration of rl, or per optimizer step of sft and reward. argument, output, alias, temporary: the
    compiler's memory analysis. batch: those of the arguments that are no weights and moments, by their shapes.
    flops: of all devices together, from the traced function; needed_flops: without what is computed a second time for
    the backward pass. device_flops: of matrix products in the compiled program. hbm: bytes through the memory.
    refused: the compiler's own words where the program does not fit, None where it does; then what the compiler would
    have said is 0. devices: how many run it.
    """

    name: str
    phase: Phase
    role: str
    calls: int
    devices: int
    seconds: float
    argument: float = 0.0
    output: float = 0.0
    alias: float = 0.0
    temporary: float = 0.0
    batch: float = 0.0
    flops: float = 0.0
    needed_flops: float = 0.0
    device_flops: float = 0.0
    hbm: float = 0.0
    collectives: tuple[Collective, ...] = ()
    refused: str | None = None

    @property
    def share(self) -> float:
        """FLOPs of each device if none did another's work again."""
        return self.flops / self.devices

    @property
    def extra(self) -> float:
        """Bytes that one call needs beside its arguments."""
        return self.output - self.alias + self.temporary


Planner = Callable[..., list[Program]]


def load_planner(engine: str) -> Any:
    """The planner module of an engine. UserError where its framework is not installed."""
    module, requirements = PLANNERS[engine]
    missing = [package for package in requirements if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"plan compiles the {engine} engine, and {', '.join(missing)} is missing: pip install 'diptych[plan]'"
        )
    return importlib.import_module(module)
