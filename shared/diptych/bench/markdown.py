"""docs/benchmarks.md: results as Markdown tables, beside the targets that we set ourselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.bench.contest import GROUPS, PHASES
from diptych.bench.intensity import limits
from diptych.bench.results import Figures, Result, figures, ratios
from diptych.bench.terminal import GIB, NONE, ceilings, decimals, differences, group_of, setting, system, warnings

TITLES = {"trl-ppo": "TRL", "trl-grpo": "TRL GRPO", "tunix-ppo": "Tunix", "jax": "JAX", "torch": "torch"}
"""Contestants in the order of the columns, as they are headed."""


@dataclass(frozen=True)
class Target:
    """How many times as fast we want to be. fast, other: the faster engine's and the other engine's iteration against
    TRL's; rollout: each engine's against TRL's. tunix, tunix_rollout: JAX against Tunix."""

    fast: float
    other: float
    rollout: float
    tunix: float
    tunix_rollout: float


TARGETS: Mapping[str, Target] = {
    "tiny": Target(5, 3, 3, tunix=2, tunix_rollout=1.5),
    "small": Target(2, 1.5, 3, tunix=2.5, tunix_rollout=3),
    "medium": Target(1.7, 1.4, 2.5, tunix=2, tunix_rollout=2),
    "opt-125m": Target(1.35, 1.2, 2, tunix=1.5, tunix_rollout=1.5),
}


def benchmarks_md(results: Sequence[Result], *, scaling: str = "") -> str:
    """The whole document. scaling: a section's Markdown, without its heading."""
    parts = ["# Benchmarks", _machine(results), _commands(results), "## How it is measured", _method(results)]
    parts += ["## The work", _works(results)]
    for heading, group in _grouped(results).items():
        parts += [f"## {heading.capitalize()}", _seconds(group), _ratios(group)]
        parts += [_text(f"{result.workload.name}: {one}.") for result in group for one in warnings(result)]
    parts += ["## Where the seconds go", _explained()]
    for heading, group in _grouped(results).items():
        for result in group:
            parts += [f"### {_text(result.workload.name)}, {heading}", _phases(result)]
    parts += ["## Memory", "Peak of each process, GiB (in brackets: of the accelerator).", _memory(results)]
    parts += ["## First iterations", _first_explained(), _first(results)]
    if scaling:
        parts += ["## How cost grows", scaling]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(results: Sequence[Result]) -> str:
    machines = [one.machine for one in results]
    versions: dict[str, set[str]] = {}
    for one in machines:
        for name, version in one.get("packages", {}).items():
            if name in ("jax", "torch", "deepspeed", "numpy"):
                versions.setdefault(name, set()).add(version)
    for result in results:
        for one in result.contestants:
            if one.kind == "peer":
                for name, version in (one.about.get("environment") or {}).items():
                    versions.setdefault(f"{TITLES.get(one.name, one.name)}'s {name}", set()).add(str(version))
    packages = [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()]
    where = _all(
        f"{one.machine.get('processors')} processors, {one.machine.get('memory_gib')} GiB, {system(one)}"
        for one in results
    )
    software = ", ".join([f"Diptych {_all(one.get('diptych') for one in machines)}",
                          f"Python {_all(one.get('python') for one in machines)}", *packages])  # fmt: skip
    dates = sorted({one.date.split(" ")[0] for one in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return _text(f"Made by `diptych bench` ({when}) on {where}. {software}.")


def _commands(results: Sequence[Result]) -> str:
    commands = list(dict.fromkeys(one.command for one in results if one.command))
    return "```\n" + "\n".join(one.replace("```", "") for one in commands) + "\n```" if commands else ""


def _method(results: Sequence[Result]) -> str:
    free = ", ".join(dict.fromkeys(one.workload.name for one in results if not one.workload.forced))
    differing = list(dict.fromkeys(one for result in results for one in differences(result)))
    return "\n".join(
        [
            "- Each contestant is a process of its own, on as many cores as it has threads; they take turns, one "
            "iteration each (A B A B), while the others sleep.",
            "- Seconds are medians of the counted iterations; the first one and the warm-up are not among them.",
            "- Lengths are forced: every answer has its full length, so that all do the same work"
            f"{_text(f' (but not in {free})') if free else ''}.",
            "- Ceilings are measured in the same processes: a large product (FLOP/s) and a large copy (bytes/s, read "
            f"and written); the best of any contestant counts: {_ceilings(results)}.",
            "- FLOPs are of the products that the mathematics asks for; what an engine computes again is not counted. "
            "MFU is FLOPs over seconds over the ceiling.",
            *(["", "What a peer does differently:", ""] if differing else []),
            *(f"- {_text(one)}" for one in differing),
        ]
    )


def _ceilings(results: Sequence[Result]) -> str:
    best: dict[str, Result] = {}
    for one in results:
        label = setting(one)
        if label not in best or one.ceilings.get("flops", 0) > best[label].ceilings.get("flops", 0):
            best[label] = one
    return "; ".join(f"{label} {ceilings(one)}" for label, one in best.items())


def _works(results: Sequence[Result]) -> str:
    works = {one.workload.name: one.workload.describe() for one in results}
    return _table(["workload", "an iteration of PPO"], [[name, told] for name, told in works.items()], right=False)


def _grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By threads and what ran beside: a heading, and its results."""
    found: dict[str, list[Result]] = {}
    for one in results:
        found.setdefault(setting(one), []).append(one)
    return found


def _names(results: Sequence[Result]) -> list[str]:
    """Contestants of any of the results, in the order of `TITLES`."""
    there = {one.name for result in results for one in result.contestants}
    return [*(name for name in TITLES if name in there), *sorted(there - set(TITLES))]


def _each(results: Sequence[Result], cell: Any, *, first: str = "workload") -> str:
    """A row for each result and a column for each contestant."""
    names = _names(results)
    rows = []
    for result in results:
        told = (result.of(name) for name in names)
        rows.append([_row(result, results), *(NONE if one is None else cell(figures(result, one)) for one in told)])
    return _table([first, *(TITLES.get(name, name) for name in names)], rows)


def _row(result: Result, among: Sequence[Result]) -> str:
    """The workload, and its threads where these differ."""
    differ = len(_grouped(among)) > 1
    return f"{result.workload.name}, {setting(result)}" if differ else result.workload.name


def _seconds(results: Sequence[Result]) -> str:
    def cell(one: Figures) -> str:
        digits = decimals([one])
        rollout = f" ({one.groups['rollout']:.{digits}f})" if one.groups["rollout"] else ""
        return f"{one.seconds:.{digits}f}{rollout}"

    return "Seconds of an iteration (in brackets: of its rollout).\n\n" + _each(results, cell)


def _ratios(results: Sequence[Result]) -> str:
    """Engines over peers, and whether that is what we wanted."""
    rows = [[result.workload.name, *_compared(result)] for result in results]
    if all(cell == NONE for row in rows for cell in row[1:]):
        return ""
    columns = ["workload", "faster engine / TRL", "other engine / TRL", "rollouts / TRL", "JAX / Tunix",
               "rollout, JAX / Tunix", "JAX / torch"]  # fmt: skip
    return "How many times as fast (in brackets: the target, and whether it is met).\n\n" + _table(columns, rows)


def _compared(result: Result) -> list[str]:
    target = None if result.busy else TARGETS.get(result.workload.name)
    measured = sorted(
        (figures(result, one) for one in result.contestants if one.kind == "engine"), key=lambda one: one.seconds
    )
    engines = [one.name for one in measured]
    cells = [NONE] * 6
    if result.of("trl-ppo") is not None:
        found = {name: ratios(result, name, "trl-ppo") for name in engines}
        for place, (name, wanted) in enumerate(zip(engines, ("fast", "other"), strict=False)):
            cells[place] = judged(found[name]["iteration"], target and getattr(target, wanted), TITLES.get(name, name))
        told = [
            judged(found[name]["rollout"], target and target.rollout, TITLES.get(name, name))
            for name in engines
            if "rollout" in found[name]
        ]
        cells[2] = "; ".join(told) or NONE
    if "jax" in engines and result.of("tunix-ppo") is not None:
        one = ratios(result, "jax", "tunix-ppo")
        cells[3] = judged(one["iteration"], target and target.tunix)
        cells[4] = judged(one["rollout"], target and target.tunix_rollout) if "rollout" in one else NONE
    if {"jax", "torch"} <= set(engines):
        cells[5] = f"{ratios(result, 'jax', 'torch')['iteration']:.2f}"
    return cells


def judged(ratio: float, target: float | None, name: str = "") -> str:
    """A ratio, and whether it is what was wanted."""
    text = f"{name} {ratio:.2f}".strip()
    if target is None:
        return text
    return f"{text} ({target:g}: {'met' if ratio >= target else '**missed**'})"


def _explained() -> str:
    return (
        "At best: what a phase takes where its products run at the measured FLOP/s, or the bytes that it must at least "
        "move (weights once a pass, products' outputs, the cache, Adam's state) at the speed of a copy, whichever "
        "takes longer. What stays in a processor's cache can beat the latter. For each engine: seconds, MFU, and how "
        "many times the best that is; for each peer: seconds, as finely as it tells them."
    )


def _phases(result: Result) -> str:
    """A row for each phase, with its limit; the groups' sums in between."""
    work = limits(result.workload, result.ceilings)
    names = _names([result])
    found = {name: figures(result, one) for name in names if (one := result.of(name)) is not None}
    is_engine = {one.name: one.kind == "engine" for one in result.contestants}
    digits = decimals(list(found.values()))
    rows = []
    for label in _labels(found):
        limit = work.get(label)
        row = [
            f"**{label}**" if label in (*GROUPS, "iteration") else label,
            f"{limit.seconds:.{digits}f} ({limit.by})" if limit else NONE,
        ]
        for name, one in found.items():
            seconds = one.seconds if label == "iteration" else one.groups.get(label, one.phases.get(label, 0.0))
            text = f"{seconds:.{digits}f}" if seconds else NONE
            if is_engine[name] and seconds:
                mfu = [f"{one.mfu[label]:.0%}"] if label in one.mfu else []
                times = [f"x {seconds / limit.seconds:.2f}"] if limit else []
                text += f" ({', '.join([*mfu, *times])})" if mfu or times else ""
            row.append(text)
        rows.append(row)
    return _table(["phase", "at best", *(TITLES.get(name, name) for name in names)], rows)


def _labels(found: Mapping[str, Figures]) -> list[str]:
    """Phases that anybody has, each group's sum before its parts, the iteration last."""
    there = [name for name in PHASES if any(one.phases.get(name) for one in found.values())]
    labels = [name for name in there if not group_of(name)]
    for group in GROUPS:
        labels += [group, *(name for name in there if group_of(name) == group)]
    return [*labels, "iteration"]


def _memory(results: Sequence[Result]) -> str:
    def cell(one: Figures) -> str:
        device = f" ({one.device_peak_bytes / GIB:.2f})" if one.device_peak_bytes else ""
        return f"{one.peak_bytes / GIB:.2f}{device}" if one.peak_bytes else NONE

    return _each(results, cell)


def _first_explained() -> str:
    return "Seconds of the first iteration with nothing compiled yet; in brackets with a warm compilation cache."


def _first(results: Sequence[Result]) -> str:
    def cell(one: Figures) -> str:
        warm = "" if one.first_warm is None else f" ({one.first_warm:.2f})"
        return f"{one.first:.2f}{warm}"

    return _each(results, cell)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = True) -> str:
    """A Markdown table; all columns but the first flush right."""
    lines = [columns, ["---", *["---:" if right else "---"] * (len(columns) - 1)]]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in [*lines, *rows])


def _text(text: str) -> str:
    """Of one line and without what Markdown would take for a column or for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _all(values: Any) -> str:
    """Those that there are, each once."""
    return " and ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))
