"""Settings of every test run: few threads, no progress bars, the longest tests first."""

import os
import tempfile

# Workers share few cores: a spinning thread pool per worker would be many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DIPTYCH_PROGRESS", "off")
# Programs that several workers and processes need are compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"diptych-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Tests of meshes see eight CPU devices; every other engine uses the first one only.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("DIPTYCH_DEVICES", "1")


def pytest_collection_modifyitems(items):
    """The slow ones first, so that no worker is left with a long one at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
