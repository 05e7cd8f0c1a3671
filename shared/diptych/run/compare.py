"""Two runs side by side: their results, and how far apart every logged metric is at every common step.

For one metric with values a and b at the common steps: the absolute difference is |a - b|; the relative one is
|a - b| / max(|a|, |b|) at that step (0 where both are 0). A metric has parted at the first step where |a - b| exceeds
1e-4 of its largest magnitude over the common steps of both runs: noise around 0 is not a parting, and a learning rate
of 1e-6 can still part. Times and rates of work are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from diptych.recipe.load import parse_recipe
from diptych.run.charts import Series, line_chart
from diptych.run.directory import differences as recipe_differences
from diptych.run.directory import write_text
from diptych.run.page import details, header, page, table, tile
from diptych.run.report import CHARTS, STAGE_TITLES, Chart, RunRecord, Steps, other_charts, points, read_run

TOKENS = "rollout/tokens_crc32"
# Metrics that are themselves differences of equal numbers: rounding noise, never equal relative to its own size.
ROUNDING = ("policy/first_ratio_deviation_max", "rollout/logprob_gap_max", "rollout/logprob_gap_mean")
PARTED = 1e-4

# Results in summary.json: (stage, key, label).
RESULTS: Sequence[tuple[str, str, str]] = (
    ("sft", "eval_loss_first", "held-out loss, first"),
    ("sft", "eval_loss_last", "held-out loss, last"),
    ("sft", "seconds", "seconds"),
    ("reward", "eval_accuracy", "held-out accuracy"),
    ("reward", "seconds", "seconds"),
    ("rl", "eval_score_before", "held-out score, before"),
    ("rl", "eval_score_after", "held-out score, after"),
    ("rl", "kl", "KL to the reference"),
    ("rl", "generated_tokens", "generated tokens"),
    ("rl", "seconds", "seconds"),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of summary.json in both runs; None where a run does not have it."""

    stage: str
    key: str
    label: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """|a - b|; None where a run lacks it, and for seconds, which are not meant to agree."""
        return None if self.a is None or self.b is None or self.key == "seconds" else abs(self.a - self.b)


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """How far apart a metric is. steps: the common ones; parted_at: the first step beyond 1e-4 of `magnitude`."""

    stage: str
    metric: str
    steps: Sequence[int]
    absolute: Sequence[float]
    relative: Sequence[float]
    magnitude: float

    @property
    def max_absolute(self) -> float:
        return max(self.absolute)

    @property
    def max_absolute_step(self) -> int:
        return self.steps[self.absolute.index(self.max_absolute)]

    @property
    def max_relative(self) -> float:
        return max(self.relative)

    @property
    def max_relative_step(self) -> int:
        return self.steps[self.relative.index(self.max_relative)]

    @property
    def scaled(self) -> float:
        """The largest difference in units of the metric's largest magnitude."""
        return self.max_absolute / self.magnitude if self.magnitude else 0.0

    @property
    def parted_at(self) -> int | None:
        pairs = zip(self.steps, self.absolute, strict=True)
        return next((step for step, value in pairs if value > PARTED * self.magnitude), None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs. metrics: by stage and name. only_in: "STAGE METRIC" -> label of the one run that logged it.
    num_steps: stage -> (common, of a, of b). recipe: (key, a, b) of every setting that differs."""

    labels: tuple[str, str]
    results: Sequence[Result]
    metrics: Sequence[MetricDifference]
    only_in: Mapping[str, str]
    num_steps: Mapping[str, tuple[int, int, int]]
    recipe: Sequence[tuple[str, object, object]]

    @property
    def tokens(self) -> MetricDifference | None:
        """The checksum of every rollout's tokens: equal or not, whatever the size of the difference."""
        return next((one for one in self.metrics if one.metric == TOKENS), None)

    def largest(self, stage: str | None = None) -> MetricDifference | None:
        """The metric (of a stage) that is furthest apart in units of its own magnitude."""
        skipped = (TOKENS, *ROUNDING)
        chosen = [one for one in self.metrics if stage in (None, one.stage) and one.metric not in skipped]
        return max(chosen, key=lambda one: one.scaled, default=None)


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare two run directories. Raises UserError where one is none."""
    return _compare(read_run(a), read_run(b))


def format_table(comparison: Comparison, *, every_metric: bool = True) -> str:
    """The comparison as text for a terminal: results, then every metric or only each stage's largest difference."""
    label_a, label_b = comparison.labels
    lines = _aligned(["stage", "result", label_a, label_b, "difference"], list(_result_rows(comparison)))
    for stage, (common, of_a, of_b) in comparison.num_steps.items():
        if not common == of_a == of_b:
            lines.append(f"{stage}: {common} common steps of {of_a} ({label_a}) and {of_b} ({label_b})")
    for key, mine, other in comparison.recipe:
        lines.append(f"recipes differ: {key} is {mine!r} ({label_a}) and {other!r} ({label_b})")
    if comparison.tokens is not None:
        lines += ["", _tokens_line(comparison.tokens)]
    if comparison.metrics and not every_metric:
        for stage in comparison.num_steps:
            if (largest := comparison.largest(stage)) is not None:
                lines.append(
                    f"{stage}: largest difference of any logged metric: {largest.scaled:.1e} of its magnitude "
                    f"({largest.metric}, step {largest.max_absolute_step})"
                )
    elif comparison.metrics:
        lines += ["", *_aligned(_METRIC_COLUMNS, list(_metric_rows(comparison)))]
        lines.append(f"(parted: the first step where |a - b| > {PARTED:g} of the metric's largest magnitude)")
    else:
        lines += ["", "no step was logged by both runs"]
    for name, label in comparison.only_in.items():
        lines.append(f"only in {label}: {name}")
    return "\n".join(lines)


def write_comparison(a: Path, b: Path, html_path: Path) -> Path:
    """Write one self-contained page with both runs' curves, the tables, and the differences per step."""
    runs = (read_run(a), read_run(b))
    comparison = _compare(*runs)
    label_a, label_b = comparison.labels
    names = [str(run.summary.get("name", run.path.name)) for run in runs]
    title = names[0] if names[0] == names[1] else f"{names[0]} / {names[1]}"
    body = [
        header(f"{title}: {label_a} and {label_b}", [(label_a, str(runs[0].path)), (label_b, str(runs[1].path))]),
        f'<section class="tiles">{"".join(_tiles(comparison))}</section>',
        "<h2>Results</h2>",
        table(["stage", "result", label_a, label_b, "difference"], list(_result_rows(comparison)), numeric=(2, 3, 4)),
        f"<p>{_tokens_line(comparison.tokens)}</p>" if comparison.tokens else "",
        _recipe_table(comparison),
        *(_stage_section(comparison, runs, stage) for stage in dict.fromkeys(runs[0].stages + runs[1].stages)),
        f"<footer>Relative: |a − b| / max(|a|, |b|) at that step. Parted: the first step where |a − b| exceeds "
        f"{PARTED:g} of the metric's largest magnitude. On logarithmic axes equal values have no point. "
        f"Long curves are drawn by the smallest and largest value of each bin.</footer>",
    ]
    html_path = Path(html_path)
    html_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(html_path, page(f"{title}: {label_a} and {label_b}", "\n".join(part for part in body if part)))
    return html_path


def is_timing(metric: str) -> bool:
    """Times, rates and amounts of work: never equal, and not meant to be."""
    if metric.startswith(("timing_s/", "switch/")) or metric in ("eps", "compilations"):
        return True
    return "seconds" in metric or "per_second" in metric


def _compare(a: RunRecord, b: RunRecord) -> Comparison:
    labels = _labels(a, b)
    metrics: list[MetricDifference] = []
    only_in: dict[str, str] = {}
    num_steps: dict[str, tuple[int, int, int]] = {}
    for stage in dict.fromkeys(a.stages + b.stages):
        left, right = a.metrics.get(stage, {}), b.metrics.get(stage, {})
        common = sorted(left.keys() & right.keys())
        if left or right:
            num_steps[stage] = (len(common), len(left), len(right))
        names = dict.fromkeys(name for row in (*left.values(), *right.values()) for name in row if not is_timing(name))
        for name in names:
            shared = [step for step in common if name in left[step] and name in right[step]]
            if shared:
                metrics.append(_difference(stage, name, shared, left, right))
            elif left and right:
                in_a = any(name in row for row in left.values())
                in_b = any(name in row for row in right.values())
                only_in[f"{stage} {name}"] = labels[0] if not in_b else labels[1] if not in_a else "different steps"
    results = []
    for stage, key, label in RESULTS:
        values = [run.summary.get("stages", {}).get(stage, {}).get(key) for run in (a, b)]
        if values != [None, None]:
            results.append(Result(stage=stage, key=key, label=label, a=values[0], b=values[1]))
    recipes = [run.path / "recipe.yaml" for run in (a, b)]
    both = all(path.is_file() for path in recipes)
    return Comparison(
        labels=labels,
        results=results,
        metrics=metrics,
        only_in=only_in,
        num_steps=num_steps,
        recipe=recipe_differences(parse_recipe(recipes[0]), parse_recipe(recipes[1])) if both else [],
    )


def _difference(stage: str, metric: str, steps: Sequence[int], left: Steps, right: Steps) -> MetricDifference:
    absolute, relative, magnitude = [], [], 0.0
    for step in steps:
        x, y = left[step][metric], right[step][metric]
        size = max(abs(x), abs(y))
        absolute.append(abs(x - y))
        relative.append(abs(x - y) / size if size else 0.0)
        magnitude = max(magnitude, size)
    return MetricDifference(
        stage=stage, metric=metric, steps=list(steps), absolute=absolute, relative=relative, magnitude=magnitude
    )


def _tokens_line(tokens: MetricDifference) -> str:
    equal = sum(value == 0 for value in tokens.absolute)
    first = next((step for step, value in zip(tokens.steps, tokens.absolute, strict=True) if value), None)
    where = "" if first is None else f", first different at step {first}"
    return f"{tokens.stage}: every sampled token equal in {equal} of {len(tokens.steps)} rollouts{where}"


def _labels(a: RunRecord, b: RunRecord) -> tuple[str, str]:
    """The engines' names, or the directories' where both runs are of one engine."""
    engines = [str(run.summary.get("engine", "?")) for run in (a, b)]
    if engines[0] != engines[1]:
        return engines[0], engines[1]
    names = [run.path.resolve().name for run in (a, b)]
    return (names[0], names[1]) if names[0] != names[1] else (str(a.path), str(b.path))


_METRIC_COLUMNS = ("stage", "metric", "steps", "largest |a - b|", "at step", "largest relative", "at step", "parted")


def _result_rows(comparison: Comparison) -> Iterator[list[str]]:
    for one in comparison.results:
        difference = "" if one.difference is None else "0" if one.difference == 0 else f"{one.difference:.1e}"
        yield [one.stage, one.label, *(_result(one.key, value) for value in (one.a, one.b)), difference]


def _metric_rows(comparison: Comparison, stage: str | None = None) -> Iterator[list[str]]:
    for one in comparison.metrics:
        if stage in (None, one.stage) and one.metric != TOKENS:
            parted = "never" if one.parted_at is None else f"step {one.parted_at}"
            row = [one.stage, one.metric, str(len(one.steps))]
            if one.max_absolute == 0:
                yield [*row, "0", "", "0", "", parted]
            else:
                absolute = [f"{one.max_absolute:.1e}", str(one.max_absolute_step)]
                yield [*row, *absolute, f"{one.max_relative:.1e}", str(one.max_relative_step), parted]


def _result(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "seconds":
        return f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6f}"


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: a rule under the head, columns from the third on flush right, a repeated first cell blank."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if index >= 2 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(columns), "  ".join("-" * width for width in widths)]
    previous = ""
    for row in rows:
        lines.append(line([row[0] if row[0] != previous else "", *row[1:]]))
        previous = row[0]
    return lines


def _tiles(comparison: Comparison) -> Iterator[str]:
    labels = comparison.labels
    for key, label in (
        ("eval_loss_last", "SFT held-out loss"),
        ("eval_accuracy", "Reward accuracy"),
        ("eval_score_after", "RL score after"),
    ):
        for one in comparison.results:
            if one.key == key and one.a is not None and one.b is not None:
                yield tile(label, f"{one.a:.3f} | {one.b:.3f}", f"{labels[0]} | {labels[1]}")
    seconds = [one for one in comparison.results if one.key == "seconds"]
    if seconds:
        totals = (sum(one.a or 0.0 for one in seconds), sum(one.b or 0.0 for one in seconds))
        yield tile("Seconds", " | ".join(f"{total:.0f}" for total in totals), f"{labels[0]} | {labels[1]}")
    compared = [one for one in comparison.metrics if one.metric != TOKENS]
    if compared:
        total = len(compared)
        together = sum(one.parted_at is None for one in compared)
        yield tile(f"Metrics within {PARTED:g}", f"{together} of {total}", "of their magnitude, at every common step")


def _recipe_table(comparison: Comparison) -> str:
    if not comparison.recipe:
        return ""
    rows = [[key, str(a), str(b)] for key, a, b in comparison.recipe]
    return "<h3>The recipes differ</h3>" + table(["setting", *comparison.labels], rows)


def _stage_section(comparison: Comparison, runs: tuple[RunRecord, RunRecord], stage: str) -> str:
    steps = tuple(run.metrics.get(stage, {}) for run in runs)
    if not any(steps):
        return ""
    title, lead = STAGE_TITLES.get(stage, (stage, ""))
    names = [name for run_steps in steps for row in run_steps.values() for name in row if not is_timing(name)]
    differences = {one.metric: one for one in comparison.metrics if one.stage == stage}
    main = "".join(_charts(chart, comparison.labels, steps) for chart in CHARTS.get(stage, ()))
    other = "".join(_charts(chart, comparison.labels, steps) for chart in other_charts(stage, names))
    apart = "".join(_difference_chart(one) for one in differences.values())
    rows = [row[1:] for row in _metric_rows(comparison, stage)]
    one_sided = {name.split(" ", 1)[1]: run for name, run in comparison.only_in.items() if name.split(" ")[0] == stage}
    missing = [f"{name} ({run})" for name, run in one_sided.items()]
    common, of_a, of_b = comparison.num_steps[stage]
    uneven = "" if common == of_a == of_b else f" {common} common steps of {of_a} and {of_b}."
    return "".join(
        (
            f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead + uneven)}</p>',
            f'<div class="charts">{main}</div>' if main else "",
            details("All other metrics", f'<div class="charts">{other}</div>') if other else "",
            f"<h3>Difference by metric</h3>{table(_METRIC_COLUMNS[1:], rows, numeric=range(1, 7))}" if rows else "",
            details("Difference at every step", f'<div class="charts">{apart}</div>') if apart else "",
            f'<p class="note">Logged by one run only: {escape(", ".join(missing))}</p>' if missing else "",
            "</section>",
        )
    )


def _charts(chart: Chart, labels: tuple[str, str], steps: tuple[Steps, ...]) -> str:
    """Both runs' curves, the first broad so that both are seen where they agree; one figure a metric."""
    figures = []
    for name, metric in chart.curves.items():
        series = [
            Series(
                name=label, points=points(run_steps, metric), color=index + 1, wide=index == 0,
                markers=metric.startswith("eval/"),
            )
            for index, (label, run_steps) in enumerate(zip(labels, steps, strict=True))
        ]  # fmt: skip
        figures.append(line_chart(f"{chart.title}, {name}" if len(chart.curves) > 1 else chart.title, series))
    return "".join(figures)


def _difference_chart(one: MetricDifference) -> str:
    series = Series(name="|a − b|", points=list(zip(map(float, one.steps), one.absolute, strict=True)), color=4)
    zeros = sum(value == 0 for value in one.absolute)
    note = f"equal at {zeros} of {len(one.steps)} steps" if zeros else ""
    return line_chart(one.metric, [series], log=True, note=note)
