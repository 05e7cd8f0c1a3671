"""`diptych parity ...`: do two trainers compute the same thing, where do they part, and who is wrong.

Exit codes of every command here: 0 the same, 1 different, 2 could not compare (one line says what, where and what to
do).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diptych.engine import ENGINES

SAME, DIFFERENT = 0, 1  # 2 is a UserError

_EPILOG = """\
from "my two curves differ" to the cause (docs/parity.md has the whole tree):
  diptych parity doctor A B               settings, versions, data: what differs before any number does
  diptych parity record RECIPE --engine jax -o a
  diptych parity record RECIPE --engine torch --replay a -o b      (on another machine, if you like)
  diptych parity compare a b --truth --html report.html            the first red rung, and who is wrong
  diptych parity record RECIPE --engine jax --depth ops --steps 1 -o a
  diptych parity record RECIPE --engine torch --depth ops --steps 1 --replay a -o b
  diptych parity blame a b                which layer, which operation

  diptych parity run RECIPE --mode float64 --steps 300             is it the same algorithm?
  diptych parity selftest RECIPE                                   would these checks see a bug in my setup?

exit codes: 0 the same, 1 different, 2 could not compare
"""


_DOCTOR = """\
Exit code 1: something differs that can change a number, or one of the known traps is set; each is named with file and
line. What changes rounding alone (layout, micro-batches, kernels, versions, hardware) is a note: any two machines
differ in some of it. What only one side tells is said, never taken for equal.
"""

_CURVES = """\
example: diptych parity curves out/jax-seed{1..8} out/torch-seed{1..8} --html curves.html

All settings but the seed must be equal; where both sides have the same seeds they are paired. Exit code 2 also where
there are too few seeds to tell, and it says how many more would do.
"""


def add_parity_command(commands: argparse._SubParsersAction) -> None:
    """`diptych parity` and everything below it."""
    raw = argparse.RawDescriptionHelpFormatter
    parity = commands.add_parser(
        "parity", help="do two engines compute the same, where do they part, who is wrong", epilog=_EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    actions = parity.add_subparsers(required=True, metavar="COMMAND")

    doctor = actions.add_parser(
        "doctor", help="what differs between two setups before any number does", epilog=_DOCTOR, formatter_class=raw
    )  # fmt: skip
    doctor.add_argument("a", type=Path, help="a recipe, a run directory, a trace or a model directory")
    doctor.add_argument("b", type=Path, nargs="?", help="another (default: only look for traps in the first)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)

    record = actions.add_parser(
        "record",
        help="run a recipe on one engine and record what it computes",
        usage="diptych parity record RECIPE --engine {jax,torch} -o DIR [--replay TRACE] [--depth DEPTH] [--steps N] "
        "[--every N] [--stage STAGE] [key=value ...]\n"
        "       diptych parity record --replay TRACE_OF_ANOTHER_TRAINER --engine {jax,torch} -o DIR",
    )
    _add_recipe(record, nargs="?")
    record.add_argument("--engine", required=True, choices=list(ENGINES))
    record.add_argument("-o", "--output", type=Path, required=True, help="a new directory for the trace")
    record.add_argument("--replay", type=Path, metavar="TRACE", help="feed what this trace recorded at every rung")
    record.add_argument(
        "--depth",
        choices=["metrics", "tensors", "layers", "ops"],
        help="metrics: what the run logs; tensors (default): every rung of the ladder; layers, ops: also inside the "
        "models",
    )
    record.add_argument("--every", type=int, help="tensors of every Nth step (default: 10), metrics of all")
    record.set_defaults(command=_record)

    compare = actions.add_parser("compare", help="two traces, rung by rung: where they part and who is wrong")
    compare.add_argument("a", type=Path, help="a trace")
    compare.add_argument("b", type=Path, help="another")
    compare.add_argument(
        "--truth",
        nargs="?",
        const="oracle",
        metavar="TRACE",
        help="say who is wrong: by NumPy's float64 oracle, or by a trace recorded in float64",
    )
    compare.add_argument(
        "--tolerance", action="append", default=[], metavar="RUNG=LIMIT", help="another limit for a rung (repeatable)"
    )
    _add_reports(compare)
    compare.set_defaults(command=_compare)

    run = actions.add_parser(
        "run",
        help="both engines side by side from the same bits",
        usage="diptych parity run RECIPE [--mode {float64,lockstep,noise}] [--steps N] [--stage STAGE] [key=value ...]",
    )
    _add_recipe(run)
    run.add_argument(
        "--mode",
        choices=["float64", "lockstep", "noise"],
        default="float64",
        help="float64: both run free, every metric within 1e-8; lockstep: resynchronised before each step, in the "
        "recipe's precision; noise: each engine against itself, and the gap between them in units of that",
    )
    run.add_argument("-o", "--output", type=Path, help="keep runs and traces here (default: a temporary directory)")
    _add_reports(run)
    run.set_defaults(command=_run)

    blame = actions.add_parser("blame", help="which layer, which operation, forward and backward")
    blame.add_argument("a", type=Path, help="a trace of depth layers or ops")
    blame.add_argument("b", type=Path, help="a replay of it on the other side (record --replay A)")
    blame.add_argument("--truth", action="store_true", help="say who is wrong, by NumPy's float64 oracle")
    blame.add_argument("--html", type=Path, help="also write a self-contained page")
    blame.add_argument("--json", type=Path, help="also write everything as JSON")
    blame.set_defaults(command=_blame)

    curves = actions.add_parser(
        "curves",
        help="runs of several seeds a side: the same within noise, different, or too few seeds to tell",
        epilog=_CURVES,
        formatter_class=raw,
    )
    curves.add_argument("runs", type=Path, nargs="+", help="run directories or traces; a side is its producer")
    curves.add_argument("--metric", action="append", default=[], help="only these (default: the stages' main ones)")
    curves.add_argument("--margin", type=float, help="how far is the same, in deviations across seeds (default: 1)")
    curves.add_argument("--html", type=Path, help="also write a self-contained page with the bands")
    curves.add_argument("--json", type=Path, help="also write everything as JSON")
    curves.set_defaults(command=_curves)

    gate = actions.add_parser(
        "gate",
        help="does what generates compute what is trained, inside one engine",
        usage="diptych parity gate RECIPE --engine {jax,torch} [key=value ...]",
    )
    gate.add_argument("recipe", type=Path)
    gate.add_argument("--engine", required=True, choices=list(ENGINES))
    gate.set_defaults(command=_gate)

    selftest = actions.add_parser(
        "selftest",
        help="plant bugs in one side of your own setup and see which checks see them",
        usage="diptych parity selftest RECIPE [--engine {jax,torch}] [--bug NAME] [--clean N] [key=value ...]",
    )
    selftest.add_argument("recipe", type=Path)
    selftest.add_argument("--engine", choices=list(ENGINES), help="the side that gets the bugs (default: torch)")
    selftest.add_argument("--bug", action="append", default=[], help="only these (repeatable)")
    selftest.add_argument(
        "--clean", type=int, default=3, help="runs without a bug, each with another seed (default: 3)"
    )
    selftest.add_argument("--markdown", type=Path, help="also write the detection matrix here")
    selftest.add_argument("--json", type=Path, help="also write everything as JSON")
    selftest.set_defaults(command=_selftest)

    repro = actions.add_parser("repro", help="the smallest failing case as an .npz and a short script for each side")
    repro.add_argument("a", type=Path, help="a trace")
    repro.add_argument("b", type=Path, help="another")
    repro.add_argument("-o", "--output", type=Path, required=True, help="a new directory")
    repro.set_defaults(command=_repro)


def _add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("recipe", type=Path, nargs=nargs, help="a YAML recipe")
    parser.add_argument(
        "--stage", choices=["sft", "reward", "rl"], action="append", help="only this stage (repeatable)"
    )
    parser.add_argument("--steps", type=int, help="steps of each stage (rl: iterations; default: the recipe's)")


def _add_reports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, help="also write a self-contained page")
    parser.add_argument("--json", type=Path, help="also write everything as JSON")
    parser.add_argument("--junit", type=Path, help="also write JUnit XML, a test case for each rung and step")


def _doctor(options: argparse.Namespace) -> int:
    from diptych.parity.doctor.doctor import command

    return command(options)


def _record(options: argparse.Namespace) -> int:
    from diptych.parity.record import command

    return command(options)


def _compare(options: argparse.Namespace) -> int:
    from diptych.parity.comparison.ladder import command

    return command(options)


def _run(options: argparse.Namespace) -> int:
    from diptych.parity.side_by_side import command

    return command(options)


def _blame(options: argparse.Namespace) -> int:
    from diptych.parity.blame.blame import command

    return command(options)


def _curves(options: argparse.Namespace) -> int:
    from diptych.parity.curves.curves import command

    return command(options)


def _gate(options: argparse.Namespace) -> int:
    from diptych.parity.gates import command

    return command(options)


def _selftest(options: argparse.Namespace) -> int:
    from diptych.parity.selftest.selftest import command

    return command(options)


def _repro(options: argparse.Namespace) -> int:
    from diptych.parity.comparison.repro import command

    return command(options)


SETTINGS = (_record, _run, _gate, _selftest)  # commands that take key=value settings
