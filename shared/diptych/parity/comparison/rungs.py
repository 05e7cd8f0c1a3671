"""One step of two sides, walked up the ladder: every array and scalar compared by its rung's rule, nothing left out.

What cannot be compared is red, never skipped: another shape, dtype, layout or mask, a name that only one side has, a
non-finite number on either side or on both, nothing to compare. What is *given* to a step is the premise of a replay
and must be equal bit for bit; otherwise the first rung is red and says so.

A *near-tie* is a token that the sides drew differently although their distributions agree: the uniform lay within the
noise of a boundary (`response/margins`). It is recorded and not red; what follows it in its row is another text and is
not compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from diptych.engine import Precision
from diptych.errors import UserError
from diptych.parity.comparison.changes import step_findings
from diptych.parity.comparison.clips import turned_clips
from diptych.parity.comparison.draws import drawn, drawn_finding
from diptych.parity.comparison.findings import Finding, NearTie, RungResult, Terms, first_true, is_float, join, number
from diptych.parity.steps import LADDER, NOT_COMPARED, ROLES, Rung, rung_of
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Recorded, Step

TOKENS, METRICS = LADDER[0], LADDER[-1]
FREE = Rung(name="start", title="where it starts", names=(), kind="relative_l2")
DRAWN = ("response/tokens", "response/mask", "response/finish")  # what a near-tie changes
CHECKSUMS = ("_crc32",)  # ends of the names of scalars that are equal or not, whatever the size of the difference


def climb(
    a: Step,
    b: Step,
    *,
    precision: Precision,
    limits: Mapping[str, float] | None = None,
    replay: bool = True,
    mixed: bool = False,
    vanishing: Mapping[str, Collection[str]] | None = None,
    clips: Mapping[str, float] | None = None,
) -> list[RungResult]:
    """Every rung of the ladder for one step of both sides; the arguments are those of `Terms`.

    clips: clip ranges by role, to know the flags that rounding turns (`diptych.parity.comparison.clips`); None: none is
    excused.
    Raises UserError where the steps are not the same one, or the precision has no tolerances.
    """
    if (a.stage, a.step) != (b.stage, b.step):
        raise UserError(f"{a.name} and {b.name} are not the same step")
    terms = Terms(precision=precision, limits=limits or {}, replay=replay, mixed=mixed, vanishing=vanishing or {})
    turned = turned_clips(a, b, clips or {}, noise=terms.noise) if clips else {}
    prefix, ties, flipped = drawn(a, b, terms)
    return [_rung(rung, a, b, terms, prefix, ties, flipped, turned) for rung in LADDER]


def is_logged(name: str) -> bool:
    """Whether a scalar of a step is one of the run's logged metrics, compared on the last rung."""
    rung = rung_of(name)
    return (rung is None or rung is METRICS) and why_not_compared(name) is None


def why_not_compared(name: str) -> str | None:
    """The reason why a logged number is no number of the algorithm's; None: it is compared."""
    for beginning, reason in NOT_COMPARED.items():
        # Names with a slash are beginnings (`rollout/logprob_gap` has a mean and a maximum); words are whole names.
        if name == beginning or ("/" in beginning and name.startswith(beginning)):
            return reason
    return None


def _rung(
    rung: Rung,
    a: Step,
    b: Step,
    terms: Terms,
    prefix: np.ndarray | None,
    ties: tuple[NearTie, ...],
    flipped: list[Finding],
    turned: Mapping[str, int],
) -> RungResult:
    limit = terms.limit(rung)
    findings: list[Finding] = []
    notes: list[str] = []
    for name in _names(rung, a, b):
        missing = _only_one(name, a, b, limit)
        if missing is not None:
            findings.append(missing)
        elif why := _turned(name, turned):
            notes.append(why)
        elif name in a.tensors:
            if rung is TOKENS and name in DRAWN and prefix is not None:
                findings.append(drawn_finding(name, a, b, prefix, flipped))
            elif rung.name == "weights" and _vanishes(name, terms):
                notes.append(f"{name}: its gradient is rounding alone, so its new value is too: not compared")
            else:
                findings.append(_tensor(name, a, b, rung, limit, terms, prefix))
                if rung.name == "weights" and terms.replay and not findings[-1].is_red:
                    findings += step_findings(name, a, b, limit=terms.tolerance("step_relative"))
        elif why := _explained(name, ties):
            notes.append(why)
        else:
            findings.append(_scalar(name, a.metrics[name], b.metrics[name], rung, limit, terms))
    if rung is TOKENS:
        findings += _premise(a, b, terms)
        if ties:
            notes.append(f"{len(ties)} near-tie{'s' if len(ties) > 1 else ''}: tokens that rounding explains")
    if rung is METRICS:
        left_out = sorted(name for name in a.metrics.keys() | b.metrics.keys() if why_not_compared(name))
        notes += [f"{name}: {why_not_compared(name)}: not compared" for name in left_out]
    if not findings and notes:
        return RungResult(rung=rung, status="skipped", limit=limit, reason=notes[0], notes=tuple(notes))
    if not findings:
        return RungResult(
            rung=rung, status="skipped", limit=limit, reason="neither side recorded it", notes=tuple(notes)
        )
    findings.sort(key=lambda one: (-one.over, -one.error))
    return RungResult(
        rung=rung,
        status="red" if any(one.is_red for one in findings) else "green",
        limit=limit,
        findings=tuple(findings),
        near_ties=ties if rung is TOKENS else (),
        notes=tuple(notes),
    )


def _names(rung: Rung, a: Step, b: Step) -> list[str]:
    """Everything of either side that belongs to the rung, in recorded order. Names that mean nothing go to the last."""
    names = dict.fromkeys((*a.tensors, *b.tensors, *a.metrics, *b.metrics))
    if rung is not METRICS:
        return [name for name in names if rung_of(name) is rung]
    scalars = a.metrics.keys() | b.metrics.keys()
    return [
        name
        for name in names
        if (name in scalars and is_logged(name)) or (name not in scalars and rung_of(name) is None and not _aside(name))
    ]


def _aside(name: str) -> bool:
    """Arrays that are on no rung: what was looked at inside the models, starting points (the premise), margins."""
    if name == "response/margins" or name.startswith("reference/start/"):
        return True
    role, _, rest = name.partition("/")
    return role in ROLES and rest.startswith(("taps/", "tap_gradients/", "forced_gradient/", "start/"))


def _only_one(name: str, a: Step, b: Step, limit: float) -> Finding | None:
    kinds = ["array" if name in side.tensors else "scalar" if name in side.metrics else None for side in (a, b)]
    if kinds[0] == kinds[1]:
        return None
    if None in kinds:
        return Finding(name=name, error=math.inf, limit=limit, detail=f"only {'B' if kinds[0] is None else 'A'} has it")
    return Finding(name=name, error=math.inf, limit=limit, detail=f"an {kinds[0]} in A, a {kinds[1]} in B")


def _premise(a: Step, b: Step, terms: Terms) -> list[Finding]:
    """What a step was given and stands on no rung of equal things (where it starts from, above all): the same bits in a
    replay. Sides that both ran free stand on weights of their own: those are compared as new weights are."""
    found: list[Finding] = []
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        rung = rung_of(name)
        given = [side.tensors[name].phase == "given" for side in (a, b) if name in side.tensors]
        if not any(given) or (rung is not None and (rung.kind == "equal" or not (terms.replay and all(given)))):
            continue  # it is compared on its own rung
        like, limit = TOKENS, 0.0
        if not terms.replay:
            like, limit = FREE, terms.tolerance("weights_relative_l2")
        one = _only_one(name, a, b, limit) or _tensor(name, a, b, like, limit, terms, None)
        why = "the premise of the replay" if terms.replay else "both ran free, so each stands on its own"
        found.append(replace(one, detail=join(f"given to the step: {why}", one.detail)) if one.is_red else one)
    return found


def _tensor(name: str, a: Step, b: Step, rung: Rung, limit: float, terms: Terms, prefix: np.ndarray | None) -> Finding:
    """An array that both sides have, by the rung's kind."""
    left, right = a.tensors[name], b.tensors[name]
    problem = _unlike(left, right, terms)
    mask, mask_problem = _mask(name, a, b, prefix)
    problem = problem or mask_problem
    if problem:
        return Finding(name=name, error=math.inf, limit=limit, detail=problem)
    x, y = left.values, right.values
    seen = (
        np.ones(x.shape, bool)
        if mask is None
        else np.broadcast_to(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x.shape)
    )
    if not seen.any():
        return Finding(name=name, error=math.inf, limit=limit, detail="nothing to compare")
    note = "" if x.dtype == y.dtype else f"{x.dtype} in A, {y.dtype} in B"
    for side, values in (("A", x), ("B", y)):
        bad = seen & ~np.isfinite(values) if is_float(values) else np.zeros(x.shape, bool)
        if bad.any():
            index = first_true(bad)
            pair = (number(x[index]), number(y[index]))
            return Finding(
                name=name, error=math.inf, limit=limit, index=index, pair=pair, count=int(seen.sum()),
                detail=f"{int(bad.sum())} numbers of {side} are not finite",
            )  # fmt: skip
    probe_free = not terms.replay and rung.kind == "equal" and is_float(x)
    if rung.kind == "equal" and not probe_free:
        coarse = min((x.dtype, y.dtype), key=lambda one: one.itemsize)
        differs = seen & (x.astype(coarse) != y.astype(coarse))
        error = float(differs.sum())
        index = first_true(differs) if error else None
        detail = join(f"{int(error)} of {int(seen.sum())} differ" if error else "", note)
    else:
        distance = np.where(seen, np.abs(x.astype(np.float64) - y.astype(np.float64)), 0.0)
        index = first_true(distance == distance.max())
        detail = note
        if rung.kind == "relative_l2":
            limit = 2 * limit if "/second/" in name else limit  # quadratic in the gradient: twice its error
            error, about = _relative(name, x, y, distance, a, terms, limit)
            detail = join(about, note)
        else:
            error = float(distance.max())
            limit = 2 * limit if name == "response/logprobs" else limit  # two decodes, each with its own error
            limit = terms.noise if probe_free else limit
    pair = None if index is None else (number(x[index]), number(y[index]))
    return Finding(
        name=name, error=error, limit=limit, detail=detail, index=index, pair=pair, count=int(seen.sum())
    )  # fmt: skip


def _relative(
    name: str, x: np.ndarray, y: np.ndarray, distance: np.ndarray, a: Step, terms: Terms, limit: float
) -> tuple[float, str]:
    """|a - b| / |a| in float64.

    Tensors that are rounding alone: the larger norm against that of all of their kind. A gradient (or moment) that is a
    small share of all, because its terms cancel, has the rounding of its terms: where it is beyond the limit by itself,
    it is measured against `gradient_share` of all.
    """
    norms = [float(np.linalg.norm(one.astype(np.float64))) for one in (x, y)]
    if _vanishes(name, terms):
        whole = _norm_of_kind(name, a)
        return (max(norms) / whole if whole > 0 else math.inf), "0 but for rounding: against the norm of all tensors"
    apart = float(np.linalg.norm(distance))
    error = 0.0 if apart == 0 else apart / norms[0] if norms[0] > 0 else math.inf
    kind = name.split("/")[1] if name.count("/") > 1 else ""
    if error > limit and kind in ("gradient", "first", "second"):
        share = TOLERANCES["gradient_share"].at(terms.precision) ** (2 if kind == "second" else 1)
        least = share * _norm_of_kind(name, a)
        if least > norms[0]:
            return apart / least, f"norms {norms[0]:.4g}, {norms[1]:.4g}: against {share:g} of the norm of all tensors"
    return error, f"norms {norms[0]:.4g}, {norms[1]:.4g}" if error > 0 else ""


def _norm_of_kind(name: str, a: Step) -> float:
    """Of all tensors of a role's gradients, or first moments, ... together."""
    beginning = "/".join(name.split("/")[:2])
    return math.sqrt(sum(float(np.linalg.norm(one.astype(np.float64))) ** 2 for one in a.under(beginning).values()))


def _vanishes(name: str, terms: Terms) -> bool:
    role, _, rest = name.partition("/")
    return rest.partition("/")[2] in terms.vanishing.get(role, ())


def _scalar(name: str, x: float, y: float, rung: Rung, limit: float, terms: Terms) -> Finding:
    """|a - b| / max(|a|, |b|); differences up to the floor pass, but not of norms, rates and counts."""
    finite = math.isfinite(x) and math.isfinite(y)
    distance = abs(x - y)
    detail = "" if finite else "not finite"
    if name.endswith(CHECKSUMS) or (rung.name == "optimizer" and name.endswith("/step")):
        error, limit = (float(x != y) if finite else math.inf), 0.0
        detail = join(detail, "equal or not" if error else "")
    else:
        floor = terms.floor(rung)
        if rung.name == "optimizer":  # a learning rate is given by a formula, and only rounded
            limit = terms.tolerance("function") if rung.name not in terms.limits else limit
        error = math.inf if not finite else 0.0 if distance <= floor else distance / max(abs(x), abs(y))
    return Finding(name=name, error=error, limit=limit, detail=detail, pair=(float(x), float(y)), count=1)


def _turned(name: str, turned: Mapping[str, int]) -> str | None:
    """Why what a clip flag at its edge changes is not compared; None: it is."""
    role, _, rest = name.partition("/")
    if role in turned and (rest.startswith("gradient/") or (rest.startswith("loss/") and "clipfrac" in rest)):
        return f"{name}: {turned[role]} clip flags of the probe batch lie within rounding of the edge: not compared"
    return None


def _explained(name: str, ties: tuple[NearTie, ...]) -> str | None:
    """Why a scalar that a near-tie changes is not compared; None: it is."""
    if ties and name == "rollout/tokens_crc32":
        return f"{name}: near-ties change a checksum of tokens: not compared"
    return None


def _unlike(left: Recorded, right: Recorded, terms: Terms) -> str | None:
    """What makes two arrays incomparable, before any number."""
    x, y = left.values, right.values
    if x.shape != y.shape:
        return f"shapes {list(x.shape)} and {list(y.shape)}"
    both_float = is_float(x) and is_float(y)
    if x.dtype != y.dtype and not (both_float and terms.mixed):
        return f"dtypes {x.dtype} and {y.dtype}"
    if left.layout != right.layout:
        return f"layouts {left.layout!r} and {right.layout!r}"
    if left.mask != right.mask:
        return f"masks {left.mask} and {right.mask}"
    return None


def _mask(name: str, a: Step, b: Step, prefix: np.ndarray | None) -> tuple[np.ndarray | None, str | None]:
    """Where an array counts, and what is wrong with that. The mask covers the array's leading axes."""
    mask = a.tensors[name].mask
    if mask is None:
        return None, None
    sides = [side.tensors.get(mask) for side in (a, b)]
    if sides[0] is None or sides[1] is None:
        return None, f"its mask {mask} is missing in {'A' if sides[0] is None else 'B'}"
    values = [one.values for one in sides if one is not None]
    shape = a.tensors[name].values.shape
    for side, one in zip("AB", values, strict=True):
        if one.shape != shape[: one.ndim]:
            return None, f"its mask {mask} has shape {list(one.shape)} in {side}, for an array of {list(shape)}"
        if one.dtype != bool and not np.isin(one, (0, 1)).all():
            return None, f"its mask {mask} is not of zeros and ones in {side}"
    x, y = (one.astype(bool) for one in values)
    if mask == "response/mask" and prefix is not None:  # after a near-tie the texts differ
        return x & y & prefix, None
    if (x != y).any():
        return None, f"its mask {mask} differs at {list(first_true(x != y))}"
    return x, None
