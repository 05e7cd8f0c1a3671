"""The first red rung, told in full: where, both values, what the difference means, who is wrong, and likely why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diptych.data.tokenizer import Tokenizer
from diptych.errors import UserError
from diptych.parity.comparison import measures
from diptych.parity.comparison.causes import Cause, likely_causes
from diptych.parity.comparison.findings import Finding, RungResult
from diptych.parity.comparison.ladder import Comparison, StepResult
from diptych.parity.comparison.patterns import Evidence, where_counted
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Step, Trace
from diptych.parity.truth.truth import Truth, who

LOGPROBS = ("logprobs", "ref_logprobs", "response/logprobs", "policy/outputs", "policy/next_outputs")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a rollout an element lies. row: its id (a prompt's repeats have ids of their own), None: not known.
    position: its column, from the first response token where the layout is "rows new". text: None: not known."""

    row: int | None = None
    position: int | None = None
    token: int | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """truth: the float64 value at the element, None where it is not known. verdict: who is wrong, in words; "" where
    nobody asked. passing: the smallest limit with which this rung would be green; inf: none."""

    step: StepResult
    rung: RungResult
    finding: Finding
    place: Place
    measured: tuple[tuple[str, str], ...]
    truth: float | None
    verdict: str
    causes: tuple[Cause, ...]
    passing: float

    @property
    def others(self) -> int:
        """Further red arrays and scalars of the rung."""
        return len(self.rung.red) - 1


def explain(found: Comparison, a: Trace, b: Trace, *, truth: str | None = None) -> Expanded | None:
    """Expand the first red rung; None where none is red.

    truth: "oracle" (NumPy in float64), or the directory of a trace recorded in float64. Raises UserError where that is
    no such trace.
    """
    third = None if truth in (None, "oracle") else _truth_trace(Path(str(truth)))
    if found.first is None:
        return None
    step, rung = found.first
    finding = rung.red[0]
    if step.is_deep:
        left, right = a.read(step.stage, step.step), b.read(step.stage, step.step)
    else:
        left, right = (
            Step(stage=step.stage, step=step.step, metrics=one.metrics(step.stage, step.step)) for one in (a, b)
        )
    value, verdict = None, ""
    if third is not None:
        value, verdict = _by_trace(finding, rung, left, right, third)
    elif truth is not None:
        value, verdict = _by_oracle(found, finding, rung, (a, left), (b, right))
    shown = _shown(rung, left, right)
    blank = Evidence(rung=rung, a=left, b=right, name=shown or "")
    return Expanded(
        step=step,
        rung=rung,
        finding=finding,
        place=_place(finding, left, a, b),
        measured=tuple(_measured(finding, left, right, a)),
        truth=value,
        verdict=verdict,
        causes=tuple(likely_causes(blank)) if shown or _all_scalars(rung) else (),
        passing=_passing(rung),
    )


def _all_scalars(rung: RungResult) -> bool:
    return rung.rung.name in ("loss", "norm", "metrics")


def _shown(rung: RungResult, a: Step, b: Step) -> str | None:
    """The worst array of the rung that both sides have in one shape."""
    for one in rung.red:
        if one.name in a.tensors and one.name in b.tensors and a.array(one.name).shape == b.array(one.name).shape:
            return one.name
    return None


def _passing(rung: RungResult) -> float:
    """In the rung's own limit: second moments and the sampler have twice of it."""
    return max(measures.passing_limit(one.error * (rung.limit / one.limit if one.limit else 1)) for one in rung.red)


def _place(finding: Finding, step: Step, a: Trace, b: Trace) -> Place:
    recorded = step.tensors.get(finding.name)
    if recorded is None or finding.index is None or not recorded.layout:
        return Place()
    axes, index = recorded.layout.split(), finding.index
    rows = step.tensors.get("rows")
    if axes[0] == "rows":
        row = int(rows.values[index[0]]) if rows is not None and index[0] < len(rows.values) else None
        position = index[1] if len(index) > 1 else None
        names = {"prompt": "prompts/tokens", "new": "response/tokens" if "response/" in finding.name else "used/tokens"}
        name = names.get(axes[1], "") if len(axes) > 1 else ""
    elif axes[:2] == ["batch", "time"]:
        role = finding.name.split("/")[0]
        row, position = None, index[1] if len(index) > 1 else None
        name = "batch/tokens" if role == "batch" else f"{role}/probe/tokens"
    else:
        return Place()
    tokens = step.tensors.get(name)
    if position is None or tokens is None or any(i >= n for i, n in zip(index[:2], tokens.values.shape, strict=True)):
        return Place(row=row, position=position)
    token = int(tokens.values[index[:2]])
    return Place(row=row, position=position, token=token, text=token_text(token, a, b))


def token_text(token: int, *traces: Trace) -> str | None:
    """The token in words, by the tokenizer that a trace holds; None where none does, or does not know it."""
    for trace in traces:
        tokenizer = tokenizer_of(trace)
        if tokenizer is not None:
            text = tokenizer.decode([token], skip_special_tokens=False)
            return text or None
    return None


def tokenizer_of(trace: Trace) -> Tokenizer | None:
    """The policy's tokenizer, where the trace holds its folder."""
    directory = trace.directory / "tokenizer"
    return Tokenizer.load(directory) if directory.is_dir() else None


def _measured(finding: Finding, a: Step, b: Step, trace: Trace) -> list[tuple[str, str]]:
    """What the difference means, as (name, value)."""
    name = finding.name
    if name not in a.tensors or name not in b.tensors or a.array(name).shape != b.array(name).shape:
        return []
    x, y = a.array(name), b.array(name)
    mask = where_counted(a, b, name)
    if not mask.any() or x.dtype.kind != "f" or not (np.isfinite(x[mask]).all() and np.isfinite(y[mask]).all()):
        return []
    largest, index, rms = measures.absolute(x, y, mask)
    ulps, _ = measures.ulp_distance(x, y, mask)
    found = [
        ("max |a - b|", f"{largest:.3g} at {list(index)}"),
        ("rms", f"{rms:.3g}"),
        ("relative L2", f"{measures.relative_l2(x, y, mask):.3g}"),
        ("ulp", f"{ulps:,} at most"),
        ("sign flips", f"{measures.sign_flips(x, y, mask):.2%}"),
    ]
    if name in LOGPROBS:
        apart = measures.divergence(x, y, mask)
        found += [
            ("KL per token", f"k1 {apart.k1:.3g}, k3 {apart.k3:.3g} nats"),
            ("token-probability error", f"mean {apart.mean_error:.6f}, max {apart.max_error:.4f}"),
            ("effective sample size", f"{apart.ess:.4%}"),
        ]
    found += _clipped(name, a, x, y, trace)
    return found


def _clipped(name: str, a: Step, x: np.ndarray, y: np.ndarray, trace: Trace) -> list[tuple[str, str]]:
    needed = [a.tensors.get(f"policy/probe/arrays/{one}") for one in ("old_logprobs", "advantages", "mask")]
    settings = Truth(trace, a).recipe
    if name != "policy/outputs" or settings is None or None in needed:
        return []
    old, advantages, mask = (one.values for one in needed if one is not None)
    flips = measures.clip_flips(
        x, y, old_logprobs=old, advantages=advantages, clip_range=settings.rl.clip_range, mask=mask.astype(bool)
    )
    return [("clip flips", f"{flips.flips} of {flips.total} tokens, margin of the ratio at most {flips.margin:.2g}")]


# Who is wrong.


def _truth_trace(directory: Path) -> Trace:
    trace = Trace(directory)
    if trace.producer.get("precision") != "float64":
        raise UserError(
            f"--truth {directory}: was computed in {trace.producer.get('precision')}; a truth is recorded in float64 "
            f"(diptych parity record RECIPE precision=float64 --replay A)"
        )
    return trace


def _by_trace(finding: Finding, rung: RungResult, a: Step, b: Step, truth: Trace) -> tuple[float | None, str]:
    key = (a.stage, a.step)
    if key not in truth:
        raise UserError(f"--truth {truth.directory}: holds no {a.name}: record it with the same stages and --every")
    third = truth.read(*key)
    name = finding.name
    if name in a.metrics and name in b.metrics and name in third.metrics:
        true = third.metrics[name]
        return true, _scalar_verdict(a.metrics[name], b.metrics[name], true, rung.limit)
    if name not in third.tensors or name not in a.tensors or name not in b.tensors:
        return None, f"cannot tell: {name} is not in all three traces"
    return _array_verdict(finding, rung, a, b, third.array(name))


def _by_oracle(
    found: Comparison, finding: Finding, rung: RungResult, a: tuple[Trace, Step], b: tuple[Trace, Step]
) -> tuple[float | None, str]:
    """In a replay both sides' inputs are the recorded side's; sides that ran free have their own."""
    name = finding.name
    recorded = b if found.replay == "A replays B" else a
    truth = Truth(*recorded)
    left, right = a[1], b[1]
    if name in left.metrics and name in right.metrics:
        if name.endswith("/grad_norm"):
            return None, _by_consistency(found, name, a, b)
        true = truth.of(name)
        if not isinstance(true, int | float):
            return None, "cannot tell: there is no truth of this number"
        return float(true), _scalar_verdict(left.metrics[name], right.metrics[name], float(true), rung.limit)
    if name not in left.tensors or name not in right.tensors:
        return None, f"cannot tell: {'A' if name not in left.tensors else 'B'} has no {name}"
    if left.array(name).shape != right.array(name).shape:
        return None, "cannot tell: the shapes differ"
    if rung.rung.name in ("optimizer", "weights"):
        return None, _by_consistency(found, name, a, b)
    if rung.rung.name == "gradients":
        x, y = left.array(name).astype(np.float64), right.array(name).astype(np.float64)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return None, _finite_verdict(x, y)
        true, along_a, along_b = truth.gradient_verdict(name, x, y)
        noise = rung.limit * float(np.linalg.norm(x))
        verdict = _verdict(abs(along_a - true), abs(along_b - true), noise, "along the direction in which they part")
        return None, verdict
    if rung.rung.name == "next" and found.replay:
        # Each side's outputs come from its own new weights.
        truths = [Truth(*side).of(name) for side in (a, b)]
        if any(not isinstance(one, np.ndarray) for one in truths):
            return None, "cannot tell: there is no truth of these outputs"
        seen = where_counted(left, right, name)
        errors = [
            float(np.abs(side.array(name) - np.asarray(true))[seen].max())
            for side, true in zip((left, right), truths, strict=True)
        ]
        if max(errors) <= rung.limit:  # each side's outputs are those of its weights: those parted, within their limit
            worst = [
                max((v for k, v in _consistency(found, a, b, side, name.split("/")[0]).items() if k != "grad_norm"),
                    default=math.nan)
                for side in (a, b)
            ]  # fmt: skip
            how = f"the outputs are those of each side's new weights; {_own_moments(found)}"
            return None, _verdict(worst[0], worst[1], TOLERANCES["own_update"].at(found.precision), how)
        return None, _verdict(errors[0], errors[1], rung.limit, "each against its own new weights")
    true = truth.of(name)
    if not isinstance(true, np.ndarray):
        return None, "cannot tell: there is no truth of this array"
    return _array_verdict(finding, rung, left, right, true)


def _array_verdict(finding: Finding, rung: RungResult, a: Step, b: Step, true: np.ndarray) -> tuple[float | None, str]:
    name = finding.name
    x, y = a.array(name).astype(np.float64), b.array(name).astype(np.float64)
    if not x.shape == y.shape == true.shape:
        return None, f"cannot tell: shapes {list(x.shape)}, {list(y.shape)}, truth {list(true.shape)}"
    seen = where_counted(a, b, name)
    value = None if finding.index is None else float(true[finding.index])
    if not (np.isfinite(x[seen]).all() and np.isfinite(y[seen]).all()):
        return value, _finite_verdict(x[seen], y[seen])
    if rung.rung.kind == "relative_l2":
        errors = [measures.relative_l2(true.astype(np.float64), side, seen) for side in (x, y)]
    else:
        errors = [measures.absolute(true.astype(np.float64), side, seen)[0] for side in (x, y)]
    return value, _verdict(errors[0], errors[1], finding.limit, "")


def _finite_verdict(x: np.ndarray, y: np.ndarray) -> str:
    bad = [not np.isfinite(side).all() for side in (x, y)]
    if all(bad):
        return "both: not finite on either side"
    return f"{'A' if bad[0] else 'B'} is wrong: not finite"


def _scalar_verdict(a: float, b: float, true: float, limit: float) -> str:
    scale = max(abs(true), abs(a), abs(b)) or 1.0
    return _verdict(abs(a - true) / scale, abs(b - true) / scale, limit, "")


def _by_consistency(found: Comparison, name: str, a: tuple[Trace, Step], b: tuple[Trace, Step]) -> str:
    """Moments and weights: does each side's update follow from its own moments, by the recorded side's recipe?"""
    role, _, rest = name.partition("/")
    errors = [_consistency(found, a, b, side, role).get(rest, math.nan) for side in (a, b)]
    return _verdict(errors[0], errors[1], TOLERANCES["own_update"].at(found.precision), _own_moments(found))


def _consistency(
    found: Comparison, a: tuple[Trace, Step], b: tuple[Trace, Step], side: tuple[Trace, Step], role: str
) -> dict[str, float]:
    recorded = b if found.replay == "A replays B" else a if found.replay else side
    return Truth(recorded[0], side[1]).consistency(role)


def _own_moments(found: Comparison) -> str:
    recipes = [one.get("recipe") for one in found.provenances]
    whose = {"A replays B": ", by B's recipe", "": ", by its own recipe"}.get(found.replay, ", by A's recipe")
    return f"each side's update against its own moments{whose if recipes[0] != recipes[1] else ''}"


def _verdict(a_error: float, b_error: float, noise: float, how: str) -> str:
    verdict = who(a_error, b_error, noise)
    if math.isnan(a_error) or math.isnan(b_error):
        return f"{verdict}: there is no truth of it"
    how = how and f", {how}"
    return f"{verdict} (error against float64: A {a_error:.2g}, B {b_error:.2g}; noise {noise:.1g}{how})"
