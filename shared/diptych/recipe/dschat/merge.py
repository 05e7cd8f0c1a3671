"""A further stage for a recipe that has others: what each stage owns is its own, and what they share is joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from diptych.errors import UserError
from diptych.recipe.schema import Stage

_JOINED: Mapping[str, Callable[[Any, Any], Any]] = {
    "data.max_prompt_tokens": max,
    "data.max_response_tokens": max,
    "data.too_long": lambda a, b: "truncate" if "truncate" in (a, b) else a,
    "layout.remat": lambda a, b: "full" if "full" in (a, b) else a,
    "layout.zero.stage": max,
}
"""How two values of a shared setting become one. Any other keeps the value that was there."""

# A stage before this one makes the model that the setting would name.
_MADE_BY: Mapping[str, Stage] = {"rl.policy_path": "sft", "rl.reward.model_path": "reward"}


def merge(nested: Mapping[str, Any], added: Mapping[str, Any], *, name: str) -> tuple[dict[str, Any], list[str]]:
    """(the settings of both by dotted key, what had to be decided between them).

    nested: an existing recipe's settings. added: dotted key -> value, with one stage. UserError where the recipe has
    that stage already.
    """
    settings = dict(_flat(nested))
    changes: list[str] = []
    order = get_args(Stage)
    stages = list(settings.get("stages", order))
    (stage,) = added["stages"]
    if stage in stages:
        raise UserError(f"{name}: has a {stage} stage already; take it out of `stages`, or write a recipe of its own")
    for key, value in added.items():
        before = settings.get(key)
        if key in ("stages", "name"):
            continue
        if before is None:
            for parent in _parents(key):  # a group that was null or empty
                settings.pop(parent, None)
            settings[key] = value
            if _is_shared(key):
                changes.append(f"{key} is {value}: in every stage now, where the recipe did not say")
            continue
        settings[key] = after = _JOINED.get(key, lambda a, _: a)(before, value)
        if before != value:
            changes.append(f"{key} is {after}: the recipe had {before}, this step alone would have {value}")
    for key in (key for key in settings if _is_shared(key) and key not in added):
        changes.append(f"{key} is {settings[key]}: in every stage, and this step alone would not have it")
    settings["stages"] = sorted([*stages, stage], key=order.index)
    for key, maker in _MADE_BY.items():
        if {maker, "rl"} <= set(settings["stages"]) and settings.get(key) is not None:
            changes.append(f"{key} {settings.pop(key)} is left out: the {maker} stage makes it")
    return settings, changes


def _is_shared(key: str) -> bool:
    return key.startswith(("layout.zero.", "layout.remat"))


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
