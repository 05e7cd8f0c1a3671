"""What the C library does with memory that a program frees: on a CPU, where XLA asks it for the whole of a program's
temporaries at every call.

glibc takes a large block from the kernel and gives it back when it is freed, so every call pays for its pages again:
0.5 to 2.5 microseconds for each 4 KiB, which was a third of an update of four layers of width 256. Kept, the memory
serves all programs in turn, and the process is about as large as its largest program makes it.
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
# All three are needed: XLA's blocks come from threads, whose own arenas hold nothing that large.
SETTINGS = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST}
ACCELERATORS = ("nvidiactl", "kfd", "accel*", "vfio/[0-9]*")  # devices of NVIDIA, AMD and Google, below /dev


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let the process keep what it frees and use it again; to be called before JAX starts its threads. False where that
    is left alone: another C library, or a user who tells malloc what to do (MALLOC_*, GLIBC_TUNABLES)."""
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
