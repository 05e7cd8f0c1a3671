"""A trace: what goes in comes out, bit for bit; what is broken is an error with its place; NumPy alone reads it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from diptych.errors import UserError
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter


def step(number: int, **metrics: float) -> Step:
    return Step(
        stage="rl",
        step=number,
        metrics={"loss": 0.5, **metrics},
        tensors={
            "logprobs": Recorded(values=np.float32([[-1.5, 0.0]]), layout="rows new", mask="used/mask"),
            "used/mask": Recorded(values=np.array([[True, False]]), layout="rows new"),
            "policy/start/weights/w": Recorded(values=np.eye(3), layout="as stored", phase="given"),
            "policy/probe/first": Recorded(values=np.asarray(4, np.int64), layout=""),
            "empty": Recorded(values=np.zeros((0, 2), np.float64), layout="rows new"),
        },
    )


def written(directory, *steps: Step) -> Trace:
    with TraceWriter(directory, producer={"name": "jax", "precision": "float32"}, provenance={"seed": 3}) as writer:
        for one in steps:
            writer.add(one)
    return Trace(directory)


def test_what_goes_in_comes_out(tmp_path):
    trace = written(tmp_path / "a", step(0), Step(stage="rl", step=1, metrics={"loss": 0.1}), step(2))
    assert trace.steps == [("rl", 0), ("rl", 1), ("rl", 2)]
    assert trace.producer["name"] == "jax"
    assert trace.provenance == {"seed": 3}
    assert [trace.has_tensors(*key) for key in trace.steps] == [True, False, True]
    read, wanted = trace.read("rl", 2), step(2)
    assert read.metrics == wanted.metrics
    assert list(read.tensors) == list(wanted.tensors)
    for name, one in wanted.tensors.items():
        found = read.tensors[name]
        assert found.values.dtype == one.values.dtype
        assert found.values.shape == one.values.shape
        assert found.values.tobytes() == one.values.tobytes()
        assert (found.layout, found.mask, found.phase) == (one.layout, one.mask, one.phase)
    assert read.under("policy/start/weights").keys() == {"w"}


def test_numbers_that_json_has_no_word_for_stay_what_they_are(tmp_path):
    trace = written(tmp_path / "a", step(0, lost=math.nan, large=math.inf, low=-math.inf))
    metrics = trace.metrics("rl", 0)
    assert math.isnan(metrics["lost"])
    assert (metrics["large"], metrics["low"]) == (math.inf, -math.inf)
    json.loads((tmp_path / "a" / "index.jsonl").read_text(), parse_constant=pytest.fail)


def test_numpy_and_safetensors_alone_read_it(tmp_path):
    written(tmp_path / "a", step(0))
    script = """
import json, sys
from pathlib import Path
from safetensors.numpy import load_file
line = json.loads((Path(sys.argv[1]) / "index.jsonl").read_text().splitlines()[0])
arrays = load_file(Path(sys.argv[1]) / line["file"])
print(arrays[line["tensors"]["logprobs"]["key"]].tolist(), sorted(m for m in sys.modules if m.startswith("diptych")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[[-1.5, 0.0]] []"


def test_a_killed_run_leaves_every_finished_step(tmp_path):
    writer = TraceWriter(tmp_path / "a", producer={"name": "jax"}, provenance={})
    writer.add(step(0))
    writer.add(step(1))
    assert Trace(tmp_path / "a").steps == [("rl", 0), ("rl", 1)]  # before it is closed, if it ever is
    writer.close()


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def append(path, text):
    path.write_text(path.read_text() + text)


def drop(path, name):
    lines = path.read_text().splitlines()
    row = json.loads(lines[-1])
    del row["tensors"][name]
    path.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")


BROKEN = {
    "an array that nobody names": (lambda d: drop(d / "index.jsonl", "empty"), "does not name"),
    "no trace": (lambda d: (d / "trace.json").unlink(), "trace.json"),
    "another format": (lambda d: change(d / "trace.json", "diptych-trace", "x"), "is not a Diptych trace"),
    "a later version": (lambda d: change(d / "trace.json", '"version": 1', '"version": 9'), "version 9"),
    "half a line": (lambda d: append(d / "index.jsonl", '{"stage": "rl"'), "index.jsonl:3"),
    "a step twice": (lambda d: change(d / "index.jsonl", '"step": 1', '"step": 0'), "index.jsonl:2.*twice"),
    "a lost file": (lambda d: (d / "rl-00001.safetensors").unlink(), "rl-00001.safetensors"),
    "another dtype": (lambda d: change(d / "index.jsonl", "float32", "float64"), "logprobs is float32"),
    "another shape": (lambda d: change(d / "index.jsonl", "[3, 3]", "[9]"), "in the index"),
    "an array too many": (
        lambda d: change(d / "index.jsonl", '"used/mask": {', '"used/mask2": {"key": "9"}, "used/mask": {'),
        "used/mask2",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_says_where(name, tmp_path):
    written(tmp_path / "a", step(0), step(1))
    damage, message = BROKEN[name]
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        [*Trace(tmp_path / "a")]


def test_a_trace_never_overwrites(tmp_path):
    written(tmp_path / "a", step(0))
    with pytest.raises(UserError, match="is there already"):
        written(tmp_path / "a", step(0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run").mkdir()
    TraceWriter(tmp_path / "b", producer={}, provenance={}, beside=("run",)).close()


def test_another_index_is_another_fingerprint(tmp_path):
    a, b = written(tmp_path / "a", step(0)), written(tmp_path / "b", step(0, other=1.0))
    assert a.fingerprint() != b.fingerprint()
    assert a.fingerprint() == Trace(tmp_path / "a").fingerprint()
