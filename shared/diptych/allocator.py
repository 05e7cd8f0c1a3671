"""What the C library does with memory that a program frees. On a CPU both frameworks ask it for large blocks at every
call: XLA for all of a program's temporaries, torch for logits and gradients.

glibc takes a large block from the kernel and gives it back when it is freed, so every call pays for its pages again:
0.5 to 2.5 microseconds for each 4 KiB, which was a third of the time of a JAX update of four layers of width 256, and a
fifth of torch's. Kept, the memory serves all calls in turn. It is not free: small blocks settle in what large ones
left, so the heap grows for some ten calls before it fits, to up to three times what one call needs (a sort of 128 MiB:
1.1 to 1.5 GB where 0.5 were held before), and then stays.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

# <malloc.h>: parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 2**31 - 1  # an int: no block is so large, no rest is so large
# Without either of the last two nothing is gained. One arena, so that what one thread frees serves the others.
SETTINGS = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST}
ACCELERATORS = ("nvidiactl", "kfd", "accel*", "vfio/[0-9]*")  # devices of NVIDIA, AMD and Google, below /dev


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let the process keep what it frees and use it again; to be called before a framework starts its threads. False
    where that is left alone: another C library, or a user who tells malloc what to do (MALLOC_*, GLIBC_TUNABLES)."""
    told = any(name.startswith("MALLOC_") for name in environment)
    told |= "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items())


def computes_on_cpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has nothing else to compute on. (JAX itself can only be asked once its threads run.)"""
    return not any(next(devices.glob(pattern), None) for pattern in ACCELERATORS)
