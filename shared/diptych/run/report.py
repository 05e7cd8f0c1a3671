"""report.html: what a run did, on one page that needs nothing else (no script, no network).

It is written again after every stage and shows whatever is there; metrics without a place of their own are drawn too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.run.charts import Series, line_chart, number, share_bar
from diptych.run.directory import read_samples, write_text
from diptych.run.metrics import by_stage, read_metrics
from diptych.run.page import details, header, page, settings, table, tile

Steps = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart's title and its curves: name in the legend -> metric. Evaluations (`eval/...`) get markers."""

    title: str
    curves: Mapping[str, str]


STAGE_TITLES: Mapping[str, tuple[str, str]] = {
    "sft": ("Supervised fine-tuning", "Negative log-likelihood of response tokens, in nats per token."),
    "reward": (
        "Reward model",
        "Pairwise logistic loss; accuracy is the share of pairs whose chosen answer scores higher.",
    ),
    "rl": (
        "Reinforcement learning",
        "PPO against the reward, with a KL penalty to the reference. KL in nats per response.",
    ),
}

CHARTS: Mapping[str, Sequence[Chart]] = {
    "sft": (
        Chart(title="Loss", curves={"train": "loss", "held-out": "eval/loss"}),
        Chart(title="Gradient norm", curves={"before clipping": "grad_norm"}),
        Chart(title="Learning rate", curves={"rate": "lr"}),
    ),
    "reward": (
        Chart(title="Loss", curves={"train": "loss", "held-out": "eval/loss"}),
        Chart(title="Accuracy", curves={"train": "reward/accuracy", "held-out": "eval/accuracy"}),
        Chart(title="Margin, chosen minus rejected", curves={"train": "reward/margin", "held-out": "eval/margin"}),
        Chart(title="Gradient norm", curves={"before clipping": "grad_norm"}),
        Chart(title="Learning rate", curves={"rate": "lr"}),
    ),
    "rl": (
        Chart(title="Score", curves={"rollouts": "objective/scores", "held-out": "eval/score"}),
        Chart(title="KL to the reference", curves={"rollouts": "objective/kl", "held-out": "eval/kl"}),
        Chart(
            title="Reward",
            curves={"score and penalty": "objective/rlhf_reward", "penalty alone": "objective/non_score_reward"},
        ),
        Chart(title="Entropy", curves={"nats per response": "objective/entropy"}),
        Chart(title="Response length", curves={"rollouts": "response_length/mean", "held-out": "eval/response_length"}),
        Chart(title="Responses that end by themselves", curves={"rollouts": "eos_rate", "held-out": "eval/eos_rate"}),
        Chart(title="Importance ratio", curves={"mean": "val/ratio"}),
        Chart(title="Clipped share", curves={"policy": "policy/clipfrac_avg", "value": "val/clipfrac_avg"}),
        Chart(title="KL of an update", curves={"approximate": "policy/approxkl_avg"}),
        Chart(title="Loss", curves={"policy": "loss/policy_avg", "value": "loss/value_avg"}),
        Chart(title="Gradient norm", curves={"policy": "grad_norm/policy", "critic": "grad_norm/critic"}),
        Chart(title="Sampler against trainer", curves={"largest log-probability gap": "rollout/logprob_gap_max"}),
    ),
}

# Timings that are sums of the others.
_WHOLE_TIMES = ("timing_s/iteration", "timing_s/step", "timing_s/total")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run directory tells."""

    path: Path
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    recipe: str
    metrics: Mapping[str, Steps]
    samples: Sequence[Mapping[str, Any]]

    @property
    def stages(self) -> list[str]:
        """Stages with anything to show, in their order."""
        seen = {*self.metrics, *self.summary.get("stages", {}), *(row["stage"] for row in self.samples)}
        known = [stage for stage in STAGE_TITLES if stage in seen]
        return known + sorted(seen - set(known))


def read_run(path: Path) -> RunRecord:
    """Read a run directory. Raises UserError where it is none."""
    path = Path(path)
    if not (path / "summary.json").is_file():
        raise UserError(f"{path}: not a run directory (no summary.json); give the --output of a run")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        environment_file = path / "environment.json"
        environment = json.loads(environment_file.read_text(encoding="utf-8")) if environment_file.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: summary.json or environment.json is not JSON: {error}") from None
    recipe_file = path / "recipe.yaml"
    return RunRecord(
        path=path,
        summary=summary,
        environment=environment,
        recipe=recipe_file.read_text(encoding="utf-8") if recipe_file.exists() else "",
        metrics=by_stage(read_metrics(path / "metrics.jsonl")),
        samples=read_samples(path / "samples.jsonl"),
    )


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path."""
    run = read_run(run_dir)
    name = str(run.summary.get("name", run.path.name))
    packages = run.environment.get("packages", {})
    framework = [f"{package} {packages[package]}" for package in ("jax", "torch") if package in packages]
    engine = str(run.summary.get("engine", "unknown"))
    body = [
        header(
            name,
            [
                ("engine", engine),
                ("seed", _top_level(run.recipe, "seed")),
                ("precision", _top_level(run.recipe, "precision")),
                ("started", str(run.environment.get("started", "")).replace("T", " ")[:16]),
                ("with", next((text for text in framework if text.startswith(engine)), "")),
                ("diptych", str(run.environment.get("diptych", ""))),
            ],
        ),
        f'<section class="tiles">{"".join(verdicts(run.summary))}</section>',
        *(_stage_section(run, stage) for stage in run.stages),
        "<h2>How it was run</h2>",
        details("Resolved recipe", f"<pre>{escape(run.recipe)}</pre>") if run.recipe else "",
        details("Environment", table(["what", "value"], settings(run.environment))) if run.environment else "",
        details("Results", table(["what", "value"], settings(run.summary))),
        "<footer>Dots are evaluations on held-out rows; hover for their values. Long curves are drawn by the smallest "
        "and largest value of each bin.</footer>",
    ]
    target = run.path / "report.html"
    write_text(target, page(f"{name} · {engine}", "\n".join(part for part in body if part)))
    return target


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """The headline numbers of finished stages as tiles; a number that is not there is left out."""
    stages = summary.get("stages", {})
    tiles = []
    sft, reward, rl = (stages.get(stage, {}) for stage in ("sft", "reward", "rl"))
    if {"eval_loss_first", "eval_loss_last"} <= sft.keys():
        first, last = sft["eval_loss_first"], sft["eval_loss_last"]
        change = f"{(last - first) / first:+.0%}, " if first else ""
        tiles.append(tile("SFT held-out loss", f"{first:.3f} → {last:.3f}", change + "nats per token"))
    if "eval_accuracy" in reward:
        tiles.append(tile("Reward accuracy", f"{reward['eval_accuracy']:.1%}", "of held-out pairs ordered right"))
    if {"eval_score_before", "eval_score_after"} <= rl.keys():
        before, after = rl["eval_score_before"], rl["eval_score_after"]
        detail = f"{after - before:+.3g} on held-out prompts"
        tiles.append(tile("RL score", f"{before:.3f} → {after:.3f}", detail))
    if "kl" in rl:
        bound = rl.get("kl_bound")
        limit = "nats per response" if bound is None else f"nats per response, bound {number(bound)}"
        tiles.append(tile("KL to the reference", number(rl["kl"]), limit))
    seconds = {stage: values["seconds"] for stage, values in stages.items() if "seconds" in values}
    if seconds:
        parts = ", ".join(f"{stage} {duration(value)}" for stage, value in seconds.items())
        tiles.append(tile("Time", duration(sum(seconds.values())), parts))
    if not tiles:
        tiles.append(tile("Status", "No stage finished", "curves show what has been logged so far"))
    return tiles


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def chart_svg(chart: Chart, steps: Steps) -> str:
    """The chart of one run; "" where none of its metrics was logged."""
    series = []
    for index, (name, metric) in enumerate(chart.curves.items()):
        is_eval = metric.startswith("eval/")
        color = 2 if is_eval else index + 1
        series.append(Series(name=name, points=points(steps, metric), color=color, markers=is_eval))
    return line_chart(chart.title, series)


def points(steps: Steps, metric: str) -> list[tuple[float, float]]:
    """(step, value) where the metric was logged."""
    return [(float(step), row[metric]) for step, row in steps.items() if metric in row]


def other_charts(stage: str, names: Sequence[str]) -> list[Chart]:
    """A plain chart for every metric that no chart of the stage shows, timings left out."""
    shown = {metric for chart in CHARTS.get(stage, ()) for metric in chart.curves.values()}
    left = sorted(name for name in set(names) - shown if not name.startswith("timing_s/"))
    return [Chart(title=name, curves={"": name}) for name in left]


def _stage_section(run: RunRecord, stage: str) -> str:
    steps = run.metrics.get(stage, {})
    title, lead = STAGE_TITLES.get(stage, (stage, ""))
    names = [name for row in steps.values() for name in row]
    main = "".join(chart_svg(chart, steps) for chart in CHARTS.get(stage, ()))
    other = "".join(chart_svg(chart, steps) for chart in other_charts(stage, names))
    samples = _samples([row for row in run.samples if row["stage"] == stage])
    return "".join(
        (
            f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>',
            f'<div class="charts">{main}</div>' if main else "",
            _timing(steps),
            details("All other metrics", f'<div class="charts">{other}</div>') if other else "",
            f"<h3>Answers before and after</h3>{samples}" if samples else "",
            "</section>",
        )
    )


def _timing(steps: Steps) -> str:
    """Mean seconds of each phase over the steps that have it, and what the phases leave of the whole."""
    times: dict[str, list[float]] = {}
    for row in steps.values():
        for name, value in row.items():
            if name.startswith("timing_s/"):
                times.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in times.items()}
    phases = {name.removeprefix("timing_s/"): value for name, value in means.items() if name not in _WHOLE_TIMES}
    whole = next((means[name] for name in _WHOLE_TIMES if name in means), None)
    if len(phases) < 2:
        return ""
    if whole is not None and whole > sum(phases.values()):
        phases["other"] = whole - sum(phases.values())
    return share_bar("Where the time of a step goes", phases, unit="s")


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Prompt, answer before, answer after; answers to one prompt are paired in their order."""
    pairs: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        which = seen[row["when"], row["prompt"]]
        seen[row["when"], row["prompt"]] += 1
        pairs.setdefault((row["prompt"], which), {})[row["when"]] = row
    if not pairs:
        return ""
    lines = []
    for (prompt, _), pair in pairs.items():
        before, after = pair.get("before"), pair.get("after")
        scores = [row["score"] for row in (before, after) if row is not None and row.get("score") is not None]
        better = len(scores) == 2 and scores[1] > scores[0]
        lines.append(f"<tr><td>{escape(prompt)}</td>{_answer(before, False)}{_answer(after, better)}</tr>")
    head = "<tr><th>Prompt</th><th>Before</th><th>After</th></tr>"
    return (
        f'<div class="scroll"><table class="samples"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _answer(row: Mapping[str, Any] | None, better: bool) -> str:
    if row is None:
        return "<td>–</td>"
    score = row.get("score")
    kind = "score up" if better else "score"
    badge = "" if score is None else f'<span class="{kind}">score {number(score)}</span>\n'
    return f"<td>{badge}{escape(row['response'])}</td>"


def _top_level(recipe: str, key: str) -> str:
    """The value of a top-level scalar in a resolved recipe."""
    lines = (line for line in recipe.split("\n") if line.startswith(f"{key}:"))
    return next(lines, "").removeprefix(f"{key}:").strip()
