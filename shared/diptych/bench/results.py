"""A contest's figures: kept whole as JSON, and what follows from them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from diptych.bench.contest import GROUPS, PHASES, Iteration, Measured
from diptych.bench.flops import decode_bytes, phase_flops
from diptych.bench.workloads import Workload
from diptych.errors import UserError
from diptych.run.environment import describe_environment

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One workload's contest. threads: of each contestant. machine: `describe_environment`. command: that made it.
    busy: other processes that never rested beside it. load: of the machine when it began (1 minute's average)."""

    workload: Workload
    threads: int
    contestants: Sequence[Measured]
    machine: Mapping[str, Any] = field(default_factory=describe_environment)
    command: str = ""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M"))
    busy: int = 0
    load: float | None = None

    @property
    def ceilings(self) -> dict[str, float]:
        """The machine's: the best that any contestant reached. `flops` FLOP/s, `copy_bytes` bytes/s."""
        found: dict[str, float] = {}
        for one in self.contestants:
            for name, value in one.ceilings.items():
                found[name] = max(value, found.get(name, 0.0))
        return found

    def of(self, name: str) -> Measured | None:
        return next((one for one in self.contestants if one.name == name), None)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"schema": SCHEMA, **asdict(self)}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load_json(path: Path) -> Result:
        """UserError where the file is not one that this version writes."""
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole.pop("schema") != SCHEMA:
                raise UserError(f"{path}: written by another version of diptych bench: run it again")
            contestants = [
                Measured(**(one | {"iterations": [Iteration(**i) for i in one["iterations"]]}))
                for one in whole.pop("contestants")
            ]
            return Result(workload=Workload(**whole.pop("workload")), contestants=contestants, **whole)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a result of diptych bench ({error!r})") from None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one contestant did, medians over its iterations.

    seconds: of an iteration (least, most: the range). phases: median seconds by name, in `contest.PHASES`' order.
    groups: rollout (the switch with it), score, update. mfu: share of the machine's measured FLOP/s, whole iteration
    and by phase. decode_bandwidth: what decoding must have read, as a share of the measured copy bandwidth.
    tokens_per_second: generated tokens over the rollout's seconds. sequences_per_second: rows of an iteration over its
    seconds; trained_per_second: tokens, prompt and answer, likewise. flops: of an iteration, nothing twice.
    """

    name: str
    seconds: float
    least: float
    most: float
    phases: Mapping[str, float]
    groups: Mapping[str, float]
    tokens_per_second: float
    sequences_per_second: float
    trained_per_second: float
    flops: float
    mfu: Mapping[str, float]
    decode_bandwidth: float | None
    first: float
    first_warm: float | None
    setup: float
    peak_bytes: int
    device_peak_bytes: int | None
    compilations: int | None
    compilations_late: int


def figures(result: Result, one: Measured) -> Figures:
    """Of a contestant that did at least one counted iteration."""
    done, work = one.iterations, result.workload
    names = [name for name in (*PHASES, "rollout", "score", "update") if any(name in i.phases for i in done)]
    phases = {name: median(i.phases.get(name, 0.0) for i in done) for name in names}
    groups = {name: median(i.group(name) for i in done) for name in GROUPS}
    seconds = median(i.seconds for i in done)
    flops = phase_flops(work)
    by_group = {"score": 0.0, "update": 0.0}
    for name, value in flops.items():
        group = name.split("/")[0]
        by_group[group] = by_group.get(group, 0.0) + value
    peak, bandwidth = result.ceilings.get("flops"), result.ceilings.get("copy_bytes")
    mfu = {}
    if peak:
        timed = {**phases, "score": groups["score"], "update": groups["update"]}
        mfu = {name: value / timed[name] / peak for name, value in {**flops, **by_group}.items() if timed.get(name)}
        mfu["iteration"] = sum(flops.values()) / seconds / peak
    tokens = median(i.tokens for i in done)
    decoded = phases.get("decode")
    return Figures(
        name=one.name,
        seconds=seconds,
        least=min(i.seconds for i in done),
        most=max(i.seconds for i in done),
        phases=phases,
        groups=groups,
        tokens_per_second=tokens / groups["rollout"],
        sequences_per_second=work.batch / seconds,
        trained_per_second=(work.batch * work.prompt + tokens) / seconds,
        flops=sum(flops.values()),
        mfu=mfu,
        decode_bandwidth=decode_bytes(work) / decoded / bandwidth if decoded and bandwidth else None,
        first=one.first,
        first_warm=one.first_warm,
        setup=one.setup,
        peak_bytes=one.peak_bytes,
        device_peak_bytes=one.device_peak_bytes,
        compilations=one.compilations,
        compilations_late=one.compilations_late,
    )


def ratios(result: Result, engine: str, peer: str) -> dict[str, float]:
    """How many times as long the peer takes: `iteration`, `rollout`, `score`, `update`, `first`, `peak_bytes`."""
    ours, theirs = result.of(engine), result.of(peer)
    assert ours is not None
    assert theirs is not None
    a, b = figures(result, ours), figures(result, theirs)
    found = {"iteration": b.seconds / a.seconds, "first": b.first / a.first}
    found |= {name: b.groups[name] / a.groups[name] for name in GROUPS if a.groups[name] and b.groups[name]}
    if a.peak_bytes and b.peak_bytes:
        found["peak_bytes"] = b.peak_bytes / a.peak_bytes
    return found
