"""Contestants, each a process of its own, and a contest: one iteration each by turns (A B A B), the rest asleep.

By turns, so that whatever else the machine does falls on all alike; in processes of their own, so that memory, threads
and compilers are their own too. A contestant talks in lines (`MARK` and JSON) on its standard output and waits for a
line on its standard input before every iteration.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from diptych.errors import UserError

MARK = "@diptych-bench "
PHASES = (
    "data", "switch", "prefill", "decode", "score/policy", "score/reference", "score/critic", "score/reward",
    "update/policy", "update/critic", "other",
)  # fmt: skip
"""What an iteration is made of, in order. A peer may name coarser ones: "rollout", "score", "update"."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "rollout": ("switch", "prefill", "decode", "rollout"),
    "score": ("score",),
    "update": ("update",),
}


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """seconds: wall clock. phases: seconds by name, which add up to it. tokens: generated."""

    seconds: float
    cpu_seconds: float
    phases: Mapping[str, float]
    tokens: int

    def group(self, name: str) -> float:
        """Seconds of "rollout" (the switch with it), "score" or "update", however finely they were told."""
        parts = GROUPS[name]
        return sum(value for phase, value in self.phases.items() if phase in parts or phase.split("/")[0] in parts)


@dataclass
class Measured:
    """What is known of a contestant after a contest. kind: an engine of ours, or a peer. setup: seconds until it could
    begin its first iteration (imports, weights). first: seconds of the first, compilation included; first_warm: of
    another process that found the compiled programs on disk (None: nothing is compiled, or nobody looked). warm_up:
    iterations after it that are not counted. peak_bytes: of its process (`device_peak_bytes`: of its accelerator).
    compilations: programs made; None where nothing is compiled. compilations_late: those after the warm-up. about:
    versions, parameters and whatever else it says of itself. ceilings: FLOP/s and bytes/s measured in it."""

    name: str
    kind: Literal["engine", "peer"]
    setup: float = 0.0
    first: float = 0.0
    first_warm: float | None = None
    warm_up: list[float] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)
    peak_bytes: int = 0
    device_peak_bytes: int | None = None
    compilations: int | None = None
    compilations_late: int = 0
    ceilings: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class Contestant:
    """A process that does an iteration when asked. name: as shown. command: starts it, at the first word that is said
    to it: describing a contestant costs nothing. log: where its own words go.
    beside: environments of further processes of the same command that it works with; only the first is talked to."""

    def __init__(
        self,
        name: str,
        kind: Literal["engine", "peer"],
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cores: Sequence[int],
        log: Path,
        patience: float = 1800.0,
        beside: Sequence[Mapping[str, str]] = (),
    ):
        self.measured = Measured(name=name, kind=kind)
        self.log = log
        self._command, self._environments, self._cores = list(command), [environment, *beside], cores
        self._patience = patience
        self._rest = b""
        self._errors: BinaryIO | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._beside: list[subprocess.Popen[bytes]] = []

    def _start(self) -> None:
        """Begin all processes."""
        first, *others = (os.environ | dict(one) for one in self._environments)
        self._errors = errors = self.log.open("wb")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=first
        )
        self._beside = [
            subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=other)
            for other in others
        ]
        for one in (self._process, *self._beside):
            pin(one.pid, self._cores)

    def ask(self, word: str, **more: Any) -> dict[str, Any]:
        """Say a word (JSON) and wait for the answer: the next marked line. The first word starts the process. UserError
        where it ends or falls silent before it answers."""
        if self._process is None:
            self._start()
        process, errors = self._process, self._errors
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert errors is not None
        with contextlib.suppress(BrokenPipeError):  # what is read below says why
            process.stdin.write(json.dumps({"do": word, **more}).encode() + b"\n")
            process.stdin.flush()
        stream = process.stdout.fileno()
        until = time.monotonic() + self._patience
        while True:
            while b"\n" in self._rest:
                line, self._rest = self._rest.split(b"\n", 1)
                if line.startswith(MARK.encode()):
                    return json.loads(line[len(MARK) :])
                errors.write(line + b"\n")
                errors.flush()
            if not select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
                self.stop()
                raise UserError(f"{self.measured.name}: no answer in {self._patience:.0f} s: see {self.log}")
            read = os.read(stream, 1 << 16)
            if not read:
                code, lines = process.wait(), self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                last_words = "\n".join(f"  {line}" for line in lines[-8:])
                raise UserError(f"{self.measured.name} ended with exit code {code}: see {self.log}\n{last_words}")
            self._rest += read

    def stop(self) -> None:
        """End the process, kindly if it listens; nothing where none was started, or it has been stopped."""
        process, errors = self._process, self._errors
        if process is None or errors is None or errors.closed:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        for other in self._beside:  # they end with the first, or not at all
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(timeout=5)
            other.kill()
            other.wait()
        errors.close()


def pin(process: int, cores: Sequence[int]) -> None:
    """Keep a process that has just been started on these cores, where the system can; empty: wherever it likes."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cores)


@contextlib.contextmanager
def contest(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Ends all processes, whatever happens inside."""
    try:
        yield
    finally:
        for one in contestants:
            one.stop()


def race(contestants: Sequence[Contestant], *, rounds: int, warm_up: int, told: Any = None) -> list[Measured]:
    """Set up all contestants one after another, let each warm up, then `rounds` iterations each by turns.

    told: called with (name, what, seconds) after every step, for a progress display.
    """

    def tell(one: Contestant, what: str, seconds: float) -> None:
        if told is not None:
            told(one.measured.name, what, seconds)

    for one in contestants:
        found = one.measured
        began = time.perf_counter()
        ready = one.ask("start")
        found.setup = time.perf_counter() - began
        found.about |= ready
        tell(one, "setup", found.setup)
        for count in range(1 + warm_up):
            iteration = _iteration(one.ask("iterate"))
            if count == 0:
                found.first = iteration.seconds
            else:
                found.warm_up.append(iteration.seconds)
            tell(one, "first" if count == 0 else "warm-up", iteration.seconds)
    for _ in range(rounds):
        for one in contestants:
            answer = one.ask("iterate")
            one.measured.iterations.append(_iteration(answer))
            one.measured.compilations_late += int(answer.get("compilations") or 0)
            tell(one, "iteration", one.measured.iterations[-1].seconds)
    for one in contestants:
        last = one.ask("finish")
        found = one.measured
        found.peak_bytes = last.pop("peak_bytes")
        found.device_peak_bytes = last.pop("device_peak_bytes", None)
        found.compilations = last.pop("compilations", None)
        found.ceilings = last.pop("ceilings", {})
        prefill = last.pop("prefill", None)
        if prefill is not None:
            found.iterations = [split_rollout(iteration, prefill) for iteration in found.iterations]
        found.about |= last
        tell(one, "finish", 0.0)
    return [one.measured for one in contestants]


def split_rollout(iteration: Iteration, prefill: float) -> Iteration:
    """A rollout whose prompts take `prefill` seconds (measured on its own) as "prefill" and "decode"."""
    phases = dict(iteration.phases)
    rollout = phases.pop("rollout")
    phases["prefill"] = min(prefill, rollout)
    phases["decode"] = rollout - phases["prefill"]
    return replace(iteration, phases={name: phases[name] for name in PHASES if name in phases})


def _iteration(answer: Mapping[str, Any]) -> Iteration:
    return Iteration(
        seconds=answer["seconds"], cpu_seconds=answer["cpu_seconds"], phases=answer["phases"], tokens=answer["tokens"]
    )


def engine(
    name: str,
    folder: Path,
    *,
    threads: int,
    cores: Sequence[int],
    log: Path,
    cache: Path | None = None,
    processes: int = 1,
) -> Contestant:
    """One of our engines (`worker.py`) on the work in `folder` (`work.write_work`).

    cache: where compiled programs are kept; None: as the environment says. processes: that do it together, each with
    its own threads.
    """
    command = [sys.executable, "-m", "diptych.bench.worker", name, str(folder), str(folder / f"run-{log.stem}")]
    environment = thread_environment(threads)
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": str(cache)}
    if processes == 1:
        return Contestant(name, "engine", command, environment=environment, cores=cores, log=log)
    first, *others = (
        environment | together(rank, processes, port) for port in [free_port()] for rank in range(processes)
    )
    command.append("distributed")
    return Contestant(name, "engine", command, environment=first, cores=cores, log=log, beside=others)


def together(rank: int, count: int, port: int) -> dict[str, str]:
    """What tells both frameworks that a process is one of several on this host."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def cores_of(threads: int) -> list[int]:
    """The first cores that this process may use, as many as there are threads; empty: all of them, unpinned."""
    if threads == 0 or not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise UserError(f"--threads {threads}: this machine lends {len(allowed)} cores")
    return allowed[:threads]


def file_name(text: str) -> str:
    """What a workload's files are called."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text).strip("_")


def thread_environment(threads: int) -> dict[str, str]:
    """How many threads a framework takes, said in the ways that they listen to; 0: nothing is said. (XLA counts the
    cores that the process may use.)"""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(threads) for name in names} if threads else {}
