"""The processes of a run: which one this is, what only the first does, and what all must have in common.

Every process runs the same code on the same numbers (law 5) and holds a part of the arrays. Process 0 alone writes
files, asks reward functions and prints. What it does goes through `first`, so that the others wait for it, get its
result, and stop with its error. All methods are collective: every process calls them in the same order.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped, UInt8

from diptych.errors import InvariantError, UserError

T = TypeVar("T")
Gather = Callable[[UInt8[np.ndarray, " bytes"]], UInt8[np.ndarray, "processes bytes"]]

# Network file systems show a new file to other hosts after their caches' time (NFS: 3 to 60 seconds).
SECONDS_TO_SEE = 120.0
_SMALLEST = 256  # bytes of a message; longer ones are padded to a power of two, so that an engine compiles few sizes


@dataclass(frozen=True, kw_only=True)
class World:
    """Process `index` of `count`. gather: the same number of bytes of every process, in all (not called when alone)."""

    index: int = 0
    count: int = 1
    gather: Gather = lambda message: message[None]

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def first(self, action: Callable[[], T], *, leaves: Path | None = None) -> T:
        """The result of `action`, which process 0 runs while the others wait. Its error is raised in all of them.

        leaves: what `action` leaves on the shared file system; every process goes on once it sees it. Raises UserError
        in all where one does not.
        """
        if self.count == 1:
            return action()
        outcome: tuple[bool, object] = (True, None)
        failure: BaseException | None = None
        if self.is_main:
            try:
                outcome = (True, action())
            except (UserError, InvariantError) as error:
                failure, outcome = error, (False, error)
            except Exception as error:
                failure = error
                outcome = (False, RuntimeError(f"process 0 failed: {type(error).__name__}: {error}"))
        good, value = pickle.loads(self._messages(pickle.dumps(outcome))[0])
        if failure is not None:
            raise failure
        if not good:
            raise value
        if leaves is not None:
            self._see(leaves)
        return value

    def share(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The array of process 0, bit for bit, in every process."""
        return self.first(lambda: array)

    def agree(self, what: str, value: Callable[[], str]) -> None:
        """UserError, in every process, where `value` is not the same in all of them."""
        if self.count == 1:
            return
        marks = self._messages(hashlib.sha256(value().encode()).digest())
        odd = [index for index, mark in enumerate(marks) if mark != marks[0]]
        if odd:
            raise UserError(
                f"{what}: not the same in process 0 and process {', '.join(map(str, odd))}: start every process with "
                "the same command, files and versions"
            )

    def _messages(self, message: bytes) -> list[bytes]:
        """The message of every process."""
        lengths = self.gather(np.frombuffer(len(message).to_bytes(8, "little"), np.uint8))
        sizes = [int.from_bytes(length.tobytes(), "little") for length in lengths]
        padded = np.zeros(max(_SMALLEST, 1 << (max(sizes) - 1).bit_length()), np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        return [row[:size].tobytes() for row, size in zip(self.gather(padded), sizes, strict=True)]

    def _see(self, path: Path) -> None:
        deadline = time.monotonic() + SECONDS_TO_SEE
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [index for index, message in enumerate(self._messages(bytes([path.exists()]))) if message != b"\x01"]
        if blind:
            raise UserError(
                f"{path}: process 0 wrote it, and process {', '.join(map(str, blind))} does not see it: the run "
                "directory must lie on a file system that all hosts share"
            )


SINGLE = World()
