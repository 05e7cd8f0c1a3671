"""Progress on standard error: a bar with rates on a terminal, a plain line now and then in a log, or nothing.

DIPTYCH_PROGRESS=off silences it; DIPTYCH_PROGRESS=plain asks for lines on a terminal too.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, TextIO

from tqdm import tqdm

from diptych.errors import UserError

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts the steps of a stage. A context manager. Rates are over the time since this start, not before a resume.

    total, initial: steps. silent: print nothing (a process that is not the first). stream, clock, mode: for tests; a
    terminal gets a bar, everything else lines.
    """

    def __init__(
        self,
        total: int,
        stage: str,
        *,
        initial: int = 0,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        mode: Literal["bar", "plain", "off"] | None = None,
    ) -> None:
        self._total, self._stage, self._initial = total, stage, initial
        self._stream = stream or sys.stderr
        self._clock = clock
        self._mode = "off" if silent else mode or _mode(self._stream)
        self._done, self._tokens = initial, 0
        self._shown: dict[str, float] = {}
        self._start = self._printed = clock()
        self._bar: tqdm | None = None
        if self._mode == "bar":
            layout = "{desc:<6} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(
                total=total, initial=initial, desc=stage, file=self._stream, bar_format=layout, dynamic_ncols=True
            )

    def advance(self, steps: int = 1, *, tokens: int = 0, shown: Mapping[str, float] | None = None) -> None:
        """`steps` more are done; they went through `tokens` tokens. shown: metrics to print beside the rates."""
        self._done += steps
        self._tokens += tokens
        self._shown |= shown or {}
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(steps)
        elif self._mode == "plain":
            first = self._done - steps == self._initial
            last = self._done >= self._total
            if first or last or self._clock() - self._printed >= SECONDS_BETWEEN_LINES:
                self._printed = self._clock()
                line = f"{self._stage}: step {self._done}/{self._total}, {self._figures()}"
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _figures(self) -> str:
        seconds = max(self._clock() - self._start, 1e-9)
        steps = (self._done - self._initial) / seconds
        rates = [f"{steps:.2f} steps/s" if steps >= 1 or steps == 0 else f"{1 / steps:.1f} s/step"]
        if self._tokens:
            rates.append(f"{_short(self._tokens / seconds)} tokens/s")
        return ", ".join(rates + [f"{name} {value:.4g}" for name, value in self._shown.items()])


def _mode(stream: TextIO) -> Literal["bar", "plain", "off"]:
    wish = os.environ.get("DIPTYCH_PROGRESS", "")
    if wish == "off" or wish == "plain":
        return wish
    if wish:
        raise UserError(f"DIPTYCH_PROGRESS={wish!r}: expected off or plain, or leave it unset")
    return "bar" if stream.isatty() else "plain"


def _short(value: float) -> str:
    """1234 as 1.2k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
