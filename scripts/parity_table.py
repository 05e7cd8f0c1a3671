"""The published table, docs/parity_table.md: how far the engines agree, on five models, and what the checks can see.

    python scripts/parity_table.py                                    everything: some hours on two cores
    python scripts/parity_table.py --model quickstart --check float64 lockstep
    python scripts/parity_table.py --write-only                       the page, from the results that are there

Each check is one `diptych parity` command in a process of its own; its JSON stays in --output, and a check whose JSON
is there is not run again. The page says what was run and when.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from diptych.parity.side_by_side import GAPS, growth
from diptych.run.environment import describe_environment

ROOT = Path(__file__).parents[1]
SMALL = [
    "sft.batch_size=16", "sft.micro_batch_size=8", "reward.batch_size=16", "reward.micro_batch_size=8",
    "rl.batch_size=16", "rl.micro_batch_size=8", "rl.eval_prompts=16", "rl.eval_every=50", "rl.max_kl=null",
    "data.demonstrations.limit=1000", "data.preferences.limit=1000",
    "rl.learning_rate=3e-5", "rl.critic_learning_rate=1e-4",
]  # fmt: skip
# Training is chaotic: at the quickstart's own rates rounding grows tenfold every nine iterations, and no two
# implementations agree for 300 of them. Free-running comparisons use calmer ones.
CALM = {
    "quickstart": ["rl.learning_rate=1e-5", "rl.critic_learning_rate=3e-5"],
    "stories260K": ["rl.learning_rate=3e-5", "rl.critic_learning_rate=1e-4"],
}
# Two steps of each stage need no more.
FEWER = [
    "sft.batch_size=16", "sft.micro_batch_size=8", "reward.batch_size=16", "reward.micro_batch_size=8",
    "rl.batch_size=16", "rl.micro_batch_size=8", "rl.eval_prompts=16", "data.demonstrations.limit=300",
    "data.preferences.limit=300", "data.prompts.limit=200",
]  # fmt: skip
BFLOAT16 = ["precision=bfloat16", "layout.zero.stage=1"]
MODELS = ("quickstart", "stories260K", "gpt2", "qwen3", "rnn")
CHECKS = ("float64", "lockstep", "selftest", "bfloat16")


def recipe_of(model: str, work: Path, stories: Path) -> tuple[Path, list[str]]:
    """The recipe of a model, and its settings. The families' shapes go through the quickstart's three stages."""
    if model == "quickstart":
        return ROOT / "recipes" / "quickstart.yaml", ["rl.max_kl=null"]
    if model == "stories260K":
        return ROOT / "recipes" / "stories.yaml", [f"model.path={stories}", "rl.max_kl=null"]
    whole = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    whole["name"] = model
    whole["model"] = yaml.safe_load((ROOT / "recipes" / "families" / f"{model}.yaml").read_text("utf-8"))["model"]
    path = work / f"{model}.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path, SMALL


def commands(model: str, check: str, steps: int | None) -> list[str]:
    """`diptych parity` words of a check, without the recipe."""
    many = str(steps or (300 if model == "quickstart" else 100))
    return {
        "float64": ["run", "--mode", "float64", "--steps", many],
        "lockstep": ["run", "--mode", "lockstep", "--steps", many],
        "selftest": ["selftest", "--clean", "50" if model == "quickstart" else "3"],
        "bfloat16": ["run", "--mode", "noise", "--steps", "2"],
    }[check]


def run(model: str, check: str, *, work: Path, stories: Path, steps: int | None) -> None:
    """Leave WORK/MODEL-CHECK.json, unless it is there."""
    found = work / f"{model}-{check}.json"
    if found.exists():
        return
    recipe, settings = recipe_of(model, work, stories)
    if model == "rnn" and check != "selftest":
        # A new RNN's state forgets all but the last tokens, and pairs that end alike score alike but for rounding. (The
        # self-test heats new weights itself; heated twice they are chaotic.)
        settings = [*settings, "model.new.initializer_range=0.1"]
    settings = settings + (BFLOAT16 if check == "bfloat16" else [])
    settings = settings + (CALM.get(model, []) if check == "float64" else [])
    settings = settings + (FEWER if check in ("selftest", "bfloat16") and model == "quickstart" else [])
    action, *words = commands(model, check, steps)
    partial = found.with_suffix(".partial")
    words = [action, str(recipe), *words, "--json", str(partial), *settings]
    began = time.time()
    with (work / f"{model}-{check}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "diptych.cli", "parity", *words],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"DIPTYCH_PROGRESS": "plain"},
        )  # fmt: skip
    shown = [word.replace(str(ROOT) + "/", "").replace(str(stories), "STORIES260K") for word in words]
    about = {
        "command": "diptych parity " + " ".join(word for word in shown if word not in ("--json", str(partial))),
        "code": done.returncode,
        "minutes": (time.time() - began) / 60,
        "date": time.strftime("%Y-%m-%d"),
    }
    if done.returncode not in (0, 1) or not partial.exists():
        lines = Path(log.name).read_text(encoding="utf-8").splitlines()
        why = next((line for line in reversed(lines) if line.startswith("diptych: ")), f"exit code {done.returncode}")
        found.write_text(json.dumps({"about": about, "found": None, "why": why}), encoding="utf-8")
    else:
        found.write_text(json.dumps({"about": about, "found": json.loads(partial.read_text())}), encoding="utf-8")
        partial.unlink()
    print(f"{model} {check}: exit code {done.returncode}, {about['minutes']:.1f} minutes")


def findings(found: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for step in found["steps"]:
        for rung in step["rungs"]:
            for one in rung["findings"]:
                yield step, one


def float64_cell(found: dict[str, Any]) -> str:
    """Steps of each stage, the largest relative difference of a logged metric, and whether all tokens are equal."""
    steps: dict[str, int] = {}
    for step in found["steps"]:
        steps[step["stage"]] = steps.get(step["stage"], 0) + 1
    worst, where = 0.0, ""
    equal = True
    rollouts = 0
    for step, one in findings(found):
        if one["name"].endswith("_crc32"):
            rollouts += 1
            equal &= one["error"] == 0
        elif float(one["error"]) > worst:
            worst, where = float(one["error"]), f"{one['name']}, {step['stage']} step {step['step']}"
    counts = ", ".join(f"{count} {stage}" for stage, count in steps.items())
    tokens = f"tokens of all {rollouts} rollouts {'equal' if equal else 'NOT EQUAL'}"
    where = where or "none above 1e-12, absolute"
    return f"{counts} steps: {worst:.1e} ({where}); {tokens}{'' if found['same'] else '; **RED**'}"


def lockstep_cell(found: dict[str, Any]) -> str:
    gaps: dict[str, list[float]] = {}
    for step in found["steps"]:
        errors = [
            float(one["error"])
            for rung in step["rungs"]
            for one in rung["findings"]
            if one["name"].split("/")[-1] in GAPS
        ]
        gaps.setdefault(step["stage"], []).append(max(errors, default=0.0))
    grows, _ = growth(gaps)
    words = ", ".join(f"{stage} {max(values):.1e} ({len(values)} steps)" for stage, values in gaps.items())
    return f"{words}; {'**GROWS**' if grows else 'not growing'}{'' if found['same'] else _reds(found)}"


def _reds(found: dict[str, Any]) -> str:
    """Every finding beyond its limit."""
    red = [(step, one) for step, one in findings(found) if not float(one["error"]) <= float(one["limit"])]
    words = [
        f"{one['name']} {float(one['error']):.2g} (limit then {one['limit']:.0e}), {step['stage']} step {step['step']}"
        for step, one in red[:3]
    ]
    return "; **red**: " + "; ".join(words)


def selftest_cell(found: dict[str, Any]) -> str:
    planted = [bug for bug in found["bugs"] if bug["not_planted"] is None]
    seen = sum(bool(bug["seen"]) for bug in planted)
    return f"{seen} of {len(planted)} bugs seen; {len(found['alarms'])} false alarms in {found['clean']} clean runs"


def bfloat16_cell(found: dict[str, Any]) -> str:
    parts = [
        f"{name.split(': ')[0]} {name.split(': ')[1].split('/')[0]}: {a:.1e} and {b:.1e}"
        for name, (a, b) in found["budget"].items()
    ]
    ratio = {
        rung: f"{found['gaps'][rung] / floor:.1f}"
        for rung in ("policy", "values")
        if (floor := max((row["differences"].get(rung, 0) for row in found["floors"]), default=0))
        and rung in found["gaps"]
    }
    floors = ", ".join(f"{rung} {text}" for rung, text in ratio.items())
    return f"{'; '.join(parts)}; gap in self-noise floors: {floors}"


CELLS = {"float64": float64_cell, "lockstep": lockstep_cell, "selftest": selftest_cell, "bfloat16": bfloat16_cell}
TITLES = {
    "float64": "float64, both free-running: largest relative difference of any logged metric",
    "lockstep": "float32, lockstep: largest gap of a log-probability, value or score in any step",
    "selftest": "self-test, float32: planted bugs that the ladder sees",
    "bfloat16": "bfloat16: rms error of JAX and of torch against a float64 replay, and the gap between them",
}


def page(work: Path) -> str:
    """docs/parity_table.md."""
    about = describe_environment()
    packages = {name: about["packages"][name] for name in ("jax", "torch", "deepspeed", "transformers", "numpy")}
    lines = [
        "# Parity, measured",
        "",
        f"Made by `scripts/parity_table.py` on {about['processors']} CPU cores, no accelerator: "
        f"Python {about['python']}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + ". What is measured is explained in [parity.md](parity.md).",
        "",
        "gpt2, qwen3, rnn: the quickstart's three stages with the shape of `recipes/families/`, and "
        f"`{' '.join(SMALL)}`.",
        "",
    ]
    for check in CHECKS:
        results = {model: _result(work, model, check) for model in MODELS}
        if not any(results.values()):
            continue
        lines += [f"## {TITLES[check]}", "", "| model | |", "| --- | --- |"]
        for model, result in results.items():
            cell = "not run" if result is None else _cell(check, result)
            lines.append(f"| {model} | {cell} |")
        lines += ["", *(f"* {model}: `{_shown(one, work)}` ({one['about']['minutes']:.0f} min, {one['about']['date']})"
                        for model, one in results.items() if one)]  # fmt: skip
        lines.append("")
    matrix = _result(work, "quickstart", "selftest")
    if matrix is not None:
        lines += ["## Detection matrix of the quickstart: check x bug", "", *_matrix(matrix["found"]), ""]
    return "\n".join(lines)


def _cell(check: str, result: dict[str, Any]) -> str:
    """What a check found, or why it did not get that far."""
    return f"**failed**: {result['why']}" if result["found"] is None else CELLS[check](result["found"])


def _matrix(found: dict[str, Any]) -> list[str]:
    checks = found["checks"]
    lines = ["| bug | " + " | ".join(checks) + " | fresh loss |", "| --- |" + " :-: |" * (len(checks) + 1)]
    for bug in found["bugs"]:
        if bug["not_planted"] is None:
            cells = ["x" if check in bug["seen"] else "" for check in checks]
            lines.append(f"| {bug['what']} | {' | '.join(cells)} | {'x' if bug['fresh_loss'] else ''} |")
    return [*lines, "", *(f"* {line}" for line in found["verdict"])]


def _shown(result: dict[str, Any], work: Path) -> str:
    """The command, without the settings that `recipe_of` gives (they are above) and without this machine's folders."""
    words = result["about"]["command"].replace(f"{work}/", "").split()
    return " ".join(word for word in words if word not in SMALL)


def _result(work: Path, model: str, check: str) -> dict[str, Any] | None:
    path = work / f"{model}-{check}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "parity_table", help="results and logs")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--steps", type=int, help="of each stage, for float64 and lockstep (default: 300 and 100)")
    parser.add_argument("--stories", type=Path, default=ROOT.parent / "shared" / "models" / "stories260K")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "parity_table.md")
    parser.add_argument("--write-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for check in options.check:
        for model in options.model:
            if options.write_only:
                continue
            if model == "stories260K" and not options.stories.is_dir():
                print(f"stories260K: {options.stories} is not here: left out")
                continue
            run(model, check, work=options.output, stories=options.stories, steps=options.steps)
    options.page.write_text(page(options.output), encoding="utf-8")
    print(options.page)


if __name__ == "__main__":
    main()
