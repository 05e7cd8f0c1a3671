"""Faults that the parity self-test plants inside the engine (`diptych.parity.selftest.bugs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from diptych_jax import model
from diptych_jax.attention import UNLIMITED, attention


@contextmanager
def _future() -> Iterator[None]:
    """Training and scoring: a token sees the next one of its segment."""
    right = model.self_attention

    def leaking(segments_BT: Any, *, windows: Any, kernel: Any, **options: Any) -> Any:
        columns = jnp.arange(segments_BT.shape[1])
        distance_TT = columns[:, None] - columns
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        limits = jnp.asarray([UNLIMITED if window is None else window for window in windows])

        def read(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, which: Any) -> Any:
            limit = limits[0 if which is None else which]
            mask_BTT = (distance_TT >= -1) & same_BTT & (distance_TT < limit)
            return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, kernel=kernel, **options)

        return read

    model.self_attention = leaking
    jax.clear_caches()  # of programs that were traced without it
    try:
        yield
    finally:
        model.self_attention = right
        jax.clear_caches()


FAULTS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {"future": _future}
