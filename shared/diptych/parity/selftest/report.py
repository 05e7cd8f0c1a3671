"""What a self-test found: the detection matrix (check x bug) for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from typing import Any

from diptych.parity.selftest.selftest import CHECKS, Detection, SelfTest

SEEN, NOT = "x", "."


def describe(found: SelfTest) -> str:
    """One screen: the matrix, then the verdict."""
    width = max(len(one.bug) for one in found.detections) + 2
    heads = [check[:4] for check in CHECKS]
    lines = [f"{'bug':<{width}}" + " ".join(f"{head:<4}" for head in heads) + "  fresh loss"]
    for one in found.detections:
        if one.reason:
            lines.append(f"{one.bug:<{width}}not planted: {one.reason}")
            continue
        cells = " ".join(f"{SEEN if check in one.seen else NOT:<4}" for check in CHECKS)
        lines.append(f"{one.bug:<{width}}{cells}  {SEEN if one.naive else NOT}{'' if one.seen else '   NOT SEEN'}")
    return "\n".join([*lines, "", *verdict(found)])


def verdict(found: SelfTest) -> list[str]:
    """What it comes to, in a few lines."""
    planted, seen = len(found.planted), len(found.planted) - len(found.unseen)
    fresh = sum(one.naive for one in found.planted)
    lines = [
        f"{found.engines[0]} recorded, {found.engines[1]} got the bugs, {found.precision}",
        f"{seen} of {planted} planted bugs seen; the PPO loss on fresh log-probabilities alone sees {fresh}",
        f"{len(found.alarms)} false alarms in {found.clean} clean runs",
    ]
    lines += [f"NOT SEEN: {one.bug}: {one.what}" for one in found.unseen]
    lines += [f"FALSE ALARM: {alarm}" for alarm in found.alarms]
    lines += [f"BLIND: no bug turned the check {check!r} red" for check in found.blind]
    return lines


def markdown(found: SelfTest) -> str:
    """The matrix as a table, with what each bug is."""
    lines = [
        "| bug | " + " | ".join(CHECKS) + " | fresh loss |",
        "| --- |" + " :-: |" * (len(CHECKS) + 1),
    ]
    for one in found.planted:
        cells = [SEEN if check in one.seen else "" for check in CHECKS]
        lines.append(f"| {one.what} | {' | '.join(cells)} | {SEEN if one.naive else ''} |")
    left = [f"{one.bug} ({one.reason})" for one in found.detections if one.reason]
    lines += ["", *(f"* {line}" for line in verdict(found))]
    return "\n".join(lines + ([f"* not planted: {', '.join(left)}"] if left else [])) + "\n"


def as_json(found: SelfTest) -> dict[str, Any]:
    return {
        "engines": list(found.engines),
        "precision": found.precision,
        "checks": list(CHECKS),
        "bugs": [_bug(one) for one in found.detections],
        "clean": found.clean,
        "alarms": list(found.alarms),
        "blind": list(found.blind),
        "verdict": verdict(found),
        "code": found.code,
    }


def _bug(one: Detection) -> dict[str, Any]:
    return {
        "name": one.bug,
        "what": one.what,
        "stage": one.stage,
        "seen": dict(one.seen),
        "fresh_loss": one.naive,
        "not_planted": one.reason or None,
    }
