"""The report is one file that fetches nothing, runs nothing and shows what others wrote as text."""

import math
import re
from html.parser import HTMLParser

import pytest

from diptych.errors import UserError
from diptych.recipe.schema import ModelRecipe, Recipe
from diptych.run.charts import Series, line_chart, number, share_bar
from diptych.run.directory import RunDirectory
from diptych.run.metrics import MetricsLogger
from diptych.run.report import CHARTS, duration, write_report

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;\''
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(path, *, recipe=None, full=True):
    run = RunDirectory.create(
        path,
        recipe or Recipe(name="demo", model=ModelRecipe(path="m")),
        engine="jax",
        environment={"packages": {"jax": "0.10"}},
        resume=False,
        stages=("sft",),
    )
    if full:
        for stage, charts in CHARTS.items():
            run.begin(stage)
            with MetricsLogger(run, stage) as logger:
                logger.log(0, {"eval/loss": 2.0})
                for step in range(1, 4):
                    metrics = {metric: step / 10 for chart in charts for metric in chart.curves.values()}
                    times = {"timing_s/rollout": 2.0, "timing_s/update": 1.0, "timing_s/iteration": 4.0}
                    logger.log(step, metrics | times | {"novel/metric": 1.0})
            for when, score in (("before", 0.25), ("after", 0.75)):
                run.add_samples(stage, when, [{"prompt": "ask", "response": f"{stage} {when}", "score": score}])
        run.finish("sft", {"eval_loss_first": 4.0, "eval_loss_last": 1.0, "seconds": 61.0})
        run.finish("reward", {"eval_accuracy": 0.95, "seconds": 5.0})
        run.finish("rl", {"eval_score_before": 0.25, "eval_score_after": 0.75, "kl": 3.5, "seconds": 3700.0})
    return run


def check_self_contained(text):
    """No reference to anything outside the file, nothing that runs."""
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in {"src", "href", "srcset", "action", "data", "xlink:href"}, (tag, name)
        assert not name.startswith("on"), (tag, name)
        assert "url(" not in (value or ""), (tag, name, value)
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?:|//[a-z]", style)
    return page


def test_the_report_shows_every_stage_and_fetches_nothing(tmp_path):
    run = make_run(tmp_path / "out")
    path = write_report(run.path)
    assert path == run.path / "report.html"
    page = check_self_contained(path.read_text(encoding="utf-8"))
    for charts in CHARTS.values():
        for chart in charts:
            assert chart.title in page.text
    for piece in (
        "demo", "jax", "0.10", "4.000 → 1.000", "95.0%", "0.250 → 0.750", "3.5", "1 h 02 min", "novel/metric",
        "rollout", "sft before", "rl after", "prompt_template", "score 0.75", "prefers-color-scheme",
    ):  # fmt: skip
        assert piece in page.text, piece
    assert "seed: 0" in page.text


def test_the_check_for_references_is_red_on_a_reference(tmp_path):
    """The canary of `check_self_contained`."""
    text = write_report(make_run(tmp_path / "out").path).read_text(encoding="utf-8")
    for seeded in (
        '<img src="https://example.com/x.png">',
        '<b onclick="x()"></b>',
        '<b style="background:url(x)"></b>',
    ):
        with pytest.raises(AssertionError):
            check_self_contained(text.replace("</main>", f"{seeded}</main>"))


def test_what_others_wrote_is_text(tmp_path):
    run = make_run(tmp_path / "out", recipe=Recipe(name=EVIL, model=ModelRecipe(path=EVIL)), full=False)
    run.begin("sft")
    with MetricsLogger(run, "sft") as logger:
        logger.log(1, {EVIL: 1.0, "eval/" + EVIL: 2.0})
    run.add_samples("sft", "before", [{"prompt": EVIL, "response": EVIL, "score": None}])
    run.add_samples(EVIL, "after", [{"prompt": EVIL, "response": EVIL, "score": 1.0}])
    run.finish("sft", {EVIL: EVIL})
    page = check_self_contained(write_report(run.path).read_text(encoding="utf-8"))
    assert page.text.count(EVIL) > 8


def test_stages_that_did_not_run_are_left_out(tmp_path):
    run = make_run(tmp_path / "out", full=False)
    assert "No stage finished" in write_report(run.path).read_text(encoding="utf-8")
    run.finish("reward", {"eval_accuracy": 0.5})
    text = Page(write_report(run.path).read_text(encoding="utf-8")).text
    assert "Reward accuracy" in text
    assert "Supervised" not in text
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)


def test_answers_are_paired_by_prompt_and_order(tmp_path):
    run = make_run(tmp_path / "out", full=False)
    before = [{"prompt": p, "response": f"{p} old {i}", "score": None} for p in "ab" for i in range(2)]
    after = [{"prompt": p, "response": f"{p} new {i}", "score": None} for p in "ba" for i in range(2)]
    run.add_samples("reward", "before", before)
    run.add_samples("reward", "after", [*after, {"prompt": "c", "response": "alone", "score": None}])
    text = write_report(run.path).read_text(encoding="utf-8")
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert cells[:4] == [(p, f"{p} old {i}", f"{p} new {i}") for p in "ab" for i in range(2)]
    assert ("c", "–", "alone") in cells


def coordinates(svg):
    path = re.search(r'<path class="curve[^>]* d="M([^"]*)"', svg)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_a_curve_goes_where_its_numbers_say():
    svg = line_chart("t", [Series(name="s", points=[(0, 0.0), (5, 10.0), (10, 5.0)])])
    (x0, y0), (x1, y1), (x2, y2) = coordinates(svg)
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2))  # y grows downwards


def test_a_long_curve_keeps_its_spike():
    points = [(step, 0.0) for step in range(100_000)]
    points[54_321] = (54_321, 1.0)
    drawn = coordinates(line_chart("t", [Series(name="s", points=points)]))
    assert len(drawn) <= 500
    assert len({y for _, y in drawn}) == 2


def test_a_log_axis_draws_equal_decades_and_no_zeros():
    svg = line_chart("t", [Series(name="s", points=[(0, 1e-8), (1, 1e-6), (2, 0.0), (3, 1e-4)])], log=True)
    (_, y0), (_, y1), (_, y2) = coordinates(svg)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert line_chart("t", [Series(name="s", points=[(0, 0.0)])], log=True) == ""


@pytest.mark.parametrize(
    "ys", [[0.0], [1.0, 1.0], [-3.0], [1e-300, 2e-300], [1e300, -1e300], [2.0, 2.000001], [0.1 + 0.2, 0.3]]
)
def test_odd_ranges_are_drawn(ys):
    svg = line_chart("t", [Series(name="s", points=list(enumerate(ys)))])
    assert "nan" not in svg
    assert all(math.isfinite(value) for point in coordinates(svg) for value in point)
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(labels) == len(set(labels)) >= 2


def test_the_bar_shows_shares_of_the_whole():
    html = share_bar("t", {"a": 1.0, "b": 3.0}, unit="s")
    assert [float(share) for share in re.findall(r"flex:([0-9.]+)", html)] == [0.75, 0.25]
    assert share_bar("t", {}, unit="s") == ""


NUMBERS = {
    0.0: "0",
    1.0: "1",
    12345.6: "12,346",
    0.1 + 0.2: "0.3",
    1e-5: "1e-5",
    1.234e-7: "1.23e-7",
    2e9: "2e9",
    -0.5: "-0.5",
}


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_are_short(value):
    assert number(value) == NUMBERS[value]


def test_durations():
    assert [duration(s) for s in (4.26, 59.0, 119.9, 3720)] == ["4.3 s", "59 s", "2 min 00 s", "1 h 02 min"]
