"""Other trainers: a workload in their scripts' words, the runner around a script, and the real ones where they are.

DIPTYCH_PEERS=SCRIPTS:ENVIRONMENTS pytest shared/tests/test_bench_peers.py
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest

from diptych.bench import contest, peer_runner, peers
from diptych.bench.contest import Contestant, race
from diptych.bench.peer_runner import Clock, phases_from
from diptych.bench.peers import PEERS, RUNNER, differences, peer
from diptych.bench.workloads import workload
from diptych.errors import UserError

WAIT = 0.6
"""Seconds that a contestant is kept waiting: many times what a stand-in's iteration takes."""

# A workload in a script's words ----------------------------------------------------------------------------------


def options(name, work, threads=1):
    """The script's arguments as a mapping; flags are True."""
    words = PEERS[name].arguments(work, threads)
    found = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = True if after.startswith("--") else after
    return found


def test_trl_ppo():
    found = options("trl-ppo", workload("medium", ["epochs=2", "micro_batch=4", "kv_heads=4"]))
    assert found == {
        "arch": "llama", "layers": "6", "d_model": "512", "heads": "8", "kv_heads": "4", "ffn": "1408", "vocab": "8192",
        "batch": "8", "micro_batch": "4", "prompt_len": "64", "gen_len": "64", "dtype": "fp32", "threads": "1",
        "seed": "0", "steps": str(peers.ITERATIONS), "ppo_epochs": "2", "minibatches": "1",
    }  # fmt: skip
    more = options("trl-ppo", workload("tiny", ["ragged=true", "remat=full", "precision=bfloat16"]), threads=0)
    assert more["ragged"] is more["grad_ckpt"] is True
    assert more["dtype"] == "bf16"
    assert "threads" not in more  # as the script has it
    assert options("trl-ppo", workload("opt-125m"))["arch"] == "opt"


def test_trl_grpo():
    found = options("trl-grpo", workload("tiny", ["epochs=3", "forced=false"]))
    assert (found["batch"], found["group"], found["iters"], found["stop_eos"]) == ("16", "4", "3", True)


def test_tunix_ppo():
    found = options("tunix-ppo", workload("small", ["mini_batches=2", "micro_batch=4", "epochs=2", "kv_heads=2"]))
    assert found == {
        "family": "qwen2", "layers": "4", "d-model": "256", "heads": "4", "kv-heads": "2", "d-ff": "704",
        "vocab": "8192", "batch": "16", "mini-batch": "8", "micro-batch": "4", "ppo-epochs": "2", "prompt-len": "64",
        "gen-len": "64", "dtype": "float32", "seed": "0", "iters": str(peers.ITERATIONS),
    }  # fmt: skip
    opt = options("tunix-ppo", workload("opt-125m"))
    assert 3 * int(opt["d-ff"]) == 2 * 4 * 768  # three matrices with the numbers of OPT's two
    assert options("tunix-ppo", workload("tiny", ["forced=false"]))["with-eos"] is True


@pytest.mark.parametrize(
    ("name", "base", "settings", "words"),
    [
        *[(name, "rnn", [], f"{name} has no recurrent models") for name in PEERS],
        *[(name, "tiny", ["precision=float64"], f"{name} has no float64") for name in PEERS],
        *[(name, "tiny", ["zero=2"], "without DeepSpeed") for name in PEERS],
        *[(name, "tiny", ["remat=dots"], "remat=") for name in PEERS],
        ("trl-ppo", "tiny", ["forced=false"], "counts padding as generated tokens"),
        ("trl-ppo", "tiny", ["mini_batches=2"], "one optimizer step an epoch"),
        ("trl-ppo", "tiny", ["tied=true"], "trl-ppo has llama with tied=false only"),
        ("trl-ppo", "opt-125m", ["tied=false"], "trl-ppo has opt with tied=true only"),
        ("trl-grpo", "tiny", ["mini_batches=2"], "one optimizer step a pass"),
        ("trl-grpo", "tiny", ["batch=6"], "batch must be a multiple, got 6"),
        ("tunix-ppo", "tiny", ["ragged=true"], "prompts of one length"),
        ("tunix-ppo", "tiny", ["tied=true"], "no tied embeddings"),
        ("tunix-ppo", "tiny", ["remat=full"], "keeps all activations"),
    ],
)
def test_work_that_a_peer_cannot_do(name, base, settings, words):
    with pytest.raises(UserError) as caught:
        PEERS[name].arguments(workload(base, settings), 1)
    assert words in str(caught.value)


def test_differences_are_told():
    assert differences("trl-ppo", workload("tiny")) == []
    assert "Qwen2 of OPT's size" in differences("tunix-ppo", workload("opt-125m"))[0]
    assert "biases" in differences("tunix-ppo", workload("tiny"))[0]
    assert "masters" in differences("trl-grpo", workload("tiny", ["precision=bfloat16"]))[0]


def test_a_peer_that_is_not_there(tmp_path):
    places = {"scripts": tmp_path, "environments": tmp_path / "env", "threads": 1, "cores": [], "log": tmp_path / "log"}
    with pytest.raises(UserError, match="no peer 'verl': there are trl-ppo, trl-grpo, tunix-ppo"):
        peer("verl", workload("tiny"), **places)
    with pytest.raises(UserError, match=r"trl_ppo.py: no such file: say with --peers"):
        peer("trl-ppo", workload("tiny"), **places)
    (tmp_path / "trl_ppo.py").touch()
    with pytest.raises(UserError) as caught:
        peer("trl-ppo", workload("tiny"), **places)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}/env/trl/bin/python: no such file: make it with"
    assert lines[1].startswith(f"  python3.11 -m venv {tmp_path}/env/trl && {tmp_path}/env/trl/bin/pip install torch==")
    assert "google-tunix==" in lines[2]
    assert not (tmp_path / "log").exists()  # nothing was begun


# The runner around stand-ins of the scripts ------------------------------------------------------------------------

COMMON = """
import time
def now():
    return time.perf_counter(), time.process_time()
def param_count(model):
    return len(model)
def row(start, gen_end, train_start, end, prev_end, gen_tokens, train_tokens):
    found = {"gen_tokens": gen_tokens}
    for i, u in ((0, "s"), (1, "cpu")):
        found["rollout_" + u], found["score_" + u] = gen_end[i] - start[i], train_start[i] - gen_end[i]
        found["train_" + u], found["iter_" + u] = end[i] - train_start[i], end[i] - (prev_end or start)[i]
    return found
"""
TRL = """
import os, subprocess, sys, tempfile, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import common as C
def main():
    print("a line", sys.argv[1:], "of its own")
    print("half a line", end="", flush=True)
    subprocess.run([sys.executable, "-c", "print('@diptych-bench {}')"])
    print("made", tempfile.mkdtemp(), flush=True)
    assert sys.stdin.read() == ""
    print(f"trl 1.12.0 policy {C.param_count('policy')}, {C.param_count('value model')}", flush=True)
    open(sys.argv[1], "w").close()
    before = None
    for _ in range(int(sys.argv[2])):
        times = [C.now()]
        for seconds in (0.01, 0.02, 0.03):
            time.sleep(seconds)
            times.append(C.now())
        r = C.row(*times, before, 12, 24)
        print(f"iter {r['iter_s']:.3f}s", flush=True)
        before = times[-1]
main()
"""
TUNIX = """
import sys, time
n_params, rows, cur = 77, [], {}
t0 = time.perf_counter()
def step():
    cur.clear()
    t, tc = time.perf_counter(), time.process_time()
    open(sys.argv[1], "w").close()
    for name in ("rollout", "ref_logp", "old_logp", "values", "actor", "critic"):
        time.sleep(0.01)
        cur[name] = 0.01
    cur["gen_tokens"] = 12
    cur["iteration"], cur["cpu"] = time.perf_counter() - t, time.process_time() - tc
    rows.append(dict(cur))
    print(f"iter {len(rows) - 1}: {cur['iteration']:.3f}s", flush=True)
for _ in range(int(sys.argv[2])):
    step()
"""


def runner(tmp_path, watch, *, script=None, iterations=9, source=RUNNER):
    """A contestant: a stand-in of a script in the runner. It touches `began` when its first iteration begins."""
    (tmp_path / "common.py").write_text(COMMON)
    path = tmp_path / f"{watch}.py"
    path.write_text(script or {"trl": TRL, "tunix": TUNIX}[watch])
    asked = {
        "script": str(path), "arguments": [str(tmp_path / "began"), str(iterations)], "watch": watch, "packages": [],
        "about": {"differs": ["in this"]},
    }  # fmt: skip
    command = [sys.executable, str(source), json.dumps(asked)]
    return Contestant("P", "peer", command, environment={"PYTHONPATH": ""}, cores=[], log=tmp_path / "log")


@pytest.mark.parametrize(("watch", "parameters"), [("trl", 6), ("tunix", 77)])
def test_a_contest_of_a_script(tmp_path, watch, parameters):
    one = runner(tmp_path, watch)
    with contest.contest([one]):
        (found,) = race([one], rounds=2, warm_up=1)
    assert found.about == {"differs": ["in this"], "environment": {}, "parameters": parameters}
    assert found.peak_bytes > 2**20
    assert len(found.iterations) == 2
    for iteration in found.iterations:
        assert iteration.tokens == 12
        assert iteration.seconds >= 0.06
        assert iteration.cpu_seconds < iteration.seconds
        assert sum(iteration.phases.values()) == pytest.approx(iteration.seconds)
        assert next(iter(iteration.phases)) == "rollout"
        assert all(iteration.group(name) > 0 for name in ("rollout", "score", "update"))
        assert iteration.phases["other"] >= 0
    assert one._process.returncode == 0


@pytest.mark.parametrize("watch", ["trl", "tunix"])
def test_an_iteration_begins_when_it_is_asked_for(tmp_path, watch):
    one = runner(tmp_path, watch)
    with contest.contest([one]):
        one.ask("start")
        time.sleep(0.2)
        assert not (tmp_path / "began").exists()
        one.ask("iterate")
        assert (tmp_path / "began").exists()


@pytest.mark.parametrize("watch", ["trl", "tunix"])
@pytest.mark.parametrize("stands_still", [True, False])
def test_waiting_is_no_part_of_an_iteration(tmp_path, watch, stands_still):
    """The canary: the runner with clocks that go on."""
    source = tmp_path / "peer_runner.py"
    text = RUNNER.read_text()
    going = "self._stopped = None"
    standing = "self._away, self._stopped = self._read() - self._stopped, None"
    assert standing in text
    source.write_text(text if stands_still else text.replace(standing, going))
    one = runner(tmp_path, watch, source=source)
    with contest.contest([one]):
        one.ask("start")
        time.sleep(WAIT)
        first = one.ask("iterate")["seconds"]
        time.sleep(WAIT)
        second = one.ask("iterate")["seconds"]
    # TRL's script counts from the end of the iteration before; Tunix's reads its clock before it can be stopped.
    told = {"trl": second, "tunix": first}[watch]
    assert (0.06 <= told < WAIT) is stands_still


def test_a_clock():
    times = iter([1.0, 4.0, 9.0, 20.0])
    clock = Clock(lambda: next(times))
    assert clock() == 1.0
    clock.stop()
    assert clock() == clock() == 4.0
    clock.go_on()  # at 9: five seconds away
    assert clock() == 15.0


def test_what_a_script_prints_is_in_the_log(tmp_path):
    one = runner(tmp_path, "trl")
    with contest.contest([one]):
        one.ask("start")
        written = one.log.read_text()
        made = Path(next(line for line in written.splitlines() if "made " in line).split("made ")[1])
        assert made.is_dir()
    assert "a line ['" in written
    assert "half a line" in written
    assert "@diptych-bench {}" in written  # no answer, though it looks like one
    assert not made.exists()  # what a script leaves behind goes with it


@pytest.mark.parametrize("watch", ["trl", "tunix"])
def test_a_script_that_ends_or_fails(tmp_path, watch):
    one = runner(tmp_path, watch, iterations=1)
    with contest.contest([one]):
        one.ask("start")
        one.ask("iterate")
        with pytest.raises(UserError, match="the script has done all iterations"):
            one.ask("iterate")
    failing = runner(tmp_path, watch, script="raise ImportError('no module named trl')")
    with pytest.raises(UserError, match="no module named trl"), contest.contest([failing]):
        failing.ask("start")
    one = runner(tmp_path, watch)
    with contest.contest([one]):
        one.ask("start")
        with pytest.raises(UserError, match="a peer cannot profile"):
            one.ask("profile")


def test_rows_in_our_words():
    row = {"rollout": 1.0, "old_logp": 2.0, "values": 4.0, "actor": 8.0}  # no reference: beta 0
    found = phases_from(row, peer_runner.TUNIX, 16.0)
    assert found == {"rollout": 1.0, "score/policy": 2.0, "score/critic": 4.0, "update/policy": 8.0, "other": 1.0}
    assert set(peer_runner.TUNIX.values()) <= {*contest.PHASES, "rollout"}
    assert set(peer_runner.TRL.values()) == set(contest.GROUPS)


def test_the_runner_speaks_the_protocol():
    assert peer_runner.MARK == contest.MARK
    names = {
        line.split()[1].split(".")[0] for line in RUNNER.read_text().splitlines() if line.startswith(("import", "from"))
    }
    assert names <= sys.stdlib_module_names | {"__future__"}  # the peer's environment has nothing of ours


def test_a_peer_is_put_together(tmp_path, monkeypatch):
    """`peer` itself, with an environment whose Python is ours."""
    python = tmp_path / "env" / "trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "common.py").write_text(COMMON)
    script = "import common as C, os, sys; print(f'trl {C.param_count(sys.argv)} {os.environ[\"HF_HUB_OFFLINE\"]}')"
    (tmp_path / "trl_ppo.py").write_text(script)
    monkeypatch.setitem(PEERS, "trl-ppo", dataclasses.replace(PEERS["trl-ppo"], packages=("pytest",)))
    places = {"scripts": tmp_path, "environments": tmp_path / "env", "threads": 1, "cores": [], "log": tmp_path / "log"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    one = peer("trl-ppo", workload("tiny"), **places)
    with contest.contest([one]):
        about = one.ask("start")
    assert about["environment"] == {"pytest": pytest.__version__}
    assert about["command"].startswith("trl_ppo.py --arch llama --layers 2")
    assert about["differs"] == ["one optimizer for policy and critic"]
    assert about["parameters"] == len(about["command"].split())  # all arguments arrived
    assert (tmp_path / "log").read_text().split()[-1] == "1"


# The real ones -----------------------------------------------------------------------------------------------------

PLACES = os.environ.get("DIPTYCH_PEERS", "")


@pytest.mark.slow
@pytest.mark.skipif(not PLACES, reason="DIPTYCH_PEERS=SCRIPTS:ENVIRONMENTS says where other trainers are")
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_real_peer(tmp_path, name, architecture):
    from diptych.bench.flops import parameters

    scripts, environments = map(Path, PLACES.split(os.pathsep))
    shape = ["layers=2", "width=32", "vocabulary=64", "heads=4", "batch=8", "prompt=8", "answer=6"]
    work = workload("tiny", [*shape, f"architecture={architecture}", f"tied={str(architecture == 'opt').lower()}"])
    one = peer(name, work, scripts=scripts, environments=environments, threads=1, cores=[], log=tmp_path / "log")
    with contest.contest([one]):
        (found,) = race([one], rounds=2, warm_up=1)
    assert [iteration.tokens for iteration in found.iterations] == [8 * 6] * 2
    for iteration in found.iterations:
        assert sum(iteration.phases.values()) == pytest.approx(iteration.seconds)
        assert min(iteration.group(group) for group in contest.GROUPS) > 0
    expected = parameters(work)
    if name == "tunix-ppo" and architecture == "llama":
        expected += 2 * 3 * 32  # biases
    if not (name == "tunix-ppo" and architecture == "opt"):
        assert found.about["parameters"] == expected
