"""Worlds of several processes, each a thread here: the first acts, all get its result or its error, all agree."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diptych import world as module
from diptych.errors import InvariantError, UserError
from diptych.world import SINGLE, World

WAIT = 20.0  # seconds for the others, before a process gives up


def in_all(work, count=3):
    """What `work(world)` gives in each of `count` processes; an error is a result too."""
    barrier, slots = threading.Barrier(count, timeout=WAIT), [None] * count

    def gather_for(index):
        def gather(message):
            slots[index] = message
            barrier.wait()
            found = np.stack(slots)
            barrier.wait()
            return found

        return gather

    def process(index):
        try:
            return work(World(index=index, count=count, gather=gather_for(index)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(process, range(count)))


def test_only_the_first_acts_and_all_get_its_result():
    actors = []

    def work(world):
        return world.first(lambda: actors.append(world.index) or {"rows": [1, None], "big": "x" * 5000})

    assert in_all(work) == [{"rows": [1, None], "big": "x" * 5000}] * 3
    assert actors == [0]


def test_arrays_are_shared_bit_for_bit():
    values = in_all(lambda world: world.share(np.array([1 / 3, np.nan, -0.0]) if world.is_main else np.zeros(3)))
    assert {value.tobytes() for value in values} == {np.array([1 / 3, np.nan, -0.0]).tobytes()}
    assert {value.dtype for value in values} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("no such file"), UserError, "no such file"),
        (InvariantError("not finite"), InvariantError, "not finite"),
        (OSError("disk full"), RuntimeError, "process 0 failed: OSError: disk full"),
    ],
)
def test_an_error_of_the_first_stops_all(error, kind, message):
    def fail():
        raise error

    first, *others = in_all(lambda world: world.first(fail))
    assert first is error
    for other in others:
        assert type(other) is kind
        assert str(other) == message


def test_all_must_agree():
    assert in_all(lambda world: world.agree("the data", lambda: "same")) == [None] * 3
    for error in in_all(lambda world: world.agree("the data", lambda: f"rows {max(world.index, 1)}")):
        assert isinstance(error, UserError)
        assert "the data: not the same in process 0 and process 2:" in str(error)


def test_all_wait_until_they_see_what_the_first_wrote(tmp_path):
    def write():
        threading.Timer(0.3, (tmp_path / "there").touch).start()  # a file system that shows it late

    start = time.monotonic()
    assert in_all(lambda world: world.first(write, leaves=tmp_path / "there")) == [None] * 3
    assert time.monotonic() - start > 0.25


def test_a_process_on_another_file_system_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_SEE", 0.1)
    (tmp_path / "own0").touch()
    for error in in_all(lambda world: world.first(lambda: None, leaves=tmp_path / f"own{world.index}")):
        assert isinstance(error, UserError)
        assert "process 1, 2 does not see it" in str(error)


def test_alone_nothing_is_gathered(tmp_path):
    assert SINGLE.first(lambda: 3, leaves=tmp_path / "never") == 3
    SINGLE.agree("nothing", lambda: pytest.fail("not asked"))
    with pytest.raises(OSError, match="full"):
        SINGLE.first(lambda: (_ for _ in ()).throw(OSError("full")))
