"""What the JAX engine measures of itself and its machine (`diptych.engine.Instruments`)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SIZE = {"cpu": 2048}  # rows of the square product
COPY = {"cpu": 2**28}  # bytes of the array that is copied: larger than every cache
LARGE_SIZE, LARGE_COPY = 8192, 2**31
ROUNDS = 7


class JaxInstruments:
    """Of the first device that the engine uses."""

    def __init__(self, device: Any, dtype: str):
        self._device, self._dtype = device, jnp.dtype(dtype)

    def ceilings(self) -> dict[str, float]:
        """`flops`, FLOP/s of a square product; `copy_bytes`, bytes/s, read and written."""
        size = SIZE.get(self._device.platform, LARGE_SIZE)
        square = jax.device_put(jnp.full((size, size), 0.5, self._dtype), self._device)
        product = jax.jit(lambda a, b: a @ b)
        count = COPY.get(self._device.platform, LARGE_COPY) // self._dtype.itemsize
        line = jax.device_put(jnp.ones(count, self._dtype), self._device)
        negate = jax.jit(lambda a: -a, donate_argnums=0)  # in place: no new pages to fill
        num_bytes = line.nbytes

        def copy() -> jax.Array:
            nonlocal line
            line = negate(line)
            return line

        return {
            "flops": 2.0 * size**3 / _fastest(lambda: product(square, square)),
            "copy_bytes": 2.0 * num_bytes / _fastest(copy),
        }

    def peak_bytes(self) -> int | None:
        """`peak_bytes_in_use` of the device; None on a CPU."""
        if self._device.platform == "cpu":
            return None
        return int((self._device.memory_stats() or {})["peak_bytes_in_use"])

    @contextmanager
    def profile(self, folder: Path) -> Iterator[dict[str, Any]]:
        """A trace for XProf or Perfetto in `folder`, and the operations in it."""
        found: dict[str, Any] = {}
        before = set(folder.rglob("*.xplane.pb"))
        with jax.profiler.trace(str(folder)):
            yield found
        made = sorted(set(folder.rglob("*.xplane.pb")) - before)
        found["files"] = [str(path) for path in made]
        found["operations"] = _operations(made)


def _fastest(call: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of some calls; other work on the machine only adds."""
    call().block_until_ready()
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call().block_until_ready()
        found.append(time.perf_counter() - began)
    return min(found)


def _operations(files: list[Path]) -> list[dict[str, Any]]:
    """Seconds and calls of every XLA operation, the dearest first. An operation that holds others (a loop, a call)
    counts without them."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for path in files:
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for name, own in _own_seconds(line.events):
                    seconds[name] += own
                    calls[name] += 1
    rows = [{"name": name, "seconds": seconds[name], "calls": calls[name]} for name in seconds]
    return sorted(rows, key=lambda row: -row["seconds"])


def _own_seconds(events: Any) -> Iterator[tuple[str, float]]:
    """(name, seconds without the events inside) of one line's XLA operations."""
    found = []
    for event in events:
        stats = {key: value for key, value in event.stats if key is not None}
        if "hlo_op" in stats:
            found.append(
                (event.start_ns, -event.duration_ns, event.duration_ns, f"{stats['hlo_module']}/{stats['hlo_op']}")
            )
    open_ones: list[list[Any]] = []  # [end, own, name] of the events around the one at hand
    for start, _, duration, name in sorted(found):
        while open_ones and open_ones[-1][0] <= start:
            _, own, done = open_ones.pop()
            yield done, own * 1e-9
        if open_ones:
            open_ones[-1][1] -= duration
        open_ones.append([start + duration, duration, name])
    for _, own, done in open_ones:
        yield done, own * 1e-9
