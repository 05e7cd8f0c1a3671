"""`diptych bench`: words from the command line, a contest for every workload, and what is written of it."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.bench.contest import Contestant, contest, cores_of, engine, file_name, pin, race
from diptych.bench.results import Result
from diptych.bench.work import write_work
from diptych.bench.workloads import CPU_SET, WORKLOADS, Workload, workload
from diptych.engine import ENGINES
from diptych.errors import UserError
from diptych.run.progress import Progress

if TYPE_CHECKING:
    from diptych.bench.scaling import Curve

_EPILOG = """\
examples:
  diptych bench                                 both engines on the CPU set: tiny, small, medium, opt-125m
  diptych bench small --threads 1 2             one thread each, then two
  diptych bench small batch=32 answer=128       the same shape, other work
  diptych bench tiny small --peers ../shared/peers --html bench.html
  diptych bench opt-1.3b llama-3.2-1b --threads 0     on a GPU: threads and cores as they are
  diptych bench small --profile out/profile     where the time goes, on one screen, and traces to look at
  diptych bench small --scaling batch answer layers   how cost grows: fitted exponents
  diptych bench --list                          the workloads

A workload is one PPO iteration on random weights and prompts: rollout, scores, updates of policy and critic. Each
contestant is a process of its own, pinned to as many cores as it has threads; they take turns, one iteration each
(A B A B), while the others sleep. Shown are medians: seconds by phase, tokens/s, first iteration with an empty
compilation cache and again with a full one, peak memory, model FLOPs over what a plain product reaches on this machine
(MFU: nothing counted twice), the bytes that decoding must read over a measured copy. Every iteration is kept as JSON.
"""


def add_bench_command(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="time both engines (and other trainers) on stated work, against the machine's limits",
        usage="diptych bench [WORKLOAD ...] [--engine ...] [--peers DIR] [--threads N ...] [--rounds N] [...] "
        "[key=value ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="names (--list); default: the CPU set")
    bench.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="default: both")
    bench.add_argument("--threads", nargs="+", type=int, default=[1], help="of each contestant; 0: as they are")
    bench.add_argument("--rounds", type=int, default=5, help="counted iterations of each contestant (default: 5)")
    bench.add_argument("--warm-up", type=int, default=1, help="further iterations that are not counted (default: 1)")
    bench.add_argument("--peers", type=Path, metavar="DIR", help="also other trainers: the folder of their scripts")
    bench.add_argument(
        "--peer", nargs="+", choices=["trl-ppo", "trl-grpo", "tunix-ppo"], default=["trl-ppo", "tunix-ppo"],
        help="which (default: trl-ppo tunix-ppo)",
    )  # fmt: skip
    bench.add_argument(
        "--environments", type=Path, default=Path(".peers"), help="where their virtual environments are (.peers)"
    )
    bench.add_argument("--busy", type=int, default=0, help="beside as many other processes that never rest")
    bench.add_argument("--output", type=Path, default=Path("out/bench"), help="JSON and logs (default: out/bench)")
    bench.add_argument("--html", type=Path, help="also write a self-contained page")
    bench.add_argument("--markdown", type=Path, help="also write the tables as Markdown")
    bench.add_argument(
        "--from", dest="given", nargs="+", type=Path, help="time nothing: these results (JSON, scaling-*.json too)"
    )
    bench.add_argument("--profile", type=Path, metavar="DIR", help="instead: trace one iteration of each engine")
    bench.add_argument(
        "--scaling", nargs="+", choices=["batch", "prompt", "answer", "layers", "width", "processes"],
        help="instead: the workload at half, once and twice each of these, and how cost grows",
    )  # fmt: skip
    bench.add_argument("--list", action="store_true", help="print the workloads")
    bench.set_defaults(command=bench_command)


def bench_command(options: argparse.Namespace) -> int:
    """`diptych bench`."""
    names = [word for word in options.workloads if "=" not in word]
    settings = [word for word in options.workloads if "=" in word] + options.overrides
    if options.list:
        for one in WORKLOADS.values():
            print(f"{one.name:<14}{one.describe()}")
        return 0
    if options.rounds < 1 or options.warm_up < 0 or min(options.threads) < 0 or options.busy < 0:
        raise UserError("--rounds must be 1 or more; --warm-up, --threads and --busy 0 or more")
    works = [workload(name, settings) for name in names or CPU_SET]
    if options.profile is not None:
        return _profile(options, works)
    if options.scaling:
        from diptych.bench.scaling import scaling_command

        return scaling_command(options, works)
    if options.given:
        from diptych.bench.scaling import read_curves

        grown = [path for path in options.given if path.name.startswith("scaling-")]
        results = [Result.load_json(path) for path in options.given if path not in grown]
        _write(options, results, [one for path in grown for one in read_curves(path)])
    else:
        _write(options, [_timed(options, one, threads) for threads in options.threads for one in works], ())
    return 0


def _timed(options: argparse.Namespace, work: Workload, threads: int) -> Result:
    """One workload's contest, told and kept."""
    from diptych.bench.peers import peer
    from diptych.bench.terminal import describe

    cores = cores_of(threads)
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    mark = f"{file_name(work.name)}-{threads or 'all'}t" + (f"-busy{options.busy}" if options.busy else "")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    scripts: Path | None = options.peers
    rivals = {} if scripts is None else dict.fromkeys(options.peer, scripts)
    with tempfile.TemporaryDirectory(prefix="diptych-bench-") as folder, busy(options.busy, cores):
        place, cache = Path(folder) / "work", Path(folder) / "cache"
        write_work(work, place)
        engines = [
            engine(name, place, threads=threads, cores=cores, cache=cache, log=logs / f"{mark}-{name}.log")
            for name in options.engine
        ]
        others = [
            peer(name, work, scripts=where, environments=options.environments, threads=threads, cores=cores,
                 log=logs / f"{mark}-{name}.log")
            for name, where in rivals.items()
        ]  # fmt: skip
        everyone = [*engines, *others]
        steps = len(everyone) * (options.warm_up + options.rounds + 3)
        with contest(everyone), Progress(steps, mark) as bar:
            found = race(
                everyone, rounds=options.rounds, warm_up=options.warm_up,
                told=lambda _name, _what, seconds: bar.advance(shown={"seconds": seconds}),
            )  # fmt: skip
        for one in found:
            if one.compilations:
                again = engine(
                    one.name, place, threads=threads, cores=cores, cache=cache, log=logs / f"{mark}-warm.log"
                )
                one.first_warm = first_iteration(again)
    result = Result(workload=work, threads=threads, contestants=found, busy=options.busy, command=_command(), load=load)
    result.save(options.output / f"{mark}.json")
    print(describe(result))
    print(f"wrote {options.output / f'{mark}.json'}\n", file=sys.stderr)
    return result


def first_iteration(one: Contestant) -> float:
    """Its seconds, of a contestant that does nothing else."""
    with contest([one]):
        one.ask("start")
        return float(one.ask("iterate")["seconds"])


@contextmanager
def busy(count: int, cores: Sequence[int]) -> Iterator[None]:
    """Inside, `count` other processes never rest, on the same cores."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    for one in running:
        pin(one.pid, cores)
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def _profile(options: argparse.Namespace, works: Sequence[Workload]) -> int:
    from diptych.bench.profile import profile_screen

    threads = options.threads[0]
    for work in works:
        with tempfile.TemporaryDirectory(prefix="diptych-bench-") as place:
            write_work(work, Path(place))
            for name in options.engine:
                folder = options.profile / f"{file_name(work.name)}-{name}"
                folder.mkdir(parents=True, exist_ok=True)
                log = folder / f"{name}.log"
                one = engine(name, Path(place), threads=threads, cores=cores_of(threads), log=log)
                with contest([one]):
                    one.ask("start")
                    for _ in range(1 + options.warm_up):
                        one.ask("iterate")
                    print(profile_screen(name, one.ask("profile", folder=str(folder.resolve())), work))
    return 0


def _write(options: argparse.Namespace, results: Sequence[Result], curves: Sequence[Curve]) -> None:
    """The page and the tables, where they are asked for; results that were read are shown."""
    from diptych.bench.markdown import benchmarks_md
    from diptych.bench.page import bench_page
    from diptych.bench.scaling import scaling_html, scaling_markdown
    from diptych.bench.terminal import describe

    if not results and (options.html or options.markdown):
        raise UserError("--from: a page needs the results of workloads too, not of --scaling alone")
    made = [
        (options.html, lambda: bench_page(results, scaling=scaling_html(curves) if curves else "")),
        (options.markdown, lambda: benchmarks_md(results, scaling=scaling_markdown(curves) if curves else "")),
    ]
    for path, text in made:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)
    if options.given:
        print("\n\n".join([*map(describe, results), *([scaling_markdown(curves)] if curves else [])]))


def _command() -> str:
    """As it was typed, without the folder of the interpreter."""
    return shlex.join(["diptych", *sys.argv[1:]])
