"""The self-test: a bug of each kind, planted in the torch side of the quickstart, turns the right rung red; a clean run
turns none. (All bugs, and fifty clean runs: `scripts/parity_table.py`, in docs/parity_table.md.)"""

from __future__ import annotations

import json

import pytest

from diptych.cli import main
from diptych.parity.selftest.bugs import BUGS
from diptych.parity.selftest.report import describe, markdown
from diptych.parity.selftest.selftest import Detection, SelfTest

SETTINGS = [
    "data.demonstrations.limit=300",
    "data.preferences.limit=300",
    "data.prompts.limit=200",
    "sft.batch_size=16",
    "sft.micro_batch_size=8",
    "reward.batch_size=16",
    "reward.micro_batch_size=8",
    "rl.batch_size=16",
    "rl.micro_batch_size=8",
    "rl.eval_prompts=16",
    "rollout.max_new_tokens=32",
]
# bug -> the lowest rung that must be red (None: the gate stops it)
PLANTED = {
    "future leaks": "policy",
    "sampler noise": "tokens",
    "reward truncated": "rewards",
    "KL coefficient": "returns",
    "whitening ddof": "advantages",
    "weight decay": "weights",
    "pairs swapped": "loss",
    "padding read": "gate",
}


@pytest.mark.slow
def test_a_bug_of_each_kind_is_seen_where_it_acts_and_nothing_is_seen_without(tmp_path, capsys):
    words = [word for bug in PLANTED for word in ("--bug", bug)]
    code = main(
        [
            "parity",
            "selftest",
            "recipes/quickstart.yaml",
            "--clean",
            "1",
            *words,
            "--json",
            str(tmp_path / "m.json"),
            *SETTINGS,
        ]
    )
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "m.json").read_text())
    assert code == 0, said
    assert found["alarms"] == []
    seen = {bug["name"]: bug["seen"] for bug in found["bugs"]}
    assert seen.keys() == PLANTED.keys()
    for bug, rung in PLANTED.items():
        assert rung in seen[bug], f"{bug}: {seen[bug]}"
    # What a bug does not touch stays green: each rung is red by its own doing.
    assert list(seen["whitening ddof"]) == ["advantages"]
    assert set(seen["KL coefficient"]) <= {"returns", "advantages", "metrics"}
    assert set(seen["weight decay"]) <= {"weights", "next"}


def made(**changes):
    settings = {
        "engines": ("jax", "torch"),
        "precision": "float32",
        "detections": (Detection(bug="a", what="an a", stage="rl", seen={"policy": "rl step 0: ..."}),),
        "clean": 1,
        "alarms": (),
        "blind": (),
    }
    return SelfTest(**(settings | changes))


@pytest.mark.parametrize(
    ("found", "code", "says"),
    [
        (made(), 0, "1 of 1 planted bugs seen"),
        (made(detections=(Detection(bug="b", what="a b", stage="rl"),)), 1, "NOT SEEN: b"),
        (made(alarms=("seed 7: policy: ...",)), 1, "FALSE ALARM"),
        (made(blind=("kl",)), 1, "BLIND"),
        (made(detections=(Detection(bug="b", what="a b", stage="rl", reason="none here"),)), 0, "not planted"),
    ],
)
def test_an_unseen_bug_a_false_alarm_and_a_blind_check_are_errors(found, code, says):
    assert found.code == code
    assert says in describe(found)
    assert "| bug |" in markdown(found)


def test_there_are_enough_bugs_and_each_has_one_name():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40


def test_an_unknown_bug_is_an_error(capsys):
    assert main(["parity", "selftest", "recipes/quickstart.yaml", "--bug", "no such"]) == 2
    assert "norm eps" in capsys.readouterr().err
