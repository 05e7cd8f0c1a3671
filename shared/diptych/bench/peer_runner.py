"""Another trainer's benchmark script as a contestant (`contest.py`): unchanged, an iteration whenever it is asked for.

    PEER'S PYTHON peer_runner.py '{"script": "trl_ppo.py", "arguments": ["--layers", "2"], ...}'

It runs in the peer's own environment, so it imports nothing but the standard library. The script prints a line at the
end of each iteration and times itself by `time.perf_counter` and `time.process_time`. Here it gets a `print` that waits
after such a line until the next iteration is wanted, and clocks that stand still meanwhile. What is reported are the
script's own figures.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import resource
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NoReturn

MARK = "@diptych-bench "  # contest.MARK


class Clock:
    """A clock that can be stopped: what passes meanwhile has not been."""

    def __init__(self, read: Callable[[], float]):
        self._read = read
        self._away = 0.0
        self._stopped: float | None = None

    def __call__(self) -> float:
        return self._read() - self._away if self._stopped is None else self._stopped

    def stop(self) -> None:
        self._stopped = self()

    def go_on(self) -> None:
        assert self._stopped is not None
        self._away, self._stopped = self._read() - self._stopped, None


class Line:
    """The protocol's two ends, taken from the script: what it prints goes to the log, and it has nothing to read."""

    def __init__(self) -> None:
        self._asked = os.fdopen(os.dup(0), encoding="utf-8")
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)

    def hear(self) -> str | None:
        """The next word; None at the end."""
        line = self._asked.readline()
        return json.loads(line)["do"] if line else None

    def answer(self, what: Mapping[str, Any]) -> None:
        print_really(MARK + json.dumps(what), file=self._answers, flush=True)


print_really = builtins.print


class Runner:
    """about: what the peer says of itself, completed by what its script tells (`parameters`)."""

    def __init__(self, line: Line, about: dict[str, Any], folder: str):
        self.line, self.about, self._folder = line, about, folder
        self.perf_counter, self.process_time = Clock(time.perf_counter), Clock(time.process_time)
        self.begun = False  # its first iteration
        self.rows: list[Mapping[str, Any]] = []

    def begin(self) -> None:
        """The script is about to begin its first iteration."""
        self.begun = True
        self._wait(self.about)

    def done(self, iteration: Mapping[str, Any]) -> None:
        """The script has ended an iteration."""
        self._wait(iteration)

    def _wait(self, answer: Mapping[str, Any]) -> None:
        """Answer, and return when an iteration is wanted. No time passes for the script."""
        self.perf_counter.stop()
        self.process_time.stop()
        self.line.answer(answer)
        while (word := self.line.hear()) != "iterate":
            if word == "finish":
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                self.line.answer({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)})
            elif word is None:
                self.leave()
            else:
                sys.exit(f"a peer cannot {word}")
        self.process_time.go_on()
        self.perf_counter.go_on()

    def leave(self) -> NoReturn:
        """End in the middle of the script, without its goodbyes."""
        shutil.rmtree(self._folder, ignore_errors=True)
        sys.stderr.flush()
        os._exit(0)


def phases_from(row: Mapping[str, Any], names: Mapping[str, str], seconds: float) -> dict[str, float]:
    """A row's seconds under our names, and "other": the rest of the iteration."""
    phases = {ours: row[theirs] for theirs, ours in names.items() if theirs in row}
    phases["other"] = seconds - sum(phases.values())
    return phases


TRL = {"rollout_s": "rollout", "score_s": "score", "train_s": "update"}
TUNIX = {
    "rollout": "rollout",
    "old_logp": "score/policy",
    "ref_logp": "score/reference",
    "values": "score/critic",
    "actor": "update/policy",
    "critic": "update/critic",
}


Printed = Callable[[str, Mapping[str, Any]], None]  # a line that was printed, and the globals of who did


def watch_trl(runner: Runner) -> Printed:
    """TRL's scripts keep a `common.row` of every iteration, and say what they are before they train."""
    common: Any = importlib.import_module("common")
    row, param_count = common.row, common.param_count

    def kept_row(*args: Any, **more: Any) -> Any:
        runner.rows.append(row(*args, **more))
        return runner.rows[-1]

    def kept_count(model: Any) -> int:
        return runner.about.setdefault("parameters", param_count(model))

    common.row, common.param_count = kept_row, kept_count

    def printed(text: str, scope: Mapping[str, Any]) -> None:
        if text.startswith("trl "):
            runner.begin()
        elif text.startswith("iter "):
            last = runner.rows[-1]
            runner.done(
                {
                    "seconds": last["iter_s"],
                    "cpu_seconds": last["iter_cpu"],
                    "phases": phases_from(last, TRL, last["iter_s"]),
                    "tokens": last["gen_tokens"],
                }
            )

    return printed


def watch_tunix(runner: Runner) -> Printed:
    """Tunix's script keeps `rows`; the first time that it reads its CPU seconds is the beginning of an iteration."""
    clock = runner.process_time

    def process_time() -> float:
        scope = sys._getframe(1).f_globals
        if not runner.begun and scope["__name__"] == "__main__":
            runner.about["parameters"] = int(scope["n_params"])
            runner.begin()
        return clock()

    time.process_time = process_time

    def printed(text: str, scope: Mapping[str, Any]) -> None:
        if text.startswith("iter "):
            last = scope["rows"][-1]
            runner.done(
                {
                    "seconds": last["iteration"],
                    "cpu_seconds": last["cpu"],
                    "phases": phases_from(last, TUNIX, last["iteration"]),
                    "tokens": last["gen_tokens"],
                }
            )

    return printed


WATCH = {"trl": watch_trl, "tunix": watch_tunix}


def main() -> None:
    """asked: `script`, its `arguments`, `watch` (its habits), `packages` (whose versions are told), `about`."""
    asked = json.loads(sys.argv[1])
    line = Line()
    if (word := line.hear()) != "start":
        sys.exit(f"start is the first word, got {word}")
    # Models that a script writes go when it does.
    folder = tempfile.mkdtemp(prefix="diptych-peer-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    versions = {name: metadata.version(name) for name in asked["packages"]}
    runner = Runner(line, asked["about"] | {"environment": versions}, folder)
    time.perf_counter, time.process_time = runner.perf_counter, runner.process_time
    sys.path[0] = os.path.dirname(os.path.abspath(asked["script"]))  # as if Python ran the script itself
    sys.argv = [asked["script"], *asked["arguments"]]
    printed = WATCH[asked["watch"]](runner)

    def print_and_wait(*args: Any, **more: Any) -> None:
        print_really(*args, **more)
        if args:
            printed(str(args[0]), sys._getframe(1).f_globals)

    builtins.print = print_and_wait
    try:
        runpy.run_path(asked["script"], run_name="__main__")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit("the script has done all iterations that it was told to do")


if __name__ == "__main__":
    main()
