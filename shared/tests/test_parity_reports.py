"""The reports of a comparison: one screen, JSON, JUnit XML, a page that renders in a browser without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from diptych.cli import main
from diptych.errors import UserError
from diptych.parity.comparison.expanded import explain
from diptych.parity.comparison.junit import as_json, as_junit
from diptych.parity.comparison.ladder import compare_traces
from diptych.parity.comparison.page_colors import level
from diptych.parity.comparison.page_ladder import ladder_page
from diptych.parity.comparison.terminal import format_comparison, print_comparison
from diptych.parity.steps import LADDER
from diptych.parity.trace import Trace
from shared.tests.parity_steps import change, elsewhere, healthy, put, trace, without

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def sides(tmp_path) -> dict[str, Trace]:
    """a; good: a healthy replay of it; bad: with seeded differences in steps 1 and 2."""
    a = trace(tmp_path / "a", [healthy(i) for i in range(3)], name="jax", seed=1)
    good = trace(tmp_path / "good", [elsewhere(healthy(i)) for i in range(3)], name="torch", replay=a, seed=1)
    steps = [elsewhere(healthy(i)) for i in range(3)]
    steps[1] = put(put(steps[1], "logprobs", (1, 2), -5), "response/tokens", (2, 0), 44)
    steps[1] = put(steps[1], "response/margins", (2, 0), 1e-7)
    steps[2] = put(without(steps[2], "kl"), f"policy/gradient/{Q}", (1, 1), math.nan)
    bad = trace(tmp_path / "bad", steps, name="<torch & co>", replay=a, seed=2)
    return {"a": a, "good": good, "bad": bad}


def screen(sides, other: str, **options) -> str:
    found = compare_traces(sides["a"], sides[other])
    return format_comparison(found, explain(found, sides["a"], sides[other], **options))


def test_one_screen_of_a_healthy_pair(sides):
    text = screen(sides, "good")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert sum(line.startswith("green") for line in lines) == len(LADDER)
    assert lines[-1] == "the same"
    assert "jax" in lines[0]
    assert "torch" in lines[1]
    assert "first red rung" not in text


def test_one_screen_with_the_first_red_rung_expanded(sides):
    text = screen(sides, "bad")
    lines = text.splitlines()
    assert len(lines) <= 50
    assert [line.split()[0] for line in lines if re.match("(green|red|skipped) ", line)].count("red") == 3
    assert lines[-1] == "different"
    for part in (
        "first red rung: policy log-probs, rl step 1", "index [1, 2], row id 11, position 2, token", "B -5", "ulp",
        "KL per token k1", "effective sample size", "likely", "look at:", "--tolerance policy=", "near-ties: 1",
        "cannot be compared",
    ):  # fmt: skip
        assert part in text, part


def test_the_smallest_tolerance_that_would_pass_passes(sides):
    """And a tenth less does not."""
    found = compare_traces(sides["a"], sides["bad"])
    expanded = explain(found, sides["a"], sides["bad"])
    assert expanded is not None
    for limit, is_red in ((expanded.passing, False), (0.9 * expanded.passing, True)):
        again = compare_traces(sides["a"], sides["bad"], limits={"policy": limit})
        assert any(rung.rung.name == "policy" for step in again.steps for rung in step.red) == is_red


def test_a_trace_in_float64_says_who_is_wrong(sides, tmp_path):
    true = trace(tmp_path / "true", [healthy(i) for i in range(3)], precision="float64")
    text = screen(sides, "bad", truth=str(true.directory))
    assert "B is wrong (error against float64" in text
    assert f"truth {healthy(1).array('logprobs')[1, 2]:.9g}" in text
    found = compare_traces(sides["bad"], sides["a"])
    expanded = explain(found, sides["bad"], sides["a"], truth=str(true.directory))
    assert expanded is not None
    assert expanded.verdict.startswith("A is wrong")
    lost = trace(tmp_path / "lost", [without(healthy(i), "logprobs") for i in range(3)], precision="float64")
    assert "cannot tell: logprobs is not in all three traces" in screen(sides, "bad", truth=str(lost.directory))


def test_a_truth_that_is_none_is_an_error(sides, tmp_path):
    with pytest.raises(UserError, match="a truth is recorded in float64"):
        screen(sides, "bad", truth=str(sides["good"].directory))
    short = trace(tmp_path / "short", [healthy(0)], precision="float64")
    with pytest.raises(UserError, match="holds no rl step 1"):
        screen(sides, "bad", truth=str(short.directory))
    with pytest.raises(UserError, match="cannot be read"):
        screen(sides, "bad", truth=str(tmp_path / "nothing"))


@pytest.mark.parametrize(("is_terminal", "no_color", "colored"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_colors_only_on_a_terminal_that_wants_them(sides, monkeypatch, capsys, is_terminal, no_color, colored):
    found = compare_traces(sides["a"], sides["good"])
    monkeypatch.setattr("sys.stdout.isatty", lambda: bool(is_terminal))
    monkeypatch.setenv("NO_COLOR", no_color)
    print_comparison(found, None)
    assert ("\x1b[" in capsys.readouterr().out) == bool(colored)


def test_json_is_json_and_holds_everything(sides):
    found = compare_traces(sides["a"], sides["bad"])
    text = json.dumps(as_json(found, explain(found, sides["a"], sides["bad"])), allow_nan=False)
    read = json.loads(text)
    assert read["same"] is False
    assert read["first"]["rung"] == "policy"
    assert read["first"]["place"] == {
        "row": 11,
        "position": 2,
        "token": int(healthy(1).array("used/tokens")[1, 2]),
        "text": None,
    }
    assert sum(len(step["rungs"]) for step in read["steps"]) == 3 * len(LADDER)
    gradients = next(rung for rung in read["steps"][2]["rungs"] if rung["rung"] == "gradients")
    assert gradients["findings"][0]["error"] == "inf"
    healthy_one = compare_traces(sides["a"], sides["good"])
    assert json.loads(json.dumps(as_json(healthy_one, None), allow_nan=False))["first"] is None


def test_junit_has_a_case_for_each_rung_and_step(sides):
    found = compare_traces(sides["a"], sides["bad"])
    root = ElementTree.fromstring(as_junit(found, explain(found, sides["a"], sides["bad"])))
    cases = root.findall("./testsuite/testcase")
    assert len(cases) == int(root.get("tests", 0)) == 3 * len(LADDER)
    failures = root.findall(".//failure")
    assert len(failures) == int(root.get("failures", 0)) == 3
    assert "look at:" in (failures[0].text or "")
    for suite in root.findall("testsuite"):
        assert len(suite.findall("testcase")) == int(suite.get("tests", 0))
    assert not ElementTree.fromstring(as_junit(compare_traces(sides["a"], sides["good"]), None)).findall(".//failure")


def test_junit_of_steps_that_only_one_side_has(sides, tmp_path):
    found = compare_traces(sides["a"], trace(tmp_path / "one", [healthy(0)]))
    root = ElementTree.fromstring(as_junit(found, None))
    assert "only A has rl step 1, 2" in [case.get("name") for case in root.iter("testcase")]
    assert int(root.get("failures", 0)) == 1


def test_control_characters_do_not_break_the_xml(sides, tmp_path):
    odd = trace(tmp_path / "odd", [put(elsewhere(healthy(0)), "scores", 0, 9)], name="\x00\x1b[31m\ud7ff")
    found = compare_traces(sides["a"], odd)
    ElementTree.fromstring(as_junit(found, explain(found, sides["a"], odd)))


@pytest.mark.parametrize(
    ("over", "color"),
    [(None, "c-none"), (0.0, "c-0"), (0.5, "c-1"), (1.0, "c-1"), (1.01, "c-2"), (999.0, "c-3"), (1e9, "c-4"),
     (math.inf, "c-5"), (math.nan, "c-5")],
)  # fmt: skip
def test_colors_of_an_error(over, color):
    assert level(over) == color


def whole_page(sides, other: str) -> str:
    found = compare_traces(sides["a"], sides[other])
    return ladder_page(found, explain(found, sides["a"], sides[other]), sides["a"], sides[other])


@pytest.mark.parametrize("other", ["good", "bad"])
def test_the_page_is_self_contained_and_escaped(sides, other):
    text = whole_page(sides, other)
    assert "<script" not in text
    assert not re.search(r"(src|href)=", text)
    assert "<torch" not in text
    for heading in (
        "The ladder",
        "Rung by step",
        "Layer by step",
        "Error against magnitude",
        "Tokens of",
        "Settings of both",
    ):
        assert heading in text
    assert ("First red rung" in text) == (other == "bad")
    assert text.count('<tr><td><span class="chip') == len(LADDER)


def test_the_page_shows_the_token_that_is_off(sides):
    text = whole_page(sides, "bad")
    assert re.search(r'class="tok c-[45]" title="token \d+&#10;A -[\d.]+&#10;B -5', text)
    assert re.search(r'class="tok [^"]*flip"', text)
    assert 'class="point worst"' in text


def test_long_traces_and_many_arrays_stay_readable(tmp_path):
    bare = [without(healthy(i), *[name for name in healthy(i).tensors if name != "scores"]) for i in range(150)]
    a = trace(tmp_path / "a", bare)
    b = trace(tmp_path / "b", [put(s, "scores", 0, 9) if s.step == 77 else s for s in bare], replay=a)
    found = compare_traces(a, b)
    text = ladder_page(found, explain(found, a, b), a, b)
    cells = re.search(r'style="--n:(\d+)"', text)
    assert cells is not None
    assert int(cells[1]) <= 60
    assert "rl step 77: scores" in text  # the worst of its neighbours is what the cell shows


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("other", ["good", "bad"])
def test_a_browser_renders_the_page(sides, other, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(whole_page(sides, other), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    command = [str(CHROMIUM), *quiet, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr  # no script error, nothing refused by the page's own policy
    assert done.stdout.count('class="cell ') > 3 * len(LADDER)
    assert "Made by diptych parity compare" in done.stdout


def test_the_command_writes_all_reports(sides, tmp_path, capsys):
    files = {name: tmp_path / "reports" / f"r.{name}" for name in ("html", "json", "junit")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["parity", "compare", str(sides["a"].directory), str(sides["bad"].directory), *options]) == 1
    assert all(path.stat().st_size > 1000 for path in files.values())
    assert "different" in capsys.readouterr().out


def test_a_red_rung_of_another_shape_is_told_in_words(sides, tmp_path):
    step = elsewhere(healthy(0))
    b = trace(tmp_path / "b", [change(step, "logprobs", step.array("logprobs")[:, :3])], replay=sides["a"])
    found = compare_traces(sides["a"], b)
    expanded = explain(found, sides["a"], b, truth="oracle")
    text = format_comparison(found, expanded)
    assert "shapes [4, 5] and [4, 3]" in text
    assert "with no limit" in text
    assert "shapes [4, 5] and [4, 3]" in ladder_page(found, expanded, sides["a"], b)
