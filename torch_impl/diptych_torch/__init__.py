"""Diptych's PyTorch + DeepSpeed engine: transformers models, DeepSpeed training, a decode loop of our own.

Importing this package imports no framework, and settles one thing that must be settled before torch is loaded: OpenMP
threads that wait go to sleep. By default they spin; with one busy neighbour on the machine a spinning pool is many
times slower than one thread (see docs). Whatever the user has set stays.
"""

import os

# GNU OpenMP (the PyPI wheels of torch), then Intel's (conda): read once, when torch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
