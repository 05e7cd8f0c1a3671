"""The record of a run: its directory, metrics, progress, environment, report, and the comparison of two runs."""
