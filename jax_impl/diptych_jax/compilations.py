"""XLA's compilations: counted, asserted to be over after warm-up, and kept on disk between runs.

JAX reports every program that it needs and does not have in memory, under the event below. A program that the
persistent cache holds is reported too: reading it back is quick, but a run that asks for it again after warm-up has
lost it, which is the mistake to find. So the count is of programs that were made, by whatever means.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from diptych.errors import InvariantError

EVENT = "/jax/core/compile/backend_compile_duration"
OFF = "DIPTYCH_COMPILATION_CACHE"  # "off" switches the persistent cache off
LEAST_SECONDS = 1.0  # programs that compile faster are not worth a file

_made: Counter[int] = Counter()  # by thread


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event == EVENT:
        _made[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def count() -> int:
    """Programs made in this process since this module was imported, in every thread."""
    return _made.total()


class Warm:
    """What has been compiled once is not compiled again: an engine's calls, each by a key of all that may change its
    program (shapes and settings, never values).

    Example:
        with warm.call("generate", prompts.tokens.shape, sampling.max_new_tokens):
            ...
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str, Hashable]] = set()

    @contextmanager
    def call(self, name: str, *key: Hashable) -> Iterator[None]:
        """Around a call. InvariantError where something was compiled although the same name and key have been through
        before; a call that raises says nothing about either."""
        thread = threading.get_ident()  # a thread that writes a checkpoint may compile what it likes
        before = _made[thread]
        yield
        made = _made[thread] - before
        if made and (name, key) in self._seen:
            raise InvariantError(
                f"{name} recompiled after warm-up: {made} program{'s' * (made != 1)} for {key!r}, which ran before; "
                "something that changes the program (a shape, a dtype, a sharding, a Python value) is not in this key "
                "or changes between equal calls"
            )
        self._seen.add((name, key))


def enable_cache(devices: Sequence[Any]) -> Path | None:
    """Keep compiled programs between runs, in `$XDG_CACHE_HOME/diptych/jax` (or `~/.cache`). Returns the folder; None
    where it is off.

    Left as it is: a folder that the user gave JAX (JAX_COMPILATION_CACHE_DIR, `jax.config`). Off:
    DIPTYCH_COMPILATION_CACHE=off; several CPU devices, whose programs wait for each other for ever once they are read
    back from disk (jax 0.10.2: the devices come to their collectives in different orders); and a folder that cannot be
    written. One line on stderr says of the last two that a folder is not used.
    """
    given: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if len(devices) > 1 and devices[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once, at its first compilation
        if given is not None:
            print(
                f"diptych: {given} is not used: programs for several CPU devices deadlock when read back from a cache",
                file=sys.stderr,
            )
        return None
    if given is not None:
        return Path(given)
    if os.environ.get(OFF, "").lower() == "off":
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print(
            f"diptych: compiled programs are not kept for the next run: {folder} cannot be written (set XDG_CACHE_HOME "
            f"or JAX_COMPILATION_CACHE_DIR to a folder that can, or {OFF}=off)",
            file=sys.stderr,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder
