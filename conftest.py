"""Settings of every test run."""

import os

# Workers share few cores: a spinning thread pool per worker would be many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DIPTYCH_PROGRESS", "off")
