"""What a check of a trap finds, the checks that are made from a setting's name, and questions to a setup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.parity.doctor.setups import Fact, Facts, Setup
from diptych.parity.doctor.vocabulary import ALIASES

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """where: FILE:LINE. found: what stands there. instead: what to write there."""

    where: str
    found: str
    instead: str


Answer = list[Finding] | None | str
Check = Callable[[Setup, Setup | None], Answer]
Pair = Callable[[Setup, Setup], Answer]

LOW = ("bfloat16", "float16", "bf16", "fp16")


def is_not(name: str, *values: Any, instead: str) -> Check:
    """A setting that may have none of these values."""

    def check(setup: Setup, other: Setup | None) -> Answer:
        fact = setup.setting(name)
        if fact is None:
            return None
        return [says(fact, name, instead)] if fact.value in values else []

    return check


def differ(name: str) -> Pair:
    """A setting that may not differ between the two."""

    def pair(a: Setup, b: Setup) -> Answer:
        left, right = a.setting(name), b.setting(name)
        if left is None or right is None:
            return None
        return [] if same(left.value, right.value) else [apart(name, left, right)]

    return pair


def same(a: Any, b: Any) -> bool:
    """Equal as JSON would have them: 1 and 1.0 are, lists and tuples are, True and 1 are not."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def apart(name: str, left: Fact, right: Fact) -> Finding:
    """B's line and A's value; the other way round where Diptych fixes B's."""
    if " " in right.key and " " not in left.key:
        left, right = right, left
    label, written = label_of(right, name), last(right.key)
    if written in ("", label):
        instead = f"{label}: {shown(left.value)}"
    else:
        instead = f"{written}: one whose {name} is {shown(left.value)}"
    found = f"{label} is {shown(right.value)}, and {shown(left.value)} at {left.where}"
    return Finding(where=right.where, found=found, instead=instead)


def says(fact: Fact, name: str, instead: str) -> Finding:
    """What a single setting says."""
    return Finding(where=fact.where, found=f"{label_of(fact, name)} is {shown(fact.value)}", instead=instead)


def label_of(fact: Fact, name: str) -> str:
    """A setting as it is written where it stands; by our name where a line says it among other things (a dialect)."""
    written = last(fact.key)
    return written if ALIASES.get(written, written) == name else name


def last(key: str) -> str:
    """The end of a dotted key."""
    return key.split(".")[-1]


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Questions to a setup.


def on_accelerator(setup: Setup) -> bool | None:
    """None: not known."""
    hardware = setup.facts.get("hardware", {})
    texts = [str(hardware[key].value).lower() for key in ("platform", "device", "devices") if key in hardware]
    return None if not texts else not all(re.search(r"\bcpu\b", text) for text in texts)


def only_ours(setup: Setup, other: Setup | None) -> bool:
    return setup.is_ours and (other is None or other.is_ours)


def is_low(setup: Setup) -> bool:
    fact = setup.setting("precision")
    return fact is not None and fact.value in LOW


def model_type(model: Facts) -> str:
    return str(model["model_type"].value) if "model_type" in model else ""
