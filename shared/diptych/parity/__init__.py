"""Comparing two engines: tolerances (one table, with reasons)."""
