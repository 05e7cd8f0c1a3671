"""What the torch engine measures of itself: the ceilings, peak memory, traces (`diptych.engine.Instruments`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

ROUNDS = 7


class TorchInstruments:
    """Of this process's device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype

    @torch.inference_mode()
    def ceilings(self) -> dict[str, float]:
        """`flops`, FLOP/s of a square product; `copy_bytes`, bytes/s, read and written."""
        is_cpu = self._device.type == "cpu"
        size, length = (2048, 2**28) if is_cpu else (8192, 2**31)
        square = torch.full((size, size), 0.5, dtype=self._dtype, device=self._device)
        line = torch.ones(length // self._dtype.itemsize, dtype=self._dtype, device=self._device)
        there = torch.empty_like(line)
        return {
            "flops": 2.0 * size**3 / self._fastest(lambda: square @ square),
            "copy_bytes": 2.0 * line.nbytes / self._fastest(lambda: there.copy_(line)),
        }

    def peak_bytes(self) -> int | None:
        """Of the CUDA allocator; None on a CPU."""
        return None if self._device.type == "cpu" else int(torch.cuda.max_memory_allocated(self._device))

    @contextmanager
    def profile(self, folder: Path) -> Iterator[dict[str, Any]]:
        """A trace for Perfetto in `folder`, and the operations in it."""
        found: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        on_gpu = self._device.type != "cpu"
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=kinds) as profile:
            yield found
        path = folder / "torch_trace.json"
        profile.export_chrome_trace(str(path))
        field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = [
            {"name": row.key, "seconds": getattr(row, field) * 1e-6, "calls": row.count}
            for row in profile.key_averages()
            # A kernel's seconds stand in the row of the operation that launched it, too.
            if not on_gpu or (row.device_type != DeviceType.CPU and not row.is_user_annotation)
        ]
        found["files"] = [str(path)]
        found["operations"] = sorted(rows, key=lambda row: -row["seconds"])

    def _fastest(self, call: Callable[[], Tensor]) -> float:
        """Seconds of the fastest of some calls; other work on the machine only adds."""
        call()
        found = []
        for _ in range(ROUNDS):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            found.append(time.perf_counter() - began)
        return min(found)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
