"""`diptych parity curves RUN...`: learning curves of several seeds on two sides, and what they allow one to say.

A run is a run directory (metrics.jsonl, recipe.yaml, summary.json) or a trace; its side is its engine or producer, and
there are two. All settings but the seed are equal (those that can change a number: `effects`), each seed is there
once a side, and every run has every step: anything else is an error, because a curve that lacks its bad end looks good.
The statistics, and what the three verdicts mean, are in `bands`.

Exit code 0: the same within noise. 1: different. 2: cannot tell (and how many more seeds would), or an error.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import UserError
from diptych.parity.curves.bands import LEVEL, MARGIN, MAX_SEEDS, NEGLIGIBLE, POWER, MetricVerdict, Test, judge, overall
from diptych.parity.doctor.effects import effect_of
from diptych.parity.doctor.setups import Setup, read_setup
from diptych.parity.doctor.trap_finding import same
from diptych.run.charts import Series, line_chart, number
from diptych.run.directory import write_json, write_text
from diptych.run.page import header, page, table, tile

# What a stage is trained for; `--metric` chooses others.
MAIN: Mapping[str, tuple[str, ...]] = {
    "sft": ("eval/loss",),
    "reward": ("eval/loss", "eval/accuracy"),
    "rl": ("objective/scores", "eval/score", "objective/kl"),
}
CODES = {"same within noise": 0, "different": 1, "cannot tell": 2}
_BOOKKEEPING = ("stage", "step", "time")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One curve of every metric. values: "STAGE METRIC" -> step -> (value, FILE:LINE)."""

    path: Path
    side: str
    seed: int
    setup: Setup
    values: Mapping[str, Mapping[int, tuple[float, str]]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """sides: A and B, in the order in which they were given. seeds: of each."""

    sides: tuple[str, str]
    seeds: tuple[Sequence[int], Sequence[int]]
    verdicts: Sequence[MetricVerdict]
    margin: float


def command(options: argparse.Namespace) -> int:
    runs = [read_run(path) for path in options.runs]
    result = compare(runs, metrics=options.metric, margin=MARGIN if options.margin is None else options.margin)
    print(describe(result))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, as_json(result))
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.html, as_page(result))
    return CODES[overall(result.verdicts)[0]]


def read_run(path: Path) -> Run:
    """Raises UserError for what is neither a run nor a trace, for a replay, and for a number that is not finite."""
    setup = read_setup(path, contents=False)
    if setup.kind not in ("run directory", "trace"):
        raise UserError(f"{path}: is a {setup.kind}, which has no curve; give run directories or traces")
    if setup.replay is not None:
        raise UserError(
            f"{path}: is a replay of another trace, resynchronised at every recorded step: its curve is not its own; "
            f"record it without --replay"
        )
    if setup.engine is None:
        raise UserError(f"{path}: does not say which engine made it; run it again")
    seed = setup.get("recipe", "seed") or setup.get("settings", "seed")
    if seed is None or seed.value is None:
        raise UserError(f"{path}: does not say its seed, so that it cannot be one of several; record it with its seed")
    file = path / ("index.jsonl" if setup.kind == "trace" else "metrics.jsonl")
    return Run(path=path, side=setup.engine, seed=int(seed.value), setup=setup, values=_values(file))


def _values(file: Path) -> dict[str, dict[int, tuple[float, str]]]:
    """ "STAGE METRIC" -> step -> (value, FILE:LINE). A last line without its newline is still being written."""
    try:
        *lines, _unfinished = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    values: dict[str, dict[int, tuple[float, str]]] = {}
    for line_number, line in enumerate(lines, 1):
        where = f"{file}:{line_number}"
        try:
            row = json.loads(line)
            stage, step = str(row["stage"]), int(row["step"])
            metrics = row["metrics"] if "metrics" in row else {k: v for k, v in row.items() if k not in _BOOKKEEPING}
            found = {name: float(value) for name, value in metrics.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: not a row of metrics; mend it, or run again") from None
        for name, value in found.items():
            curve = values.setdefault(f"{stage} {name}", {})
            if step in curve:
                raise UserError(f"{where}: {stage} {name} of step {step} is there twice (first at {curve[step][1]})")
            curve[step] = (value, where)
    if not values:
        raise UserError(f"{file}: holds no metric; was the run stopped before its first step?")
    return values


def compare(runs: Sequence[Run], *, metrics: Sequence[str] = (), margin: float = MARGIN) -> Result:
    """The verdicts. Raises UserError where the runs are not seeds of two sides of one experiment."""
    if not margin > 0:
        raise UserError(f"--margin {margin}: must be above 0 (in standard deviations across seeds)")
    sides = _sides(runs)
    _check_settings(runs)
    chosen = _chosen(runs, metrics)
    steps = {metric: _steps(runs, metric) for metric in chosen}
    curves = {
        metric: tuple(
            {
                run.seed: np.array([run.values[metric][step][0] for step in steps[metric]])
                for run in runs
                if run.side == side
            }
            for side in sides
        )
        for metric in chosen
    }
    return Result(
        sides=sides,
        seeds=tuple(sorted(run.seed for run in runs if run.side == side) for side in sides),  # pyright: ignore[reportArgumentType]
        verdicts=judge(curves, steps, margin=margin),  # pyright: ignore[reportArgumentType]
        margin=margin,
    )


def _sides(runs: Sequence[Run]) -> tuple[str, str]:
    found: dict[str, dict[int, Path]] = {}
    for run in runs:
        seeds = found.setdefault(run.side, {})
        if run.seed in seeds:
            raise UserError(
                f"{run.path}: seed {run.seed} of {run.side} is there already ({seeds[run.seed]}): runs of one seed are "
                f"no independent ones; give it once"
            )
        seeds[run.seed] = run.path
    if len(found) != 2:
        listed = "; ".join(f"{side}: {', '.join(map(str, seeds.values()))}" for side, seeds in found.items())
        raise UserError(f"curves compares two sides (engines or producers), and there are {len(found)}: {listed}")
    first, second = found
    return first, second


def _check_settings(runs: Sequence[Run]) -> None:
    """All settings that can change a number are equal, the seed aside."""
    first = runs[0]
    for run in runs[1:]:
        has_recipes = first.setup.recipe is not None and run.setup.recipe is not None
        group = "recipe" if has_recipes else "settings"
        left, right = first.setup.facts.get(group, {}), run.setup.facts.get(group, {})
        keys = dict.fromkeys([*left, *right]) if has_recipes else [key for key in left if key in right]
        if not keys:
            raise UserError(
                f"{first.path} and {run.path}: neither says its settings; nothing shows that they are equal"
            )
        for key in keys:
            mine, other = left.get(key), right.get(key)
            values = [None if fact is None else fact.value for fact in (mine, other)]
            if key == "seed" or same(*values) or effect_of(group, key, first.setup, run.setup)[0] != "number":
                continue
            places = [path.path if fact is None else fact.where for path, fact in ((first, mine), (run, other))]
            raise UserError(
                f"{places[1]}: {key} is {values[1]!r}, and {values[0]!r} at {places[0]}: all settings but the seed "
                f"must be equal; run one of them again (diptych parity doctor {first.path} {run.path} lists them all)"
            )


def _chosen(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """ "STAGE METRIC" of those asked for ("METRIC", or "STAGE METRIC"), else of the stages' main ones."""
    known = list(dict.fromkeys(name for run in runs for name in run.values))
    if not wanted:
        found = [f"{stage} {metric}" for stage, metrics in MAIN.items() for metric in metrics]
        found = [name for name in found if name in known]
        if not found:
            raise UserError(f"none of the main metrics was logged; choose with --metric: {', '.join(known)}")
        return found
    found = []
    for one in wanted:
        matching = [name for name in known if one in (name, name.split(" ", 1)[1])]
        if not matching:
            near = difflib.get_close_matches(one, [name.split(" ", 1)[1] for name in known], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; logged: {', '.join(known)}"
            raise UserError(f"--metric {one}: no run logged it{hint}")
        found += [name for name in matching if name not in found]
    return found


def _steps(runs: Sequence[Run], metric: str) -> list[int]:
    """The steps of a metric, which every run has, with finite values."""
    places: dict[int, str] = {}
    for run in runs:
        for step, (value, where) in run.values.get(metric, {}).items():
            if not math.isfinite(value):
                raise UserError(
                    f"{where}: {metric} is {value} at step {step}: a run that broke has no curve; run it again, or "
                    f"leave its seed out on both sides"
                )
            places.setdefault(step, where)
    for run in runs:
        curve = run.values.get(metric, {})
        missing = sorted(set(places) - set(curve))
        if missing:
            file = run.path / ("index.jsonl" if run.setup.kind == "trace" else "metrics.jsonl")
            last = max((one for one, _ in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)), default=0)
            after = [where for step, (_, where) in curve.items() if step > missing[0]]
            raise UserError(
                f"{after[0] if after else f'{file}:{last}'}: {metric} lacks step {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which {places[missing[0]]} has; "
                f"finish the run (--resume), or give runs of equal length"
            )
    return sorted(places)


# As text, JSON and a page.


def describe(result: Result) -> str:
    """One screen."""
    first, second = result.sides
    counts = " and ".join(f"{len(seeds)} of {side}" for side, seeds in zip(result.sides, result.seeds, strict=True))
    how = "paired by seed" if result.verdicts[0].is_paired else "unpaired: other seeds on each side"
    lines = [f"seeds: {counts} ({how}); difference = {second} - {first}", ""]
    columns = [
        "metric",
        "mean of",
        first,
        second,
        "difference",
        "95 % interval",
        "seeds' sd",
        "p different",
        "p same",
        "",
    ]
    rows = [
        [verdict.metric if index == 0 else "", *_row(test), verdict.outcome if index == 0 else ""]
        for verdict in result.verdicts
        for index, test in enumerate(verdict.tests)
    ]
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    for row in (columns, *rows):
        cells = [cell.ljust(width) if index < 2 or index == len(widths) - 1 else cell.rjust(width)
                 for index, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_power_lines(result), "", conclusion(result)])


def _row(test: Test) -> list[str]:
    interval = "" if test.interval is None else f"{number(test.interval[0])} .. {number(test.interval[1])}"
    numbers = [*test.means, test.difference]
    optional = [test.deviation, test.p_different, test.p_same]
    texts = ["" if value is None else number(value, digits=3) for value in optional]
    return [test.summary, *map(number, numbers), interval, *texts]


def _power_lines(result: Result) -> Iterator[str]:
    for verdict in result.verdicts:
        test = verdict.tests[0]
        if test.detectable is not None and test.margin is not None:
            units = f" ({test.detectable / test.deviation:.2g} seed deviations)" if test.deviation else ""
            more = f"more than {MAX_SEEDS}" if verdict.more_seeds is None else f"{verdict.more_seeds} more"
            missing = f"; cannot tell: {more} seeds a side" if verdict.outcome == "cannot tell" else ""
            yield (
                f"{verdict.metric}: a difference of {number(test.detectable)}{units} would be seen in {POWER:.0%} of "
                f"cases; the same means |difference| < {number(test.margin)}{missing}"
            )


def conclusion(result: Result) -> str:
    """The verdict in one sentence."""
    outcome, more = overall(result.verdicts)
    first, second = result.sides
    if outcome == "different":
        apart = [one for one in result.verdicts if one.outcome == "different"]
        tests = [(one, next(test for test in one.tests if test.is_different)) for one in apart]
        named = "; ".join(
            f"{one.metric} is {'higher' if test.difference > 0 else 'lower'} on {second} by "
            f"{number(abs(test.difference))}"
            for one, test in tests
        )
        return f"different: {named}"
    if outcome == "same within noise":
        return f"same within noise: {first} and {second} differ by less than {result.margin:g} of the seeds' deviation"
    if min(map(len, result.seeds)) < 2:
        return (
            "cannot tell: one seed a side shows no noise to compare with; at least 2 more seeds a side, then ask again"
        )
    if more is None:
        return f"cannot tell: more than {MAX_SEEDS} seeds a side would be needed; the seeds spread too far"
    rough = " (a rough number, from so few)" if min(map(len, result.seeds)) < 4 else ""
    return f"cannot tell: {more} more seed{'s' * (more > 1)} a side{rough}"


def as_json(result: Result) -> dict[str, Any]:
    """Everything, for another program."""
    outcome, more = overall(result.verdicts)
    return {
        "outcome": outcome, "more_seeds": more, "sides": list(result.sides),
        "seeds": {side: list(seeds) for side, seeds in zip(result.sides, result.seeds, strict=True)},
        "level": LEVEL, "power": POWER, "margin": result.margin, "negligible": NEGLIGIBLE,
        "metrics": [
            {
                "metric": one.metric, "outcome": one.outcome, "more_seeds": one.more_seeds, "paired": one.is_paired,
                "steps": list(one.steps), "tests": [vars(test) for test in one.tests],
                "bands": {
                    side: {"mean": band.mean.tolist(), "half_width": band.half_width.tolist()}
                    for side, band in zip(result.sides, one.bands, strict=True)
                },
            }
            for one in result.verdicts
        ],
    }  # fmt: skip


def as_page(result: Result) -> str:
    """One self-contained page: bands, tests, and how to read them."""
    first, second = result.sides
    outcome, _ = overall(result.verdicts)
    facts = [
        (side, f"{len(seeds)} seeds: {', '.join(map(str, seeds))}")
        for side, seeds in zip(result.sides, result.seeds, strict=True)
    ]
    columns = [
        "metric",
        "mean of",
        first,
        second,
        "difference",
        "95 % interval",
        "seeds' sd",
        "p different",
        "p same",
        "verdict",
    ]
    rows = [[one.metric, *_row(test), one.outcome] for one in result.verdicts for test in one.tests]
    body = [
        header(f"Curves: {first} and {second}", facts),
        f'<section class="tiles">{tile("Verdict", outcome, conclusion(result).partition(": ")[2])}</section>',
        '<h2>Bands</h2><p class="lead">Mean over the seeds and its 95 % interval at each step. Bands that overlap '
        "prove nothing; the tests below do.</p>",
        f'<div class="charts">{"".join(_chart(one, result) for one in result.verdicts)}</div>',
        "<h2>Tests</h2>",
        table(columns, rows, numeric=range(2, 9)),
        f'<p class="note">Difference: {second} minus {first}. p different: t-test, Holm-corrected over all metrics and '
        f"both summaries, level {LEVEL:g}. p same: two one-sided tests of |difference| below {result.margin:g} seed "
        f"deviations.</p>",
        "<h2>What these seeds can see</h2>",
        *(f'<p class="note">{escape(line)}</p>' for line in _power_lines(result)),
    ]  # fmt: skip
    return page(f"{first} and {second}: {outcome}", "\n".join(body))


def _chart(verdict: MetricVerdict, result: Result) -> str:
    series = []
    for index, (side, band) in enumerate(zip(result.sides, verdict.bands, strict=True)):
        steps = [float(step) for step in verdict.steps]
        mean, width = band.mean.tolist(), band.half_width.tolist()
        area = [(x, y - w, y + w) for x, y, w in zip(steps, mean, width, strict=True)] if any(width) else []
        series.append(Series(name=side, points=list(zip(steps, mean, strict=True)), color=index + 1, band=area))
    return line_chart(verdict.metric, series, note=verdict.outcome)
