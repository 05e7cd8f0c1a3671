"""A contest between little Python programs: turns, noise, and contestants that fail."""

import json
import os
import sys
import time

import pytest

from diptych.bench.contest import MARK, Contestant, Iteration, contest, race, split_rollout
from diptych.errors import UserError

# Says its name into a file at every iteration. NOISE: what it prints besides.
PROGRAM = """
import json, sys
name, turns, noise = sys.argv[1:]
for line in sys.stdin:
    word = json.loads(line)["do"]
    print(noise)
    print("noise without an end of line", file=sys.stderr, end="", flush=True)
    answer = {"start": {"parameters": 7}, "finish": {"peak_bytes": 2**20, "compilations": None, "said": "goodbye"}}
    if word == "iterate":
        with open(turns, "a") as file:
            file.write(name)
        phases = {"rollout": 0.3, "score/policy": 0.1, "update/policy": 0.2, "switch": 0.05, "other": 0.35}
        answer["iterate"] = {"seconds": 1.0, "cpu_seconds": 0.9, "phases": phases, "tokens": 12, "compilations": 1}
    print("@diptych-bench " + json.dumps(answer[word]), flush=True)
"""

TELLS = "import json, os, sys; sys.stdin.readline(); print(sys.argv[1] + json.dumps(eval(sys.argv[2])))"


def one(name, tmp_path, program=PROGRAM, *, noise="", patience=30.0):
    command = [sys.executable, "-c", program, name, str(tmp_path / "turns"), noise]
    log = tmp_path / f"{name}.log"
    return Contestant(name, "engine", command, environment={}, cores=[], log=log, patience=patience)


def is_alive(contestant):
    return contestant._process.poll() is None


def test_contestants_take_turns(tmp_path):
    both = [one("A", tmp_path), one("B", tmp_path)]
    told = []
    with contest(both):
        found = race(both, rounds=3, warm_up=1, told=lambda *step: told.append(step[:2]))
    # Each warms up on its own (the first iteration and one more); then by turns.
    assert (tmp_path / "turns").read_text() == "AABB" + "ABABAB"
    assert [len(measured.iterations) for measured in found] == [3, 3]
    assert [len(measured.warm_up) for measured in found] == [1, 1]
    assert [measured.compilations_late for measured in found] == [3, 3]
    assert found[0].first == 1.0
    assert found[0].peak_bytes == 2**20
    assert found[0].about == {"parameters": 7, "said": "goodbye"}
    assert told.count(("A", "iteration")) == 3
    assert told[0] == ("A", "setup")
    assert not any(map(is_alive, both))


@pytest.mark.parametrize("noise", ["a plain line", "not a mark: @diptych-bench {}", "\n\n", "x" * 100_000])
def test_answers_are_found_in_noise(tmp_path, noise):
    contestant = one("A", tmp_path, noise=noise)
    with contest([contestant]):
        assert contestant.ask("start") == {"parameters": 7}
        assert contestant.ask("iterate")["tokens"] == 12
    assert noise.strip("\n") in contestant.log.read_text()  # its own words are kept


def test_a_contestant_that_dies_is_an_error_with_its_last_words(tmp_path):
    program = PROGRAM.replace('if word == "iterate":', 'if word == "iterate":\n        sys.exit("the dog ate it")')
    both = [one("A", tmp_path), one("B", tmp_path, program)]
    with pytest.raises(UserError, match=r"(?s)B ended with exit code 1: see .*B.log.*the dog ate it"), contest(both):
        race(both, rounds=1, warm_up=0)
    assert not any(map(is_alive, both))  # the other one is ended, too


def test_a_contestant_that_falls_silent_is_an_error(tmp_path):
    program = PROGRAM.replace('if word == "iterate":', 'if word == "iterate":\n        continue')
    contestant = one("A", tmp_path, program, patience=1.0)
    contestant.ask("start")
    with pytest.raises(UserError, match=r"A: no answer in 1 s: see .*A.log"):
        contestant.ask("iterate")
    assert not is_alive(contestant)


def test_a_contestant_that_cannot_be_talked_to(tmp_path):
    """It ends before it is asked: writing to it must not be the error that is shown."""
    contestant = one("A", tmp_path, "import sys; sys.exit('no such module')")
    contestant._start()
    contestant._process.wait()
    with pytest.raises(UserError, match="no such module"), contest([contestant]):
        contestant.ask("start")


def test_a_contestant_that_is_only_described_starts_nothing(tmp_path):
    both = [one("A", tmp_path), one("B", tmp_path)]
    with contest(both):
        both[0].ask("start")
        assert both[1]._process is None
        assert not both[1].log.exists()
    both[0].stop()  # once more: nothing
    assert not is_alive(both[0])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_contestants_are_pinned(tmp_path):
    core = min(os.sched_getaffinity(0))
    contestant = Contestant(
        "A", "peer", [sys.executable, "-c", TELLS, MARK, "sorted(os.sched_getaffinity(0))"],
        environment={}, cores=[core], log=tmp_path / "log",
    )  # fmt: skip
    with contest([contestant]):
        assert contestant.ask("start") == [core]


def test_the_environment_is_the_users_with_changes(tmp_path):
    contestant = Contestant(
        "A", "peer", [sys.executable, "-c", TELLS, MARK, "os.environ['OMP_NUM_THREADS']"],
        environment={"OMP_NUM_THREADS": "17"}, cores=[], log=tmp_path / "log",
    )  # fmt: skip
    with contest([contestant]):
        assert contestant.ask("start") == "17"


def test_those_beside_end_with_the_first(tmp_path):
    program = f"{TELLS}; time.sleep(600) if 'BESIDE' in os.environ else sys.stdin.read()".replace(
        "import json", "import time, json"
    )
    contestant = Contestant(
        "A", "engine", [sys.executable, "-c", program, MARK, "{}"],
        environment={}, cores=[], log=tmp_path / "log", beside=[{"BESIDE": "1"}],
    )  # fmt: skip
    assert contestant.ask("start") == {}
    began = time.monotonic()
    contestant.stop()
    assert time.monotonic() - began < 30
    assert not is_alive(contestant)
    assert all(other.poll() is not None for other in contestant._beside)


def test_phases_by_group():
    phases = {
        "data": 1.0, "switch": 2.0, "prefill": 4.0, "decode": 8.0, "score/policy": 16.0, "score/reward": 32.0,
        "update/policy": 64.0, "update/critic": 128.0, "other": 256.0,
    }  # fmt: skip
    fine = Iteration(seconds=511.0, cpu_seconds=0.0, phases=phases, tokens=1)
    assert (fine.group("rollout"), fine.group("score"), fine.group("update")) == (14.0, 48.0, 192.0)
    coarse = Iteration(seconds=7.0, cpu_seconds=0.0, phases={"rollout": 1.0, "score": 2.0, "update": 4.0}, tokens=1)
    assert (coarse.group("rollout"), coarse.group("score"), coarse.group("update")) == (1.0, 2.0, 4.0)


@pytest.mark.parametrize(("prefill", "split"), [(0.1, (0.1, 0.2)), (0.5, (0.3, 0.0))])
def test_a_rollout_is_split(prefill, split):
    """Never into more than there was."""
    whole = Iteration(seconds=1.0, cpu_seconds=1.0, phases={"rollout": 0.3, "other": 0.7}, tokens=1)
    phases = split_rollout(whole, prefill).phases
    assert (phases["prefill"], phases["decode"]) == pytest.approx(split)
    assert sum(phases.values()) == pytest.approx(1.0)
    assert list(phases) == ["prefill", "decode", "other"]


def test_the_mark_in_the_programs_above():
    assert json.dumps(MARK)[1:-1] in PROGRAM
