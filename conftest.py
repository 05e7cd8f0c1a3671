"""Settings of every test run: few threads, no progress bars, the longest tests first."""

import os

# Workers share few cores: a spinning thread pool per worker would be many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DIPTYCH_PROGRESS", "off")
# The tests leave the user's cache of compiled programs alone.
os.environ.setdefault("DIPTYCH_COMPILATION_CACHE", "off")
# Tests of meshes see eight CPU devices; every other engine uses the first one only.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("DIPTYCH_DEVICES", "1")


def pytest_collection_modifyitems(items):
    """The slow ones first, so that no worker is left with a long one at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
