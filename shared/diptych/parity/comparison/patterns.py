"""Patterns of an error over an array, a step's arrays or its scalars: what `diptych.parity.comparison.causes` goes by.

Each takes the `Evidence` of a red rung and says whether it looks like that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diptych.parity.comparison.findings import RungResult
from diptych.parity.trace import Step

SAME = 0.02  # factors and shifts that vary by less than this share of themselves are one number


@dataclass(frozen=True)
class Evidence:
    """One red rung of one step of both sides, as seen through its worst array.

    rung: its result; a, b: the steps. shown: a name of the rung's that both sides have in one shape.
    """

    rung: RungResult
    a: Step
    b: Step
    name: str

    @cached_property
    def seen(self) -> np.ndarray:
        """Where the array counts on both sides."""
        return where_counted(self.a, self.b, self.name)

    @cached_property
    def x(self) -> np.ndarray:
        return np.where(self.seen, self.a.array(self.name).astype(np.float64), 0.0)

    @cached_property
    def y(self) -> np.ndarray:
        return np.where(self.seen, self.b.array(self.name).astype(np.float64), 0.0)

    @cached_property
    def error(self) -> np.ndarray:
        """|b - a|, 0 where it does not count."""
        return np.abs(self.y - self.x)

    @cached_property
    def off(self) -> np.ndarray:
        """Where the error is no rounding: above the limit, or a thousandth of the worst."""
        limit = self.rung.limit if self.rung.rung.kind == "max_abs" else 0.0
        return self.seen & (self.error > max(limit, 1e-3 * float(self.error.max(initial=0.0))))

    @property
    def is_grid(self) -> bool:
        """Rows by positions, and something is off."""
        return self.x.ndim == 2 and bool(self.off.any())

    @cached_property
    def red(self) -> list[str]:
        return [one.name for one in self.rung.red]

    def tensors(self, names: Sequence[str]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Arrays that both sides have in one shape, in float64."""
        return [
            (name, self.a.array(name).astype(np.float64), self.b.array(name).astype(np.float64))
            for name in names
            if name in self.a.tensors and name in self.b.tensors
            and self.a.array(name).shape == self.b.array(name).shape
        ]  # fmt: skip

    def under(self, *groups: str) -> list[str]:
        """Names of all roles' arrays in these groups ("gradient", "first", ...)."""
        return [name for name in self.a.tensors if name.split("/")[1:2] and name.split("/")[1] in groups]

    def all_of(self, group: str, where: Callable[[str, np.ndarray], bool]) -> bool:
        """Whether within the red roles exactly the tensors of a group for which `where` holds are red."""
        roles = {name.split("/")[0] for name in self.red}
        pairs = [(name, x) for name, x, _ in self.tensors(self.under(group)) if name.split("/")[0] in roles]
        wanted = {name for name, x in pairs if where(name, x)}
        return bool(wanted) and len(wanted) < len(pairs) and wanted == {n for n in self.red if f"/{group}/" in n}


def where_counted(a: Step, b: Step, name: str) -> np.ndarray:
    """Bool, of the array's shape: where it counts on both sides."""
    values, mask = a.array(name), a.tensors[name].mask
    seen = np.ones(values.shape, bool)
    for side in (a, b):
        if (
            mask is not None
            and mask in side.tensors
            and side.array(mask).shape == values.shape[: side.array(mask).ndim]
        ):
            one = side.array(mask).astype(bool)
            seen = seen & one.reshape(one.shape + (1,) * (values.ndim - one.ndim))
    return seen


def factor(x: np.ndarray, y: np.ndarray) -> float:
    """c of y = c x by least squares where one number explains it to 2% (and is not 1), else NaN."""
    square = float(np.sum(x * x))
    if square == 0:
        return math.nan
    c = float(np.sum(x * y)) / square
    left = float(np.linalg.norm(y - c * x))
    apart = float(np.linalg.norm(y - x))
    return c if apart > 0 and left <= SAME * apart else math.nan


def scaled(e: Evidence) -> bool:
    return e.x.size > 1 and not math.isnan(factor(e.x, e.y))


def shift(e: Evidence) -> bool:
    """Every element that counts is off by the same amount."""
    gap = (e.y - e.x)[e.seen]
    return gap.size > 1 and abs(float(gap.mean())) > 0 and float(gap.std()) <= SAME * abs(float(gap.mean()))


def affine(e: Evidence) -> bool:
    """b = c a + d with both telling."""
    x, y = e.x[e.seen], e.y[e.seen]
    if x.size < 3 or x.std() == 0:
        return False
    c, d = (float(one) for one in np.polyfit(x, y, 1))
    apart = float(np.linalg.norm(y - x))
    return apart > 0 and float(np.linalg.norm(y - c * x - d)) <= SAME * apart and abs(d) > SAME * float(abs(y).max())


def ddof(e: Evidence) -> bool:
    """One factor, and it is sqrt(n / (n - 1)) or its inverse for n numbers or a group of 2 to 64."""
    c = abs(factor(e.x, e.y)) if e.x.size > 1 else math.nan
    sizes = {int(e.seen.sum()), *range(2, 65)}
    return any(math.isclose(c, (n / (n - 1)) ** half, rel_tol=1e-4) for n in sizes if n > 1 for half in (0.5, -0.5))


def moved_columns(e: Evidence) -> bool:
    """b is a, one column to the left or to the right."""
    if not e.is_grid or e.x.shape[1] < 3:
        return False
    scale = float(np.abs(e.x).max())
    for p, q in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        both = e.seen[:, p] & e.seen[:, q]
        gap = np.abs(e.x[:, p] - e.y[:, q])[both]
        if both.sum() > 1 and gap.max() <= 1e-3 * scale and e.error.max() > 1e-2 * scale:
            return True
    return False


def first_only(e: Evidence) -> bool:
    """Only the first column of a row that counts, in most rows."""
    return one_end(e, e.seen.argmax(axis=1)) if e.is_grid else False


def last_only(e: Evidence) -> bool:
    if not e.is_grid:
        return False
    return one_end(e, e.seen.shape[1] - 1 - e.seen[:, ::-1].argmax(axis=1))


def one_end(e: Evidence, columns: np.ndarray) -> bool:
    rows = np.flatnonzero(e.seen.sum(axis=1) > 1)
    at = np.zeros_like(e.seen)
    at[rows, columns[rows]] = True
    hit = np.any(e.off, axis=1)[rows]
    return bool(len(rows) > 1 and hit.mean() > 0.5 and not (e.off & ~at)[rows].any())


def grows(e: Evidence) -> bool:
    """The error is several times larger at late positions than at early ones, over at least six of them."""
    if not e.is_grid:
        return False
    position = np.cumsum(e.seen, axis=1)[e.seen]
    error = e.error[e.seen]
    longest = int(position.max())
    if longest < 6:
        return False
    early, late = error[position <= longest / 3], error[position > 2 * longest / 3]
    return bool(late.mean() > 3 * early.mean()) and float(np.corrcoef(position, error)[0, 1]) > 0.4


def grows_backwards(e: Evidence) -> bool:
    """The error is smallest at the end of rows: it adds up from the last token to the first."""
    if not e.is_grid:
        return False
    left = np.cumsum(e.seen[:, ::-1], axis=1)[:, ::-1][e.seen]  # 1 at the last token
    error = e.error[e.seen]
    ends, rest = error[left == 1], error[left > 2]
    return rest.size > 0 and bool(ends.mean() < 0.2 * rest.mean())


def padded_rows_only(e: Evidence) -> bool:
    """Every row that is off has padding on its left, and some row has none and is right."""
    if not e.is_grid:
        return False
    role = e.name.split("/")[0]
    mask = f"{role}/probe/attention" if e.name.endswith("outputs") else "prompts/attention"
    if mask not in e.a.tensors or len(e.a.array(mask)) != len(e.x):
        return False
    padded = ~e.a.array(mask)[:, 0].astype(bool)
    hit = np.any(e.off, axis=1)
    return bool(padded.any() and not padded.all() and hit[padded].mean() > 0.5 and not hit[~padded].any())


def one_row(e: Evidence) -> bool:
    hit = np.any(e.off.reshape(len(e.off), -1), axis=1) if e.off.ndim else np.zeros(1, bool)
    return len(hit) > 2 and int(hit.sum()) == 1


def everywhere(e: Evidence) -> bool:
    return e.is_grid and int(e.off.sum()) > 0.9 * int(e.seen.sum()) and not grows(e)


def zeros(e: Evidence) -> bool:
    """One side has zeros where the other has numbers, and they agree elsewhere."""
    if not e.off.any():
        return False
    none = [np.abs(side[e.off]) == 0 for side in (e.x, e.y)]
    return bool(none[0].all() or none[1].all())


def cut_rows(e: Evidence) -> bool:
    """Scores: only rows that were cut off (no stop token) are off."""
    finish = "used/finish" if "used/finish" in e.a.tensors else "response/finish"
    if finish not in e.a.tensors or e.x.ndim != 1 or len(e.a.array(finish)) != len(e.x):
        return False
    cut = e.a.array(finish) == 0
    return bool(cut.any() and not cut.all() and e.off[cut].all() and not e.off[~cut].any())


def red_pairs(e: Evidence, group: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    red = {name.split("/")[0] for name in e.red}
    return [one for one in e.tensors(e.under(group)) if one[0].split("/")[0] in red]


def one_factor(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> float:
    """The factor between all of b's and a's arrays together; NaN where it is not one."""
    if len(pairs) < 2:
        return math.nan
    return factor(*(np.concatenate([np.ravel(one[i]) for one in pairs]) for i in (1, 2)))  # type: ignore[misc]


def all_scaled(group: str) -> Callable[[Evidence], bool]:
    return lambda e: not math.isnan(one_factor(red_pairs(e, group)))


def transposed(e: Evidence) -> bool:
    def alike(x: np.ndarray, y: np.ndarray) -> bool:
        square = x.ndim == 2 and x.shape[0] == x.shape[1]
        return square and bool(np.allclose(x.T, y, rtol=1e-3, atol=1e-6 * np.abs(x).max()))

    return any(alike(x, y) for _, x, y in e.tensors(e.red))


def ends_in(*parts: str) -> Callable[[str, np.ndarray], bool]:
    return lambda name, _: any(part in name for part in parts)


def from_layer(e: Evidence) -> bool:
    """Gradients are right above some layer and wrong in it and below: the backward pass parts there."""
    layers = {name: layer_of(name) for name in names(red_pairs(e, "gradient"))}
    red = {layer for name in e.red if (layer := layers.get(name)) is not None}
    green = {layer for name, layer in layers.items() if layer is not None and name not in e.red}
    return bool(red and green) and max(red) < min(green)


def names(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> list[str]:
    return [one[0] for one in pairs]


def layer_of(name: str) -> int | None:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def only_second(e: Evidence) -> bool:
    return bool(e.red) and all("/second/" in name for name in e.red)


def first_and_second_scaled(e: Evidence) -> bool:
    """New moments part as if the gradient had another scale: first - b1 old by c, second by c squared."""
    gaps = {}
    for group in ("first", "second"):
        pairs = [(name, x, y) for name, x, y in red_pairs(e, group) if name in e.red]
        if not pairs:
            return False
        gaps[group] = np.concatenate([np.ravel(y - x) for _, x, y in pairs])
    return bool(gaps["first"].any() and gaps["second"].any())


def beta1(e: Evidence) -> bool:
    """First moments are off, second ones are not."""
    return bool(e.red) and all("/first/" in name for name in e.red)


def parted_weights(e: Evidence) -> list[str]:
    """New weights that are red; on a later rung those of its roles that differ at all."""
    red = [name for name in e.red if "/weights/" in name]
    roles = {name.split("/")[0] for name in e.red}
    every = [name for name in e.under("weights") if name.split("/")[0] in roles]
    return red or [name for name, x, y in e.tensors(every) if (x != y).any()]


def moves(e: Evidence) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """How far the update moved each red tensor, on both sides."""
    found = []
    for name, x, y in e.tensors(parted_weights(e)):
        start = name.replace("/weights/", "/start/weights/")
        if start in e.a.tensors and e.a.array(start).shape == x.shape:
            before = e.a.array(start).astype(np.float64)
            found.append((name, x - before, y - before))
    return found


def step_scaled(e: Evidence) -> bool:
    moved = moves(e)
    c = one_factor([*moved, *moved]) if moved else math.nan
    return not math.isnan(c) and abs(c) > 1e-6


def not_moved(e: Evidence) -> bool:
    moved = moves(e)
    return bool(moved) and (not any(x.any() for _, x, _ in moved) or not any(y.any() for _, _, y in moved))


def decay(e: Evidence) -> bool:
    """The gap between both sides' new weights is one multiple of the old weights."""
    gaps = []
    for name, x, y in e.tensors(parted_weights(e)):
        start = name.replace("/weights/", "/start/weights/")
        if start in e.a.tensors and x.ndim > 1:  # where gains and biases decay too, the mask is to blame
            gaps.append((name, e.a.array(start).astype(np.float64), y - x))
    if not gaps:
        return False
    w, gap = (np.concatenate([np.ravel(one[i]) for one in gaps]) for i in (1, 2))
    c = float(np.sum(w * gap)) / float(np.sum(w * w))
    return c != 0 and float(np.linalg.norm(gap - c * w)) <= 0.2 * float(np.linalg.norm(gap))


def small_gradients(e: Evidence) -> bool:
    """The steps part most where the second moment is smallest."""
    for name, x, y in e.tensors(parted_weights(e)):
        second = name.replace("/weights/", "/second/")
        if second in e.a.tensors and x.size >= 6:
            order = np.argsort(np.ravel(e.a.array(second)))
            gap = np.ravel(np.abs(y - x))[order]
            third = len(gap) // 3
            if gap[:third].mean() > 3 * gap[-third:].mean():
                return True
    return False


def stale(e: Evidence) -> bool:
    """One side's outputs after the update are its outputs before it."""
    before = e.name.replace("next_outputs", "outputs")
    for side, new in ((e.a, e.x), (e.b, e.y)):
        if before in side.tensors and side.array(before).shape == new.shape:
            old = np.where(e.seen, side.array(before).astype(np.float64), 0.0)
            other = e.y if side is e.a else e.x
            if np.abs(new - old).max() < 0.01 * np.abs(other - old).max():
                return True
    return False


def scalars(e: Evidence) -> list[tuple[str, float, float]]:
    return [
        (name, e.a.metrics[name], e.b.metrics[name]) for name in e.red if name in e.a.metrics and name in e.b.metrics
    ]


def counted(e: Evidence) -> bool:
    """A loss is off by the ratio of all columns to those that count."""
    for name, x, y in scalars(e):
        role = name.split("/")[0]
        mask = e.a.tensors.get(f"{role}/probe/arrays/mask")
        if mask is None or not mask.values.any() or not x or not y:
            continue
        share = float(mask.values.astype(bool).mean())
        rows = [float(one.sum()) for one in mask.values.astype(bool)]
        kinds = (share, 1 / share, len(rows) / sum(rows), sum(rows) / len(rows))
        if any(kind != 1 and math.isclose(y / x, kind, rel_tol=1e-3) for kind in kinds):
            return True
    return False


def scalars_scaled(e: Evidence) -> bool:
    ratios = [y / x for _, x, y in scalars(e) if x and y]
    return len(ratios) > 1 and max(ratios) - min(ratios) <= 1e-3 * abs(max(ratios))


def only_clip(e: Evidence) -> bool:
    return any("clipfrac" in name or "clamped" in name for name in e.red)


def clipped_norm(e: Evidence) -> bool:
    """One side's norm looks clipped: a round number, below the other's."""
    return any(min(x, y) < max(x, y) and math.isclose(min(x, y), round(min(x, y), 1), rel_tol=1e-5) and min(x, y) > 0
               for name, x, y in scalars(e) if name.endswith("grad_norm"))  # fmt: skip


def is_red(*beginnings: str) -> Callable[[Evidence], bool]:
    return lambda e: any(name.startswith(beginnings) or f"/{beginnings[0]}" in name for name in e.red)


def left_right(e: Evidence) -> bool:
    """Rows hold the same tokens, padded on the other side."""
    for name, x, y in e.tensors([n for n in e.red if n in ("prompts/tokens", "batch/tokens")]):
        masks = [side.tensors.get(name.replace("tokens", "attention")) for side in (e.a, e.b)]
        if None not in masks and x.ndim == 2:
            p, q = (one.values.astype(bool) for one in masks if one is not None)
            rows = [np.array_equal(i[m], j[n]) for i, m, j, n in zip(x, p, y, q, strict=True)]
            if all(rows) and (p != q).any():
                return True
    return False


def same_rows(e: Evidence) -> bool:
    """Row ids differ in order alone."""
    return any(np.array_equal(np.sort(x), np.sort(y)) for _, x, y in e.tensors([n for n in e.red if n == "rows"]))


def many_flips(e: Evidence) -> bool:
    found = next((one for one in e.rung.findings if one.name == "response/tokens"), None)
    rows = len(e.a.array("response/tokens")) if "response/tokens" in e.a.tensors else 0
    return found is not None and found.is_red and rows > 0 and found.error > 0.5 * rows
