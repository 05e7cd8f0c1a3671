"""What blame has found, for three readers: one terminal screen, JSON, and a self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diptych.parity.blame.blame import Blame
from diptych.parity.blame.search import Culprit, Looked
from diptych.parity.blame.structure import LOSS
from diptych.run.page import details, header, page, table, tile

ROWS = 34  # of the text heat map: more layers than that, and only those with something over the limit are listed
SHADES = "·░▒▓█"  # from far below the limit to far above it
EDGES = (0.1, 1.0, 10.0, 1000.0)  # over the limit: where the next shade begins
FOUND = 6  # culprits that the terminal lists


def as_text(found: Blame) -> str:
    """Verdict first, then the layers as a text heat map of error over limit."""
    lines = [verdict(found)]
    if found.culprits and found.culprits[0].verdict:
        lines.append(_named(found.culprits[0].verdict, found))
    lines.append("")
    for one in found.culprits[1:FOUND]:
        steps = f", and in {one.steps - 1} more steps" if one.steps > 1 else ""
        lines.append(f"  also {_times(one.over)} the limit: {one.text}, {one.where}{steps}")
        if one.verdict:
            lines.append(f"       {_named(one.verdict, found)}")
    if len(found.culprits) > FOUND:
        lines.append(f"  and {len(found.culprits) - FOUND} more (--json, --html)")
    lines += [""] if len(found.culprits) > 1 else []
    for role, ones in _by_role(found.looked).items():
        lines += [*_text_map(role, ones, found.limit), ""]
    lines += [
        f"A: {found.names[0]}",
        f"B: {found.names[1]}",
        f"{_steps(found)}; the error is the relative L2 of each operation's own work, over the limit of "
        f"{found.limit:.0e} ({found.precision}); layers count from 0",
    ]
    return "\n".join(lines + [f"note: {note}" for note in found.notes])


def verdict(found: Blame) -> str:
    """One line."""
    if not found.culprits:
        what = "operation" if found.depth == "ops" else "layer"
        return f"the same: no {what} of A and B differs by more than {found.limit:.0e}"
    worst = found.culprits[0]
    sure = "" if found.is_forced else "probably: "
    steps = f" and {worst.steps - 1} more steps" if worst.steps > 1 else ""
    return f"{sure}A and B differ in {worst.text}: {_times(worst.over)} the limit, {worst.where}{steps}"


def _named(verdict: str, found: Blame) -> str:
    """The verdict with the sides' names."""
    names = [name.split(" (")[0] for name in found.names]
    return verdict.replace("A is wrong", f"A ({names[0]}) is wrong").replace("B is wrong", f"B ({names[1]}) is wrong")


def _times(over: float) -> str:
    if math.isinf(over):
        return "inf x"
    return f"{over:.2g} x" if over < 100 else f"{over:.0f} x" if over < 1e6 else f"{over:.0e} x"


def _steps(found: Blame) -> str:
    steps = {(one.stage, one.step) for one in found.looked}
    return f"{len(steps)} step{'s' if len(steps) > 1 else ''}, {len(found.looked[0].operations) - 1} operations a model"


def _by_role(looked: Iterable[Looked]) -> dict[str, list[Looked]]:
    """Role and stage -> its steps."""
    groups: dict[str, list[Looked]] = {}
    for one in looked:
        groups.setdefault(f"{one.role} ({one.stage})", []).append(one)
    return groups


def worst_errors(ones: Sequence[Looked]) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The largest error over all steps: of each tap's value, of its gradient, and of each operation's weights."""
    forward = {name: max(one.forward[name] for one in ones) for name in ones[0].forward}
    backward = {name: max(one.backward[name] for one in ones) for name in ones[0].backward}
    weights = {
        name: max(one.weights.get(slot, 0.0) for one in ones for slot in operation.slots)
        for name, operation in ones[0].operations.items()
        if operation.slots and ones[0].weights
    }
    return forward, backward, weights


def _place(tap: str) -> str:
    """The row of the heat map: embed, layer 0, layer 1, ..., head."""
    if tap.startswith("layers."):
        return f"layer {tap.split('.')[1]}"
    return "embed" if tap == "embed" else "head"


def _text_map(role: str, ones: Sequence[Looked], limit: float) -> list[str]:
    rows: dict[str, list[tuple[float, str]]] = {}
    for column, errors in enumerate(worst_errors(ones)):
        for name, error in errors.items():
            row = rows.setdefault(_place(name), [(-1.0, "")] * 3)
            row[column] = max(row[column], (error / limit, name.split(".")[-1]))
    shown = rows
    if len(rows) > ROWS:
        shown = {place: row for place, row in rows.items() if max(cell[0] for cell in row) > 1}
    lines = [f"{role:<22}{'forward':<30}{'gradients of taps':<30}gradients of weights"]
    for place, row in shown.items():
        cells = [f"{_shade(over)} {_times(over):>10} {name:<16}" if over >= 0 else " " * 29 for over, name in row]
        lines.append(f"  {place:<20}{' '.join(cells)}".rstrip())
    if len(rows) > len(shown):
        lines.append(f"  ({len(rows) - len(shown)} of {len(rows)} rows have nothing above the limit)")
    return lines


def _shade(over: float) -> str:
    return SHADES[sum(over > edge for edge in EDGES)]


def as_json(found: Blame) -> str:
    """Everything, errors that are infinite as words."""
    document = {
        "format": "diptych-blame",
        "same": not found.culprits,
        "verdict": verdict(found),
        "a": found.names[0],
        "b": found.names[1],
        "precision": found.precision,
        "limit": found.limit,
        "depth": found.depth,
        "forced": found.is_forced,
        "notes": list(found.notes),
        "culprits": [_culprit(one) for one in found.culprits],
        "steps": [
            {
                "stage": one.stage, "step": one.step, "role": one.role, "forward": _numbers(one.forward),
                "backward": _numbers(one.backward),
                "weights": _numbers({slot if layer is None else f"layers.{layer}.{slot}": error
                                     for (slot, layer), error in one.weights.items()}),
            }
            for one in found.looked
        ],
    }  # fmt: skip
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _culprit(one: Culprit) -> dict[str, Any]:
    return {
        "role": one.role,
        "where": one.where,
        "steps": one.steps,
        "direction": one.direction,
        "layer": one.layer,
        "operations": list(one.operations),
        "title": one.title,
        "over_limit": _number(one.over),
        "evidence": _numbers(dict(one.evidence)),
        "verdict": one.verdict or None,
    }


def _numbers(errors: Mapping[str, float]) -> dict[str, float | str]:
    return {name: _number(error) for name, error in errors.items()}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def as_page(found: Blame) -> str:
    """The page: verdict, culprits, and for each role a heat map of layers by operations, forward and backward."""
    facts = [("A", found.names[0]), ("B", found.names[1]), ("precision", found.precision), ("depth", found.depth),
             ("limit", f"{found.limit:.0e}"), ("steps", _steps(found))]  # fmt: skip
    worst = found.culprits[0] if found.culprits else None
    judged = "not asked" if worst is None or not worst.verdict else _named(worst.verdict, found).split(" (off")[0]
    tiles = [
        tile("Verdict", "different" if worst else "the same", "each operation on the other side's inputs"),
        tile("Where", *_place_and_operation(worst)),
        tile("Error over limit", "below 1" if worst is None else _times(worst.over), "relative L2"),
        tile("Truth", judged, "NumPy float64"),
    ]  # fmt: skip
    parts = [header("Blame", facts), f'<p class="lead">{escape(verdict(found))}.</p>',
             f'<div class="tiles">{"".join(tiles)}</div>']  # fmt: skip
    parts += [f'<p class="lead">{escape(note)}.</p>' for note in found.notes]
    if found.culprits:
        rows = [
            [
                _times(one.over),
                one.direction,
                one.title,
                ", ".join(f"{name} {error:.2g}" for name, error in one.evidence),
                one.where + (f" (+{one.steps - 1} steps)" if one.steps > 1 else ""),
                _named(one.verdict, found),
            ]
            for one in found.culprits
        ]
        columns = ["over limit", "direction", "operation", "what differs (relative L2)", "where", "truth"]
        parts += ["<h2>Operations at fault</h2>", table(columns, rows, numeric=(0,))]
    for role, ones in _by_role(found.looked).items():
        parts.append(f"<h2>{escape(role)}</h2>")
        titles = ("Forward: what each operation makes", "Backward: the gradient that comes back to each tap",
                  "Backward: the gradient of each operation's weights")  # fmt: skip
        for title, errors in zip(titles, worst_errors(ones), strict=True):
            if errors:
                parts += [f"<h3>{escape(title)}</h3>", _heat_map(errors, found.limit)]
        parts.append(details("All errors", _all_errors(ones)))
    legend = "Colour: error over limit, worst of all steps. Grey is below, orange above, red a thousand times above."
    return page("Blame", "\n".join(parts) + f"<footer>{escape(legend)}</footer>")


def _place_and_operation(worst: Culprit | None) -> tuple[str, str]:
    if worst is None:
        return "nowhere", "no operation is above the limit"
    return "outside the layers" if worst.layer is None else f"layer {worst.layer}", worst.title


def _heat_map(errors: Mapping[str, float], limit: float) -> str:
    """Layers down, operations across; what lies outside the layers in a line above and below."""
    inside: dict[int, dict[str, float]] = {}
    columns: dict[str, None] = {}
    outside = {}
    for name, error in errors.items():
        if name.startswith("layers."):
            _, layer, operation = name.split(".")
            inside.setdefault(int(layer), {})[operation] = error / limit
            columns[operation] = None
        elif name != LOSS:
            outside[name] = error / limit
    heads = "".join(f'<th class="number" style="padding:8px">{escape(name)}</th>' for name in columns)
    lines = "".join(
        f"<tr><th>layer {layer}</th>{''.join(_cell(row.get(name), f'layers.{layer}.{name}') for name in columns)}</tr>"
        for layer, row in sorted(inside.items())
    )
    around = "".join(f"<tr><th>{escape(name)}</th>{_cell(over, name)}</tr>" for name, over in outside.items())
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        f'<div class="scroll" style="margin-top:8px"><table><tbody>{around}</tbody></table></div>'
    )


def _cell(over: float | None, name: str) -> str:
    """Its colour says how far above the limit, its text too."""
    if over is None:
        return "<td></td>"
    heat = 0.0 if over <= 0 else max(0.0, min(1.0, (math.log10(min(over, 1e6)) + 2) / 5))
    color = f"rgba(217,112,8,{0.25 + 0.5 * heat:.2f})" if over > 1 else f"rgba(139,148,159,{0.3 * heat:.2f})"
    color = f"rgba(200,40,40,{0.5 + 0.4 * heat:.2f})" if over > EDGES[-1] else color
    bold = ";font-weight:700" if over > 1 else ""
    return (
        f'<td class="number" style="padding:6px 8px;background:{color}{bold}" '
        f'title="{escape(name)}: {over:.3g} times the limit">{_times(over).removesuffix(" x")}</td>'
    )


def _all_errors(ones: Sequence[Looked]) -> str:
    rows = [
        [f"{one.stage} {one.step}", name, f"{one.forward[name]:.3g}", f"{one.backward[name]:.3g}"]
        for one in ones
        for name in one.forward
    ]
    return table(["step", "tap", "value", "gradient"], rows, numeric=(2, 3))
