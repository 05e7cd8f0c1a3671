"""Rewards of finished responses. `function`: a Python function; the learned reward model is scored by the rl stage."""
