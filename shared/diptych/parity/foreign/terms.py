"""How another trainer shapes its rewards, from what its trace tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Terms:
    """options: `diptych.algorithms.dialects.experience`'s, beside the dialect. missing_eos_penalty: taken off the
    scores of responses that did not stop by themselves, before all that."""

    dialect: str
    missing_eos_penalty: float
    options: Mapping[str, Any]


def terms_of(provenance: Mapping[str, Any]) -> Terms | None:
    """None where the trace names no dialect of ours, or lacks a setting."""
    settings, dialect = provenance.get("settings", {}), provenance.get("dialect")
    needed = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards")
    if dialect is None or not settings.keys() >= set(needed):
        return None
    options = {name: settings[name] for name in needed} | {"score_clip": settings.get("score_clip")}
    return Terms(dialect=dialect, missing_eos_penalty=settings.get("missing_eos_penalty", 0.0), options=options)
