"""Reports of a contest on made-up figures: one screen, Markdown beside targets, a page that needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from diptych.bench.contest import Iteration, Measured
from diptych.bench.flops import decode_bytes, phase_flops
from diptych.bench.intensity import limits, phase_bytes
from diptych.bench.markdown import TARGETS, benchmarks_md, judged
from diptych.bench.page import bench_page
from diptych.bench.results import Result
from diptych.bench.terminal import describe, figure_rows, pairs, spread
from diptych.bench.workloads import WORKLOADS, workload

ENGINE = {
    "data": 0.002, "switch": 0.001, "prefill": 0.003, "decode": 0.014, "score/reference": 0.01, "score/critic": 0.01,
    "score/reward": 0.01, "update/policy": 0.03, "update/critic": 0.015, "other": 0.005,
}  # fmt: skip
TRL = {"rollout": 0.06, "score": 0.11, "update": 0.2, "other": 0.03}
TUNIX = {
    "rollout": 0.03, "score/policy": 0.01, "score/reference": 0.01, "score/critic": 0.01, "update/policy": 0.03,
    "update/critic": 0.03, "other": 0.03,
}  # fmt: skip
MACHINE = {
    "diptych": "0.1.0", "python": "3.11.7", "platform": "Linux-6.1-secret", "machine": "x86_64", "processors": 2,
    "memory_gib": 15.6, "packages": {"jax": "0.10.2", "torch": "2.13.0"},
}  # fmt: skip
CEILINGS = {"flops": 2e11, "copy_bytes": 1e10}


def side(name, kind, phases, *, times=(1.0, 0.9, 1.2), **more) -> Measured:
    """Iterations of the same phases, each `times` as long."""
    iterations = [
        Iteration(
            seconds=sum(phases.values()) * factor,
            cpu_seconds=sum(phases.values()) * factor,
            phases={phase: seconds * factor for phase, seconds in phases.items()},
            tokens=512,
        )
        for factor in times
    ]
    return Measured(name=name, kind=kind, iterations=iterations, **more)


def slower(phases, factor: float) -> dict[str, float]:
    return {phase: seconds * factor for phase, seconds in phases.items()}


def made(name: str = "tiny", **more) -> Result:
    """jax: 0.1 s, torch: 0.2 s, TRL 0.4 s, Tunix 0.15 s."""
    sides = [
        side("jax", "engine", ENGINE, setup=3.0, first=8.0, first_warm=2.5, peak_bytes=2**30, compilations=12,
             ceilings=dict(CEILINGS)),
        side("torch", "engine", slower(ENGINE, 2), setup=4.0, first=0.5, peak_bytes=2**29,
             ceilings={"flops": 1e11, "copy_bytes": 9e9}),
        side("trl-ppo", "peer", TRL, first=0.9, peak_bytes=3 * 2**29,
             about={"environment": {"trl": "1.12.0"}, "differs": ["one optimizer for both"]}),
        side("tunix-ppo", "peer", TUNIX, first=20.0),
    ]  # fmt: skip
    told: dict[str, Any] = {"threads": 1, "contestants": sides, "machine": MACHINE, "date": "2026-01-02 03:04"}
    return Result(workload=WORKLOADS[name], **{**told, "command": "diptych bench tiny", **more})


def row(text: str, label: str) -> list[str]:
    """The cells of the first line that begins with a label."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip()[len(label) :].split()


# The screen


def test_one_screen():
    text = describe(made())
    lines = text.splitlines()
    assert lines[0] == "tiny: llama, 2 layers, d 128, vocabulary 512, 16 rows of 32+32 tokens, float32"
    assert lines[1] == "1 thread, 3 iterations by turns; reached on this machine: 200 GFLOP/s, copying 10.0 GB/s"
    assert lines[3].split() == ["seconds", "jax", "torch", "trl-ppo", "tunix-ppo"]
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert "jax is 4.00 (4.00..4.00) x as fast as trl-ppo" in text
    assert "jax is 2.00 (2.00..2.00) x as fast as torch" in text
    assert "trl-ppo differs: one optimizer for both" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("label", "cells"),
    [
        ("iteration", ["0.1000", "0.2000", "0.4000", "0.1500"]),
        ("least to most", ["0.0900-0.1200", "0.1800-0.2400", "0.3600-0.4800", "0.1350-0.1800"]),
        ("rollout", ["0.0180", "0.0360", "0.0600", "0.0300"]),
        ("prefill", ["0.0030", "0.0060", "-", "-"]),
        ("decode", ["0.0140", "0.0280", "-", "-"]),
        ("switch", ["0.0010", "0.0020", "-", "-"]),
        ("score", ["0.0300", "0.0600", "0.1100", "0.0300"]),
        ("reward", ["0.0100", "0.0200", "-", "-"]),
        ("update", ["0.0450", "0.0900", "0.2000", "0.0600"]),
        ("data", ["0.0020", "0.0040", "-", "-"]),
        ("sequences/s", ["160.00", "80.00", "40.00", "106.67"]),
        ("tokens/s generated", ["28,444", "14,222", "8,533", "17,067"]),
        ("tokens/s trained", ["10,240", "5,120", "2,560", "6,827"]),
        ("first iteration, s", ["8.00", "0.50", "0.90", "20.00"]),
        ("with a warm cache", ["2.50", "-", "-", "-"]),
        ("peak memory, GiB", ["1.00", "0.50", "1.50", "-"]),
        ("programs compiled", ["12", "-", "-", "-"]),
    ],
)
def test_rows_of_the_screen(label, cells):
    """A dash is what a contestant does not tell; peers tell coarser phases."""
    assert row(describe(made()), label) == cells


def test_shares_of_the_machine():
    rows = {label.strip(): cells for label, cells in figure_rows(made())}
    flops = phase_flops(WORKLOADS["tiny"])
    assert rows["MFU, iteration"][0] == f"{100 * sum(flops.values()) / 0.1 / 2e11:.1f} %"
    moved = decode_bytes(WORKLOADS["tiny"]) / 0.014 / 1e10
    assert rows["decode, of a copy's speed"] == [f"{100 * moved:.1f} %", f"{50 * moved:.1f} %", "-", "-"]


def test_what_nobody_tells_has_no_row():
    result = made()
    assert not any("accelerator" in label for label, _ in figure_rows(result))
    result.contestants[0].device_peak_bytes = 2**31
    assert ("  of the accelerator", ["2.00", "-", "-", "-"]) in figure_rows(result)
    for one in result.contestants:
        one.ceilings.clear()
    assert not any("MFU" in label or "copy" in label for label, _ in figure_rows(result))
    assert "reached on this machine: not measured" in describe(result)


def test_late_compilations_are_told():
    result = made()
    result.contestants[0].compilations_late = 2
    told = "jax compiled 2 programs in iterations that count"
    assert f"warning: {told}" in describe(result)
    assert told in bench_page([result])
    assert told in benchmarks_md([result])


def test_who_is_held_against_whom():
    result = made()
    assert pairs(result) == [
        ("jax", "trl-ppo"), ("torch", "trl-ppo"), ("jax", "tunix-ppo"), ("torch", "tunix-ppo"), ("jax", "torch"),
    ]  # fmt: skip
    assert pairs(replace(result, contestants=result.contestants[2:])) == []
    assert "as fast as" not in describe(replace(result, contestants=result.contestants[2:]))


def test_the_range_of_a_ratio_is_by_rounds():
    """A round in which the machine was slow for both is no slower a ratio."""
    one, other = side("jax", "engine", ENGINE, times=(1, 2, 1)), side("torch", "engine", ENGINE, times=(2, 4, 3))
    assert spread(made(contestants=[one, other]), "jax", "torch") == pytest.approx((2, 3))


def test_busy_machines_say_so():
    assert "2 threads, beside 1 process that never rests" in describe(made(threads=2, busy=1))
    assert "## 1 thread, beside 2 processes that never rest" in benchmarks_md([made(busy=2)])


# Bytes and limits


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_phase_with_flops_has_bytes(name):
    found = phase_bytes(WORKLOADS[name])
    assert found.keys() == phase_flops(WORKLOADS[name]).keys()
    assert min(found.values()) > 0


def test_bytes_by_hand():
    """A tiny Llama: weights by hand, 4 rows of 2+2 tokens in two passes."""
    work = replace(
        WORKLOADS["tiny"], layers=1, width=8, heads=2, ffn=16, vocabulary=32, batch=4, micro_batch=2, prompt=2, answer=2
    )
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
    between = 2 * (3 * 8 + 8 + 2 * 16 + 2 * 8)  # q, k, v, attention; gate, up; two outputs of width: written and read
    policy = 2 * (layer + 8 + 8 * 32) + 16 * between
    scalar = 2 * (layer + 8 + 8) + 16 * between
    found = phase_bytes(work)
    assert found["score/reference"] == 4 * policy
    assert found["score/critic"] == 4 * scalar
    assert found["update/critic"] == 3 * 4 * scalar + 7 * 4 * (layer + 8 + 8 + 32 * 8)
    cache = 2 * 4 * 2 * 8
    assert found["prefill"] == 4 * (layer + 8 + 8 * 32 + cache + 8 * between)


def test_limits():
    """Decoding is limited by memory, products by compute; nothing without ceilings."""
    found = limits(WORKLOADS["opt-125m"], CEILINGS)
    assert {name: one.by for name, one in found.items() if name in ("prefill", "decode", "score", "update")} == {
        "prefill": "compute", "decode": "memory", "score": "compute", "update": "compute",
    }  # fmt: skip
    flops, moved = phase_flops(WORKLOADS["opt-125m"]), phase_bytes(WORKLOADS["opt-125m"])
    assert found["decode"].seconds == pytest.approx(moved["decode"] / 1e10)
    assert found["prefill"].seconds == pytest.approx(flops["prefill"] / 2e11)
    assert found["rollout"].seconds == pytest.approx(found["prefill"].seconds + found["decode"].seconds)
    assert found["iteration"].flops == pytest.approx(sum(flops.values()))
    assert limits(WORKLOADS["tiny"], {"flops": 1e11}) == {}


# Markdown


def test_targets_are_judged():
    assert judged(1.99, 2) == "1.99 (2: **missed**)"
    assert judged(2.0, 2, "JAX") == "JAX 2.00 (2: met)"
    assert judged(7.0, None) == "7.00"
    assert list(TARGETS) == ["tiny", "small", "medium", "opt-125m"]


def test_markdown_tables():
    text = benchmarks_md([made(), made("medium")])
    for line in (
        "| workload | TRL | Tunix | JAX | torch |",
        "| tiny | 0.4000 (0.0600) | 0.1500 (0.0300) | 0.1000 (0.0180) | 0.2000 (0.0360) |",
        "| tiny | JAX 4.00 (5: **missed**) | torch 2.00 (3: **missed**) | "
        "JAX 3.33 (3: met); torch 1.67 (3: **missed**) | 1.50 (2: **missed**) | 1.67 (1.5: met) | 2.00 |",
        "| medium | JAX 4.00 (1.7: met) | torch 2.00 (1.4: met) | "
        "JAX 3.33 (2.5: met); torch 1.67 (2.5: **missed**) | 1.50 (2: **missed**) | 1.67 (2: **missed**) | 2.00 |",
        "| tiny | 1.50 | - | 1.00 | 0.50 |",  # memory
        "| tiny | 0.90 | 20.00 | 8.00 (2.50) | 0.50 |",  # first iterations
        "- trl-ppo differs: one optimizer for both",
    ):
        assert line in text.splitlines(), line
    assert "(2026-01-02) on 2 processors, 15.6 GiB, Linux x86_64. Diptych 0.1.0, Python 3.11.7, jax 0.10.2" in text
    assert "TRL's trl 1.12.0" in text
    assert "secret" not in text + bench_page([made()])  # the kernel of somebody's machine
    assert text.count("```\ndiptych bench tiny\n```") == 1
    assert "How cost grows" not in text
    assert benchmarks_md([made()], scaling="linear").endswith("## How cost grows\n\nlinear\n")


def test_the_faster_engine_need_not_be_jax():
    result = made()
    jax, torch, *peers = result.contestants
    jax.name, torch.name = "torch", "jax"
    text = benchmarks_md([replace(result, contestants=[jax, torch, *peers])])
    assert "| tiny | torch 4.00 (5: **missed**) | JAX 2.00 (3: **missed**) |" in text
    assert "| 0.75 (2: **missed**) |" in text  # JAX against Tunix


def test_phases_beside_their_limits():
    text = benchmarks_md([made()])
    best = limits(WORKLOADS["tiny"], CEILINGS)
    mfu = best["update"].flops / 2e11 / 0.045
    times = 0.045 / best["update"].seconds
    wanted = (
        f"| **update** | {best['update'].seconds:.4f} (compute) | 0.2000 | 0.0600 | 0.0450 ({mfu:.0%}, x {times:.2f}) |"
    )
    assert wanted in text
    assert re.search(r"\| prefill \| [\d.]+ \(\w+\) \| - \| - \| 0\.0030 \(", text)
    assert re.search(r"\| \*\*rollout\*\* \| [\d.]+ \(\w+\) \| 0\.0600 \| 0\.0300 \| 0\.0180 \(x ", text)
    assert "| score/policy | - | - | 0.0100 | - | - |" in text


def test_only_the_stated_work_has_targets():
    changed = replace(made(), workload=workload("tiny", ["batch=32"]))
    for result in (changed, made("rnn"), made(busy=1)):
        text = benchmarks_md([result])
        assert "missed" not in text
        assert "| JAX 4.00 | torch 2.00 | JAX 3.33; torch 1.67 | 1.50 | 1.67 | 2.00 |" in text


def test_results_of_several_numbers_of_threads():
    text = benchmarks_md([made(), made(threads=2)])
    assert text.index("## 1 thread") < text.index("## 2 threads")
    assert "| tiny, 2 threads | 1.50 | - | 1.00 | 0.50 |" in text


def test_a_contestant_that_was_not_there():
    """An engine alone; and a peer at one of two workloads only."""
    alone = made(contestants=made().contestants[:1])
    text = benchmarks_md([alone])
    assert "How many times as fast" not in text
    assert "| tiny | 0.1000 (0.0180) |" in text
    assert "jax" in describe(alone)
    assert "<svg" in bench_page([alone])
    assert "| rnn | - | - | 0.1000 (0.0180) | - |" in benchmarks_md([made(), replace(alone, workload=WORKLOADS["rnn"])])


# The page


class Seen(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def hostile() -> Result:
    """Words from outside that are HTML, Markdown and more."""
    result = made(command="diptych bench '<script>alert(1)</script>'", machine=MACHINE | {"machine": "<b>|x"})
    bad = side("<img src=x>", "peer", TRL, first=1.0, about={"differs": ["<i>a|b"], "environment": {"<u>": "<s>"}})
    return replace(
        result,
        workload=replace(result.workload, name='<a href="x">|'),
        contestants=[*result.contestants, bad],
    )


@pytest.mark.parametrize("result", [made(), hostile()], ids=["plain", "hostile"])
def test_the_page_is_self_contained_and_escaped(result):
    text = bench_page([result, made("opt-125m", threads=2)])
    seen = Seen(text)
    assert not seen.tags & {"script", "img", "a", "u", "s", "link", "object", "iframe"}
    assert not {name for name in seen.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")}
    assert "<i>" not in text
    assert "url(" not in text
    assert "http:" not in text
    assert "https:" not in text
    for part in ("Roofline", "Seconds of an iteration, by phase", "x as fast as", "opt-125m, 2 threads", "200 GFLOP/s"):
        assert part in text, part


def test_markdown_of_hostile_names():
    text = benchmarks_md([hostile()])
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<" not in outside
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_bars_add_up():
    """Each contestant's bar is as long as its iteration, coarse phases or fine."""
    figure = bench_page([made()]).split("<figure")[1]
    lengths = []
    for drawn in figure.split('text-anchor="end">')[1:]:
        parts = [(float(x), float(width)) for x, width in re.findall(r'x="([\d.]+)" y="\d+" width="([\d.]+)"', drawn)]
        for (x, width), (following, _) in pairwise(parts):
            assert following == pytest.approx(x + width, abs=0.02)
        lengths.append(sum(width for _, width in parts))
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 2, 4, 1.5], rel=1e-3)


def test_the_roofline_has_a_point_for_each_engines_phases():
    text = bench_page([made()])
    points = re.findall(r"<g><title>(.*?)</title>", text)
    assert len(points) == 2 * 4
    asked = limits(WORKLOADS["tiny"], CEILINGS)["decode"]
    roof = min(2e11, asked.intensity * 1e10)
    reached = asked.flops / 0.014
    wanted = (
        f"jax, decode: {reached / 1e9:.4g} GFLOP/s at {asked.intensity:.3g} FLOP/byte, {reached / roof:.0%} of the roof"
    )
    assert wanted in points
    result = made()
    for one in result.contestants:
        one.ceilings.clear()
    assert "Roofline" not in bench_page([result])


def test_scaling_has_a_place():
    assert "<h2>How cost grows</h2><p>linear</p>" in bench_page([made()], scaling="<p>linear</p>")
    assert "How cost grows" not in bench_page([made()])


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_renders_the_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(bench_page([made(), hostile()]), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    command = [str(CHROMIUM), *quiet, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr  # no script error, nothing refused by the page's own policy
    assert done.stdout.count("<svg") == 4
    assert "Made by diptych bench" in done.stdout
