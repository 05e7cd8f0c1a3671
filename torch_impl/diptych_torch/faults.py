"""Faults that the parity self-test plants inside the engine (`diptych.parity.selftest.bugs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from diptych_torch import model


@contextmanager
def _future() -> Iterator[None]:
    """Training and scoring: a token sees the next one of its segment."""
    right = model.causal_mask

    def leaking(segments: Tensor, queries: int, window: int | None) -> Tensor:
        columns = torch.arange(segments.shape[1], device=segments.device)
        following = columns[None, :] == columns[-queries:, None] + 1
        same = segments[:, -queries:, None] == segments[:, None, :]
        return right(segments, queries, window) | (following & same)[:, None]

    model.causal_mask = leaking
    try:
        yield
    finally:
        model.causal_mask = right


FAULTS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {"future": _future}
