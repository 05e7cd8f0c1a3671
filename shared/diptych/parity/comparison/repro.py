"""`diptych parity repro A B -o DIR`: the smallest failing case, as case.npz and a short script for each side.

The case is the first red rung of a comparison, cut down: one step, one array, and of what is a function of whole rows
(log-probabilities, values, sampled tokens, formulas) the fewest rows that still show it. case.npz needs NumPy alone: it
holds both sides' numbers (`recorded_a`, `recorded_b`, `seen`: where they count), the inputs, and each side's settings
as JSON (`about_a`, `about_b`). What a trace does not hold enough of comes as numbers, and README.txt says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych import random
from diptych.algorithms.dialects import experience
from diptych.data.tokenizer import Tokenizer
from diptych.engine import ENGINES, Finish
from diptych.errors import UserError
from diptych.parity.comparison.expanded import Expanded, explain, tokenizer_of
from diptych.parity.comparison.ladder import Comparison, compare_traces
from diptych.parity.comparison.patterns import where_counted
from diptych.parity.comparison.repro_scripts import ENGINE_KINDS, Kind, script
from diptych.parity.comparison.terminal import account
from diptych.parity.trace import Step, Trace
from diptych.parity.truth.truth import scoring_temperature
from diptych.recipe.load import recipe_from_text
from diptych.recipe.schema import Recipe
from diptych.stages.rollout import sampling_of

ALL_ROWS = "all rows of the probe batch (they add up)"
ROLE_OF = {"logprobs": "policy", "ref_logprobs": "policy", "values": "critic"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What goes into case.npz. about: JSON; about_b: side B's own settings where they may differ. groups: where both
    sides' weights lie among the arrays. why: of numbers alone, why they cannot be computed again."""

    kind: Kind
    name: str
    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any] = field(default_factory=dict)
    about_b: Mapping[str, Any] | None = None
    groups: tuple[str, str] = ("weights", "weights")
    rows: str = ""
    why: str = ""


def write_repro(a: Trace, b: Trace, output: Path) -> Case | None:
    """Write case.npz, side_a.py, side_b.py and README.txt into `output`, a new directory; None where nothing is red.

    Raises UserError where the directory is taken, the traces cannot be compared, or what is red is no number.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name a new directory")
    found = compare_traces(a, b)
    expanded = explain(found, a, b)
    if expanded is None:
        if found.differences:
            raise UserError(f"what differs is no number but which steps there are: {'; '.join(found.differences)}")
        return None
    case = smallest_case(found, expanded, a, b)
    output.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        "about_a": np.array(json.dumps(case.about)),
        "about_b": np.array(json.dumps(case.about if case.about_b is None else case.about_b)),
        **_named(case.arrays),
    }
    np.savez_compressed(output / "case.npz", **contents)
    for side, trace, group in zip("AB", (a, b), case.groups, strict=True):
        text = _script(case, side, trace, group, expanded)
        (output / f"side_{side.lower()}.py").write_text(text, encoding="utf-8")
    (output / "README.txt").write_text(_readme(case, found, expanded), encoding="utf-8")
    return case


def smallest_case(found: Comparison, expanded: Expanded, a: Trace, b: Trace) -> Case:
    """The first red rung as a case. Raises UserError where it has no numbers on both sides (a missing name, shapes)."""
    key = (expanded.step.stage, expanded.step.step)
    rung = expanded.rung.rung.name
    name = expanded.finding.name
    left, right = (
        one.read(*key) if expanded.step.is_deep else Step(stage=key[0], step=key[1], metrics=one.metrics(*key))
        for one in (a, b)
    )
    recorded_side = b if found.replay == "A replays B" else a
    recorded = right if found.replay == "A replays B" else left

    def made(make: Callable[..., Case | None]) -> Case | None:
        """Inputs are the recorded side's, settings each side's own."""
        ones = [make(name, left, right, recorded, one) for one in (a, b)]
        whole = make(name, left, right, recorded, recorded_side)
        if whole is None:
            return None
        known = [whole.about if one is None else one.about for one in ones]
        return replace(whole, about=known[0], about_b=known[1])

    if name in left.metrics and name in right.metrics:
        case = made(_of_loss) if rung == "loss" else None
        values = [np.asarray([side.metrics[name]]) for side in (left, right)]
        return case or _numbers(name, values[0], values[1], np.ones(1, bool), _why(rung))
    sides = [side.tensors.get(name) for side in (left, right)]
    if sides[0] is None or sides[1] is None or sides[0].values.shape != sides[1].values.shape:
        raise UserError(f"{name} ({expanded.step.name}): {expanded.finding.detail}: there is no number to reproduce")
    makers: Mapping[str, Callable[..., Case | None]] = {
        "tokens": _of_sampling, "sampler": _of_sampling, "reference": _of_outputs, "policy": _of_outputs,
        "values": _of_outputs, "next": _of_outputs, "kl": _of_formula, "returns": _of_formula,
        "advantages": _of_formula, "gradients": _of_gradient, "optimizer": _of_moment, "weights": _of_update,
    }  # fmt: skip
    make = makers.get(rung)
    case = None if make is None else made(make)
    if case is not None:
        return case
    return _numbers(name, sides[0].values, sides[1].values, where_counted(left, right, name), _why(rung))


def _why(rung: str) -> str:
    return {
        "norm": "the first update sums over the whole mini-batch, of which a trace holds a few rows",
        "optimizer": "the update's gradient is a sum over the whole mini-batch, of which a trace holds a few rows",
        "rewards": "scores come from a reward function or model that is not in the trace",
        "metrics": "logged numbers are sums over a whole step",
    }.get(rung, "the trace does not hold all of its inputs")


def _numbers(name: str, a: np.ndarray, b: np.ndarray, seen: np.ndarray, why: str) -> Case:
    """Both sides' numbers, rows without an error left out."""
    rows, text = _red_rows(a, b, seen)
    arrays = {"recorded_a": a[rows], "recorded_b": b[rows], "seen": seen[rows]}
    return Case(kind="numbers", name=name, arrays=arrays, about={"worst": _worst(arrays)}, rows=text, why=why)


def _distance(a: np.ndarray, b: np.ndarray, seen: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        apart = np.where(seen, np.abs(a.astype(np.float64) - b.astype(np.float64)), 0.0)
    return np.where(np.isnan(apart), np.inf, apart)


def _red_rows(a: np.ndarray, b: np.ndarray, seen: np.ndarray) -> tuple[Any, str]:
    """The one row that shows the largest error."""
    if a.ndim == 0:
        return ..., ""
    apart = _distance(a, b, seen)
    row = int(np.unravel_index(int(apart.argmax()), apart.shape)[0])
    return slice(row, row + 1), f"row {row} of {len(a)}"


def _worst(arrays: Mapping[str, np.ndarray]) -> list[int]:
    apart = _distance(arrays["recorded_a"], arrays["recorded_b"], arrays["seen"])
    return [int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape)]


def _recipe(trace: Trace) -> Recipe | None:
    text = trace.provenance.get("recipe")
    return None if text is None else recipe_from_text(text, name=str(trace.directory / "trace.json"))


def _model_of(trace: Trace, stage: str, role: str) -> dict[str, Any] | None:
    """config and head of a role's model, and the recipe's micro-batch; None where the trace does not say."""
    about = (trace.provenance.get("models") or {}).get(stage if role == "model" else role)
    recipe = _recipe(trace)
    if not about or not about.get("config"):
        return None
    head = about.get("head") or ("lm" if role == "policy" or stage == "sft" else "scalar")
    kinds = {"policy": "policy", "critic": "critic", "model": "policy" if stage == "sft" else "reward"}
    micro = 8 if recipe is None else getattr(recipe, stage).micro_batch_size
    return {"config": about["config"], "head": head, "role": kinds[role], "micro_batch_size": micro}


def _weights(group: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{group}/{name}": value for name, value in values.items()}


def _temperature(trace: Trace, stage: str) -> float:
    recipe = _recipe(trace)
    return scoring_temperature(recipe) if recipe is not None and stage == "rl" else 1.0


def _of_outputs(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """Log-probabilities, values or scores: a function of single rows and the weights."""
    role = ROLE_OF.get(name, name.split("/")[0])
    model = _model_of(trace, left.stage, role)
    start = recorded
    if name == "ref_logprobs" and recorded.step > 0:  # the reference is the policy before the first step
        if (left.stage, 0) not in trace or not trace.has_tensors(left.stage, 0):
            return None
        start = trace.read(left.stage, 0)
    groups = ("weights", "weights")
    weights = _weights("weights", start.under(f"{role}/start/weights"))
    if name.endswith("next_outputs"):  # each side's own new weights
        groups = ("weights_a", "weights_b")
        sides = zip(groups, (left, right), strict=True)
        weights = {k: v for group, side in sides for k, v in _weights(group, side.under(f"{role}/weights")).items()}
    recorded_a, recorded_b, seen = left.array(name), right.array(name), where_counted(left, right, name)
    rows, text = _red_rows(recorded_a, recorded_b, seen)
    inputs = _probe_inputs(recorded, role, rows) if name not in ROLE_OF else _rollout_inputs(recorded, rows)
    if model is None or inputs is None or not weights:
        return None
    tokens, first = inputs
    width, new = tokens["tokens"].shape[1], recorded_a.shape[1]
    begin = width - new if name in ROLE_OF else 0
    begin -= int(name == "values")  # the value of the state *before* each response token
    arrays = {
        "recorded_a": recorded_a[rows], "recorded_b": recorded_b[rows], "seen": seen[rows], **tokens, **weights
    }  # fmt: skip
    about = model | {"first": first, "columns": [begin, begin + new], "temperature": _temperature(trace, left.stage)}
    about["worst"] = _worst(arrays)
    return Case(kind="outputs", name=name, arrays=arrays, about=about, groups=groups, rows=text)


def _probe_inputs(step: Step, role: str, rows: Any = slice(None)) -> tuple[dict[str, np.ndarray], int] | None:
    start = f"{role}/probe"
    names = ("tokens", "attention", "positions")
    if not all(f"{start}/{name}" in step.tensors for name in (*names, "first")):
        return None
    return {name: step.array(f"{start}/{name}")[rows] for name in names}, int(step.array(f"{start}/first"))


def _rollout_inputs(step: Step, rows: Any) -> tuple[dict[str, np.ndarray], int] | None:
    """Prompts and the responses that the step went on with, side by side."""
    needed = ("prompts/tokens", "prompts/attention", "used/tokens", "used/mask")
    if not all(name in step.tensors for name in needed):
        return None
    prompt, real, response, mask = (step.array(name)[rows] for name in needed)
    attention = np.concatenate([real, mask], axis=1).astype(bool)
    positions = np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32)
    tokens = np.concatenate([prompt, response], axis=1).astype(np.int32)
    return {"tokens": tokens, "attention": attention, "positions": positions}, prompt.shape[1]


def _loss_inputs(step: Step, role: str, trace: Trace) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The whole probe batch with the loss's arrays, weights and settings."""
    model, inputs = _model_of(trace, step.stage, role), _probe_inputs(step, role)
    recipe = trace.provenance.get("recipe")
    weights = _weights("weights", step.under(f"{role}/start/weights"))
    if model is None or inputs is None or recipe is None or not weights:
        return None
    arrays = inputs[0] | weights | {f"arrays/{n}": value for n, value in step.under(f"{role}/probe/arrays").items()}
    denominators = {n: float(value) for n, value in step.under(f"{role}/probe/denominators").items()}
    temperature = _temperature(trace, step.stage) if role == "policy" else 1.0
    about = {"first": inputs[1], "recipe": recipe, "denominators": denominators, "temperature": temperature}
    return arrays, model | about


def _of_gradient(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """One array's gradient on the probe batch; its rows add up, so all of them are kept."""
    role, _, tensor = name.split("/", 2)
    found = _loss_inputs(recorded, role, trace)
    if found is None:
        return None
    arrays = found[0] | {"recorded_a": left.array(name), "recorded_b": right.array(name)}
    arrays["seen"] = np.ones(left.array(name).shape, bool)
    about = found[1] | {"tensor": tensor, "worst": _worst(arrays)}
    return Case(kind="gradients", name=name, arrays=arrays, about=about, rows=ALL_ROWS)


def _of_loss(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    role, _, rest = name.partition("/")
    found = _loss_inputs(recorded, role, trace)
    if found is None:
        return None
    values = [np.asarray([side.metrics[name]]) for side in (left, right)]
    arrays = found[0] | {"recorded_a": values[0], "recorded_b": values[1], "seen": np.ones(1, bool)}
    about = found[1] | {"metric": rest.removeprefix("loss/"), "worst": [0]}
    return Case(kind="loss", name=name, arrays=arrays, about=about, rows=ALL_ROWS)


def _of_sampling(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """One row's own draws, from the recorded prompt and the keyed uniforms."""
    kinds = {"response/tokens": "tokens", "response/logprobs": "logprobs", "response/mask": "mask"}
    model, recipe, tokenizer = _model_of(trace, left.stage, "policy"), _recipe(trace), tokenizer_of(trace)
    needed = ("rows", "prompts/tokens", "prompts/attention")
    if name not in kinds or model is None or recipe is None or tokenizer is None:
        return None
    weights = _weights("weights", recorded.under("policy/start/weights"))
    if not weights or not all(one in recorded.tensors for one in needed):
        return None
    recorded_a, recorded_b, seen = left.array(name), right.array(name), where_counted(left, right, name)
    rows, text = _red_rows(recorded_a, recorded_b, seen)
    real = recorded.array("prompts/attention")[rows].astype(bool)
    sampling = _sampling(recipe, tokenizer)
    arrays = weights | {
        "recorded_a": recorded_a[rows], "recorded_b": recorded_b[rows], "seen": seen[rows],
        "tokens": recorded.array("prompts/tokens")[rows], "attention": real,
        "positions": np.where(real, np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        "uniforms": random.uniforms(
            recipe.seed, "rl/rollout", step=left.step, rows=[int(one) for one in recorded.array("rows")[rows]],
            num_positions=sampling["max_new_tokens"],
        ),
    }  # fmt: skip
    stop = list(sampling.pop("stop_token_ids"))
    about = model | {"sampling": sampling, "stop_token_ids": stop, "pad_token_id": tokenizer.pad_token_id}
    about |= {"of": kinds[name]}
    return Case(kind="sampling", name=name, arrays=arrays, about=about | {"worst": _worst(arrays)}, rows=text)


def _sampling(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    found = asdict(sampling_of(recipe, tokenizer))
    return found | {"decode_rows": None}


def _of_formula(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """KL, rewards, returns or advantages: the fewest rows on which the formula gives what it gives on all of them (one,
    unless rows are whitened together)."""
    attribute = {"kl": "kl_per_response", "shaped": "rewards", "returns": "returns", "advantages": "advantages"}[name]
    recipe = _recipe(trace)
    needed = ("logprobs", "ref_logprobs", "values", "scores", "used/mask", "used/finish")
    if recipe is None or not all(one in recorded.tensors for one in needed):
        return None
    rl = recipe.rl
    settings = {
        "kl_coef": rl.kl_coef, "kl_estimator": rl.kl_estimator, "gamma": rl.gamma, "lam": rl.lam,
        "whiten_rewards": rl.whiten_rewards, "score_clip": rl.score_clip,
    }  # fmt: skip
    inputs = {one: recorded.array(one) for one in needed[:4]}
    inputs |= {"mask": recorded.array("used/mask").astype(bool)}
    inputs |= {"ended": recorded.array("used/finish") == int(Finish.STOP)}

    def computed(rows: Any) -> np.ndarray:
        wide = {one: inputs[one][rows].astype(np.float64) for one in needed[:4]}
        wide["scores"] = wide["scores"] - rl.missing_eos_penalty * ~inputs["ended"][rows]
        made = experience(rl.dialect, **wide, mask=inputs["mask"][rows], ended=inputs["ended"][rows], **settings)
        return np.asarray(getattr(made, attribute), np.float64)

    recorded_a, recorded_b, seen = left.array(name), right.array(name), where_counted(left, right, name)
    rows, text = _red_rows(recorded_a, recorded_b, seen)
    if not np.allclose(computed(rows), computed(slice(None))[rows], rtol=1e-12, atol=1e-12):
        rows, text = slice(None), "all rows (they are whitened together)"
    arrays = {one: value[rows] for one, value in inputs.items()}
    arrays |= {"recorded_a": recorded_a[rows], "recorded_b": recorded_b[rows], "seen": seen[rows]}
    about = {
        "dialect": rl.dialect, "settings": settings, "missing_eos_penalty": rl.missing_eos_penalty,
        "attribute": attribute, "worst": _worst(arrays),
    }  # fmt: skip
    return Case(kind="formula", name=name, arrays=arrays, about=about, rows=text)


def _of_update(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """One array's new weights from each side's own new moments."""
    role, _, tensor = name.split("/", 2)
    recipe = _recipe(trace)
    needed = [f"{role}/start/weights/{tensor}", f"{role}/first/{tensor}", f"{role}/second/{tensor}"]
    known = [f"{role}/step", f"{role}/learning_rate"]
    if recipe is None or not all(one in side.tensors for one in needed for side in (left, right)):
        return None
    optimizer = getattr(recipe, left.stage).optimizer
    if optimizer.name != "adamw" or not all(one in side.metrics for one in known for side in (left, right)):
        return None
    shape = left.array(name).shape
    arrays = {"recorded_a": left.array(name), "recorded_b": right.array(name), "seen": np.ones(shape, bool)}
    arrays["start"] = recorded.array(needed[0])
    for side, step in (("a", left), ("b", right)):
        arrays |= {f"first_{side}": step.array(needed[1]), f"second_{side}": step.array(needed[2])}
    about = {
        "betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": optimizer.weight_decay,
        "updates": int(recorded.metrics[known[0]]) + 1, "learning_rate_a": left.metrics[known[1]],
        "learning_rate_b": right.metrics[known[1]], "worst": _worst(arrays),
    }  # fmt: skip
    return Case(kind="update", name=name, arrays=arrays, about=about)


def _of_moment(name: str, left: Step, right: Step, recorded: Step, trace: Trace) -> Case | None:
    """Rows of one array's second moments, from the gradient that each side's own first moments imply."""
    role, group, tensor = name.split("/", 2)
    recipe = _recipe(trace)
    start = [f"{role}/start/{one}/{tensor}" for one in ("first", "second")]
    if group != "second" or recipe is None or not all(one in recorded.tensors for one in start):
        return None
    if not all(f"{role}/first/{tensor}" in side.tensors for side in (left, right)):
        return None
    rows, text = _red_rows(left.array(name), right.array(name), np.ones(left.array(name).shape, bool))
    arrays = {"recorded_a": left.array(name)[rows], "recorded_b": right.array(name)[rows]}
    arrays |= {"start_first": recorded.array(start[0])[rows], "start_second": recorded.array(start[1])[rows]}
    for side, step in (("a", left), ("b", right)):
        arrays[f"first_{side}"] = step.array(f"{role}/first/{tensor}")[rows]
    arrays["seen"] = np.ones(arrays["recorded_a"].shape, bool)
    about = {"betas": list(getattr(recipe, left.stage).optimizer.betas), "worst": _worst(arrays)}
    return Case(kind="moment", name=name, arrays=arrays, about=about, rows=text)


def _named(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """bfloat16 is no NumPy type: such arrays go in as float32, which holds all of them."""
    return {name: one.astype(np.float32) if one.dtype.kind == "V" else one for name, one in arrays.items()}


def _script(case: Case, side: str, trace: Trace, group: str, expanded: Expanded) -> str:
    producer = str(trace.producer.get("name", "?"))
    role = ROLE_OF.get(case.name, case.name.split("/")[0])
    return script(
        case.kind,
        side=side,
        producer=producer,
        title=f"{case.name} of {expanded.step.name}: the smallest case in which both sides part.",
        engine=producer if producer in ENGINES else None,
        precision=str(trace.producer.get("precision", "float32")),
        device="cpu" if "cpu" in str(trace.provenance.get("environment", "cpu")).lower() else "auto",
        group=group,
        stage=expanded.step.stage,
        role=role,
    )


def _readme(case: Case, found: Comparison, expanded: Expanded) -> str:
    lines = [
        f"Two runs part at {expanded.rung.rung.title}: {case.name}, {expanded.step.name}.",
        "",
        *(f"  {name:12} {text}" for name, text in account(expanded)),
        "",
        f"A: {found.names[0]}",
        f"B: {found.names[1]}",
        "",
        "case.npz   both sides' numbers (recorded_a, recorded_b; seen: where they count) and the inputs; NumPy alone",
        "           reads it; about_a and about_b are JSON, each side's own settings"
        + (f"; {case.rows}" if case.rows else ""),
        "side_a.py  computes it again on side A and prints how far that is from both recorded sides",
        "side_b.py  the same on side B",
        "",
        "Run each in the environment of its side:  python side_a.py;  python side_b.py",
    ]
    if case.why:
        lines += ["", f"The scripts only print the recorded numbers: {case.why}."]
    elif case.kind not in ENGINE_KINDS:
        lines += [
            "",
            "The scripts compute in NumPy, in float64, from the recorded inputs and each side's own settings.",
        ]
    return "\n".join(lines) + "\n"


def command(options: argparse.Namespace) -> int:
    """`diptych parity repro A B -o DIR`: 1 where a case was written, 0 where the traces are the same."""
    case = write_repro(Trace(options.a), Trace(options.b), options.output)
    if case is None:
        print("the same: there is nothing to reproduce")
        return 0
    print(f"{case.name}{f', {case.rows}' if case.rows else ''}: see {options.output / 'README.txt'}")
    return 1
