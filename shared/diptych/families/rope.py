"""Rotary position embeddings: what config.json says of them, and the frequencies, made once for both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from diptych.errors import UserError

# kind -> (fields that must be given, fields that may be)
KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        ),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor", "original_max_position_embeddings")),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding; field names as in config.json. dim: how many of a head's columns are rotated.

    limit: max_position_embeddings of the model. The kinds: Su et al. 2021 (default), Chen et al. 2023 (linear: position
    interpolation), bloc97 2023 (dynamic: NTK-aware, by sequence length), Llama 3.1 (llama3: by wavelength), Peng et al.
    2024 (yarn), Ding et al. 2024 (longrope).
    """

    kind: str
    theta: float
    dim: int
    limit: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Do the frequencies depend on how long a sequence is? Then keys in a cache would have to be turned again as
        it grows past `original_max_position_embeddings`."""
        return self.kind in ("dynamic", "longrope")

    @property
    def reach(self) -> int:
        """The longest sequence: dynamic scaling goes on beyond the model's own limit."""
        return math.ceil(self.limit * self.factor) if self.kind == "dynamic" else self.limit

    def rows(self, lengths: Any) -> Any:
        """Which row of `frequencies` sequences of these lengths take (integers of NumPy, JAX or torch)."""
        beyond = lengths - self.original_max_position_embeddings
        if self.kind == "longrope":
            return beyond > 0
        return beyond * (beyond > 0)


def parse_rope(
    settings: Mapping[str, Any], *, where: str, theta: float, head_dim: int, limit: int, original: int | None = None
) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` (before; `type` before 4.43).

    theta: where the settings give none. original: config.json's own original_max_position_embeddings, which wins.
    """
    settings = dict(settings)
    kind = settings.pop("rope_type", None) or settings.get("type") or "default"
    settings.pop("type", None)
    kind = {"su": "longrope"}.get(kind, kind)
    theta = float(settings.pop("rope_theta", None) or theta)
    share = float(settings.pop("partial_rotary_factor", None) or 1.0)
    dim = int(head_dim * share)
    if kind not in KINDS:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    needed, optional = KINDS[kind]
    settings = {name: value for name, value in settings.items() if value is not None}
    if original is not None and kind in ("llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = original
    missing = [name for name in needed if name not in settings]
    unknown = [name for name in settings if name not in needed + optional]
    if missing or unknown:
        raise UserError(
            f"{where}: RoPE type {kind!r} needs {needed or 'no field'}: missing {missing}, unknown {unknown}"
        )
    if dim % 2 or not 0 < dim <= head_dim:
        raise UserError(f"{where}: {dim} of {head_dim} columns of a head are rotated; the number must be even")
    mscale, all_dim = settings.pop("mscale", None), settings.pop("mscale_all_dim", None)
    settings.setdefault("original_max_position_embeddings", limit)
    known = settings["original_max_position_embeddings"]
    if kind == "dynamic":
        settings["original_max_position_embeddings"] = limit  # transformers scales from max_position_embeddings on
    if kind == "yarn" and "attention_factor" not in settings:
        scale = _yarn_scale(settings["factor"], mscale or 1.0)
        settings["attention_factor"] = scale / _yarn_scale(settings["factor"], all_dim) if mscale and all_dim else (
            _yarn_scale(settings["factor"], 1.0)
        )  # fmt: skip
    if kind == "longrope":
        factor = settings.get("factor", limit / known)
        if "attention_factor" not in settings:
            settings["attention_factor"] = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(known))
        for name in ("short_factor", "long_factor"):
            settings[name] = tuple(float(value) for value in settings[name])
            if len(settings[name]) != dim // 2:
                raise UserError(f"{where}: {name} has {len(settings[name])} numbers, {dim // 2} pairs are rotated")
    return Rope(kind=kind, theta=theta, dim=dim, limit=limit, **settings)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@lru_cache(maxsize=64)
def frequencies(rope: Rope) -> Float[np.ndarray, "rows half"]:
    """Inverse frequencies, float32 [rows, dim / 2], computed in float64 and rounded once; row by `Rope.rows`.

    One row, unless the frequencies depend on the length of a sequence. Both engines take these very numbers, so their
    angles are equal. Read-only.
    """
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain = 1.0 / rope.theta**exponents
    table = _TABLES[rope.kind](rope, plain).astype(np.float32)
    table.flags.writeable = False
    return table


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    wavelengths = 2 * math.pi / plain
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    blend = (rope.original_max_position_embeddings / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    middle = (1 - blend) * plain / rope.factor + blend * plain
    return np.where(wavelengths < high, plain, np.where(wavelengths > low, plain / rope.factor, middle))[None]


def _dynamic(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """One row for every length from the original limit to `factor` times it. transformers takes the longest row of a
    batch for all of it; here each row has its own, so that no row depends on its neighbours."""
    del plain
    original = rope.original_max_position_embeddings
    lengths = np.arange(original, max(original, math.ceil(original * rope.factor)) + 1, dtype=np.float64)
    base = rope.theta * (rope.factor * lengths / original - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return 1.0 / base[:, None] ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    def pair(rotations: float) -> float:
        """The pair of columns that turns this often over the original length."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp))[None]


_TABLES = {
    "default": lambda rope, plain: plain[None],
    "linear": lambda rope, plain: plain[None] / rope.factor,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": lambda rope, plain: np.stack(
        [plain / np.asarray(rope.short_factor), plain / np.asarray(rope.long_factor)]
    ),
}
