"""A result on one terminal screen: what was done, a table of contestants, who is how many times as fast as whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from diptych.bench.contest import GROUPS, PHASES
from diptych.bench.results import Figures, Result, figures, ratios

NONE = "-"  # what a contestant does not tell
GIB = 2**30
RATIOS = ("rollout", "score", "update", "first", "peak_bytes")


def describe(result: Result) -> str:
    """The whole screen, about 100 columns wide."""
    names = [one.name for one in result.contestants]
    lines = [f"{result.workload.name}: {result.workload.describe()}", how(result), ""]
    lines += _columns([["seconds", *names], *([label, *cells] for label, cells in figure_rows(result))])
    compared = ratio_rows(result)
    if compared:
        lines += ["", *_columns([["", "rollout", "score", "update", "first", "memory"], *compared])]
    remarks = [*(f"warning: {one}" for one in warnings(result)), *differences(result)]
    return "\n".join([*lines, *([""] if remarks else []), *remarks])


def how(result: Result) -> str:
    """Threads, turns and the machine's ceilings in a line."""
    turns = min(len(one.iterations) for one in result.contestants)
    return f"{setting(result)}, {turns} iterations by turns; reached on this machine: {ceilings(result)}"


def setting(result: Result) -> str:
    """Threads of each contestant, and what ran beside it."""
    threads = {0: "threads as they are", 1: "1 thread"}.get(result.threads, f"{result.threads} threads")
    if not result.busy:
        return threads
    beside = "1 process that never rests" if result.busy == 1 else f"{result.busy} processes that never rest"
    return f"{threads}, beside {beside}"


def system(result: Result) -> str:
    """The operating system and the kind of processor, without the kernel's name, which is of one machine only."""
    machine = result.machine
    return " ".join(word for word in (str(machine.get("platform") or "").split("-")[0], machine.get("machine")) if word)


def ceilings(result: Result) -> str:
    flops, moved = result.ceilings.get("flops"), result.ceilings.get("copy_bytes")
    found = [f"{flops / 1e9:,.0f} GFLOP/s" if flops else "", f"copying {moved / 1e9:,.1f} GB/s" if moved else ""]
    return ", ".join(one for one in found if one) or "not measured"


def figure_rows(result: Result) -> list[tuple[str, list[str]]]:
    """A label, parts indented by two spaces, and each contestant's cell. What nobody tells has no row."""
    found = [figures(result, one) for one in result.contestants]
    digits = decimals(found)

    def seconds(value: float | None) -> str:
        return f"{value:.{digits}f}" if value else NONE

    def share(value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.1f} %"

    def gib(value: int | None) -> str:
        return f"{value / GIB:.2f}" if value else NONE

    told: list[tuple[str, Callable[[Figures], str]]] = [
        ("iteration", lambda one: seconds(one.seconds)),
        ("  least to most", lambda one: f"{one.least:.{digits}f}-{one.most:.{digits}f}"),
    ]
    for group in GROUPS:
        told.append((f"  {group}", lambda one, group=group: seconds(one.groups[group])))
        told += [
            (f"    {phase.split('/')[-1]}", lambda one, phase=phase: seconds(one.phases.get(phase)))
            for phase in PHASES
            if group_of(phase) == group
        ]
    told += [
        ("  data", lambda one: seconds(one.phases.get("data"))),
        ("  other", lambda one: seconds(one.phases.get("other"))),
        ("tokens/s generated", lambda one: f"{one.tokens_per_second:,.0f}"),
        ("tokens/s trained", lambda one: f"{one.trained_per_second:,.0f}"),
        ("sequences/s", lambda one: f"{one.sequences_per_second:,.2f}"),
        ("MFU, iteration", lambda one: share(one.mfu.get("iteration"))),
        ("  update", lambda one: share(one.mfu.get("update"))),
        ("  score", lambda one: share(one.mfu.get("score"))),
        ("decode, of a copy's speed", lambda one: share(one.decode_bandwidth)),
        ("first iteration, s", lambda one: f"{one.first:.2f}"),
        ("  with a warm cache", lambda one: NONE if one.first_warm is None else f"{one.first_warm:.2f}"),
        ("setup, s", lambda one: f"{one.setup:.2f}"),
        ("peak memory, GiB", lambda one: gib(one.peak_bytes)),
        ("  of the accelerator", lambda one: gib(one.device_peak_bytes)),
        ("programs compiled", lambda one: NONE if one.compilations is None else str(one.compilations)),
    ]
    rows = [(label, [cell(one) for one in found]) for label, cell in told]
    return [row for row in rows if any(cell != NONE for cell in row[1])]


def decimals(found: Sequence[Figures]) -> int:
    """Of seconds: as many as tell the phases of the fastest apart."""
    fastest = min(one.seconds for one in found)
    return 4 if fastest < 1 else 3 if fastest < 10 else 2


def group_of(phase: str) -> str:
    """rollout, score, update, or "" (data, other)."""
    return next((name for name, parts in GROUPS.items() if phase in parts or phase.split("/")[0] in parts), "")


def pairs(result: Result) -> list[tuple[str, str]]:
    """Who is held against whom: every engine against every peer, then engine against engine."""
    engines = sorted(one.name for one in result.contestants if one.kind == "engine")
    peers = [one.name for one in result.contestants if one.kind == "peer"]
    return [*((engine, peer) for peer in peers for engine in engines), *combinations(engines, 2)]


def ratio_rows(result: Result) -> list[list[str]]:
    """A sentence for each pair ("jax is 1.21 (1.15..1.27) x as fast as torch"), then `RATIOS`, each the other's over
    one's own."""
    rows = []
    for one, other in pairs(result):
        found = ratios(result, one, other)
        low, high = spread(result, one, other)
        sentence = f"{one} is {found['iteration']:.2f} ({low:.2f}..{high:.2f}) x as fast as {other}"
        rows.append([sentence, *(f"{found[name]:.2f}" if name in found else NONE for name in RATIOS)])
    return rows


def spread(result: Result, one: str, other: str) -> tuple[float, float]:
    """The least and the largest ratio of any round: two iterations that ran one after the other. The ratio of the
    medians lies between."""
    ours, theirs = result.of(one), result.of(other)
    assert ours is not None
    assert theirs is not None
    found = [b.seconds / a.seconds for a, b in zip(ours.iterations, theirs.iterations, strict=False)]
    return min(found), max(found)


def warnings(result: Result) -> Iterator[str]:
    for one in result.contestants:
        if one.compilations_late:
            programs = "program" if one.compilations_late == 1 else "programs"
            yield f"{one.name} compiled {one.compilations_late} {programs} in iterations that count: warm up for longer"


def differences(result: Result) -> list[str]:
    """In what a contestant's work is not what was asked, and so its figures (MFU is of the work that was asked)."""
    return [
        f"{one.name} differs: {'; '.join(one.about['differs'])}"
        for one in result.contestants
        if one.about.get("differs")
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under one another, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
