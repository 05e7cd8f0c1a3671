"""A reward that is a Python function: f(prompts, responses, rows) -> one number per response.

    def shorter_is_better(prompts, responses, rows):
        return [-len(response) for response in responses]

prompts and responses are lists of text, rows the prompts' JSON objects. The function is the user's own code and runs in
this process; an exception that it raises is left alone, for its traceback is what the user needs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from diptych.errors import InvariantError, UserError

RewardFunction = Callable[[list[str], list[str], list[Mapping[str, Any]]], Sequence[float]]


def load_function(reference: str, *, directory: str | Path = ".") -> RewardFunction:
    """The function that `FILE.py:NAME` (FILE relative to `directory`) or `MODULE:NAME` names. UserError where it cannot
    be had."""
    return cast(RewardFunction, load_target(f"reward function {reference!r}", reference, directory=directory))


def load_target(what: str, reference: str, *, directory: str | Path = ".") -> Callable[..., Any]:
    """What `FILE.py:NAME` (FILE relative to `directory`) or `MODULE:NAME` names, something callable. what: its name in
    errors. UserError where it cannot be had."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"{what}: write FILE.py:NAME or MODULE:NAME")
    module = _load_file(Path(directory) / place, what) if place.endswith(".py") else _load_module(place, what)
    if not hasattr(module, name):
        offered = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{what}: {place} has no {name!r}; it has {', '.join(offered) or 'nothing callable'}")
    target: Any = getattr(module, name)
    if not callable(target):
        raise UserError(f"{what}: {name!r} is not callable but {type(target).__name__}")
    return target


def call(
    function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Float[np.ndarray, " batch"]:
    """Rewards of a batch, float64 [batch].

    Raises UserError where the function returns something other than one number per response, and InvariantError,
    naming the row and the response, where a number is not finite.
    """
    name = getattr(function, "__name__", repr(function))
    returned: Any = function(list(prompts), list(responses), list(rows))
    if isinstance(returned, np.ndarray):
        returned = returned.tolist()
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Sequence):
        raise UserError(f"reward function {name}: it must return a list of numbers, not {type(returned).__name__}")
    if len(returned) != len(responses):
        raise UserError(f"reward function {name}: it returned {len(returned)} numbers for {len(responses)} responses")
    for index, value in enumerate(returned):
        if not isinstance(value, Real):
            raise UserError(
                f"reward function {name}: number {index} is {value!r} ({type(value).__name__}), not a number"
            )
    rewards = np.asarray([float(value) for value in returned], np.float64)
    broken = np.flatnonzero(~np.isfinite(rewards)).tolist()
    if broken:
        index = broken[0]
        raise InvariantError(
            f"reward function {name} returned {rewards[index]} for row {index} of the batch: prompt "
            f"{_short(prompts[index])}, response {_short(responses[index])}; a reward must be finite"
        )
    return rewards


def _load_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise UserError(f"{what}: no such file: {path}")
    path = path.resolve()
    name = f"diptych_target_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # the suffix .py always has a loader
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{what}: {path} fails to import: {_one_line(error)}") from error
    return module


def _load_module(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{what}: module {name} fails to import: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
