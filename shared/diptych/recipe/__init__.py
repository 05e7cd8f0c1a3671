"""Recipes: what a run does, as typed data (`schema`), read from YAML (`load`) and checked as a whole (`checks`)."""
