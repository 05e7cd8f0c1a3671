"""Diptych's PyTorch + DeepSpeed engine: transformers models, DeepSpeed training, a decode loop of our own.

Importing this package imports no framework, and settles one thing that must be settled before torch is loaded: OpenMP
threads that wait go to sleep. By default they spin, and beside one busy neighbour a pool of spinning threads is many
times slower than a single thread (measured on two cores: 19 s for a rollout of 0.6 s). What the user has set stays.
"""

import os

# GNU OpenMP (the PyPI wheels of torch), then Intel's (conda): read once, when torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
