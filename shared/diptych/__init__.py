"""Diptych's hinge: everything about RLHF that a framework has no business deciding.

NumPy only. Importing this package imports neither jax nor torch (law 1); engines are loaded by name, on demand.
"""

__version__ = "0.1.0"
