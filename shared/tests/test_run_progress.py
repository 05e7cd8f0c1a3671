"""Progress lines, the bar and silence; and the record of the environment."""

import io
import subprocess
import sys

import pytest

import diptych
from diptych.errors import UserError
from diptych.run import progress
from diptych.run.environment import describe_environment, git_commit
from diptych.run.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("DIPTYCH_PROGRESS", raising=False)


def test_a_log_gets_the_first_the_last_and_some_lines_between(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "sft", initial=90, stream=stream, clock=clock) as bar:
        for step in range(10):
            clock.now += 2.0
            bar.advance(tokens=3000, shown={"loss": 1.0 / (step + 1)})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft: step 91/100, 2.0 s/step, 1.5k tokens/s, loss 1"  # rates count from this start
    assert lines[-1] == "sft: step 100/100, 2.0 s/step, 1.5k tokens/s, loss 0.1"
    assert len(lines) == 3  # one more after SECONDS_BETWEEN_LINES
    assert progress.SECONDS_BETWEEN_LINES == 15.0


def test_rates_without_tokens_and_above_one_a_second():
    stream, clock = io.StringIO(), Clock()
    with Progress(4, "rl", stream=stream, clock=clock) as bar:
        clock.now += 0.5
        bar.advance()
    assert stream.getvalue() == "rl: step 1/4, 2.00 steps/s\n"


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(4, "rl", stream=stream) as bar:
        for _ in range(4):
            bar.advance(tokens=10, shown={"score": 0.25})
    assert "100%" in stream.getvalue()
    assert "score 0.25" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_it_can_be_silenced_and_a_wrong_wish_is_named(monkeypatch):
    monkeypatch.setenv("DIPTYCH_PROGRESS", "off")
    for stream in (Terminal(), io.StringIO()):
        with Progress(1, "rl", stream=stream) as bar:
            bar.advance()
        assert stream.getvalue() == ""
    monkeypatch.setenv("DIPTYCH_PROGRESS", "plain")
    with Progress(1, "rl", stream=Terminal()) as bar:
        bar.advance()
    monkeypatch.setenv("DIPTYCH_PROGRESS", "loud")
    with pytest.raises(UserError, match="DIPTYCH_PROGRESS='loud': expected off or plain"):
        Progress(1, "rl")


def test_the_environment_names_what_reaches_a_number():
    record = describe_environment({"device": "cpu"})
    assert record["engine_environment"] == {"device": "cpu"}
    assert record["diptych"] == diptych.__version__
    assert record["packages"]["numpy"]
    assert record["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert record["processors"] >= 1


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_tracked_source_only(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("")
    git(tmp_path, "init")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "x")
    assert git_commit(package) is None  # installed inside someone's repository, not of it
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "y")
    commit = git_commit(package)
    assert commit is not None
    assert len(commit) == 40
    source.write_text("changed")
    assert git_commit(package) == f"{commit}+changes"


def test_recording_a_run_imports_no_framework():
    code = (
        "import sys, diptych.run.environment as e, diptych.run.metrics, diptych.run.report, diptych.run.compare;"
        "e.describe_environment();"
        "found = {'jax', 'torch', 'tensorflow', 'transformers', 'deepspeed'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
