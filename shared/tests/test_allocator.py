"""What malloc does with freed memory: pages are asked for once, and a user's own settings are left alone."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from diptych.allocator import computes_on_cpu, keep_freed_memory

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

# In a process of its own: the settings are for good. Pages that a call of a program asks for once the heap has grown to
# what the program needs: that took up to 18 calls, of 60 in three runs.
COUNT = """
import resource, sys
from diptych.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory({})
import jax, jax.numpy as jnp
x, pages = jnp.ones((2, 5 * 2**20)), []
work = jax.jit(lambda x: jnp.sum(jnp.sort(x, axis=0)))
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(work(x))
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages[-8:]))
"""


def _faults(what: str) -> int:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, what], capture_output=True, text=True, check=True,
        env=environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.slow
@GLIBC
def test_memory_that_was_freed_costs_no_pages_again():
    pages = 10 * 2**20 * 4 // resource.getpagesize()  # of the sorted array
    assert _faults("keep") < pages // 20
    assert _faults("leave") > pages // 2  # canary


@GLIBC
@pytest.mark.parametrize(
    "told", [{"MALLOC_ARENA_MAX": "4"}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}]
)
def test_what_the_user_says_to_malloc_stays(told):
    assert not keep_freed_memory(told)


def test_an_accelerator_is_seen_by_its_device(tmp_path):
    assert computes_on_cpu(tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # any machine with the driver
    assert computes_on_cpu(tmp_path)
    (tmp_path / "vfio" / "0").touch()
    assert not computes_on_cpu(tmp_path)
    (tmp_path / "vfio" / "0").unlink()
    (tmp_path / "nvidiactl").touch()
    assert not computes_on_cpu(tmp_path)
