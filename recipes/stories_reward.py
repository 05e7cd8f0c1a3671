"""A reward on text: how happy a story sounds, from 0 to 1. Any Python function of this form can be a reward."""

import re
from collections.abc import Sequence

HAPPY = {
    "happy", "smile", "smiled", "smiles", "love", "loved", "loves", "fun", "laugh", "laughed", "play", "played",
    "friend", "friends", "hug", "hugged", "nice", "kind", "proud", "excited",
}  # fmt: skip
SAD = {"sad", "cry", "cried", "scared", "mad", "angry", "hurt", "mean", "afraid", "lost"}


def happy(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """One score per response: happy words minus sad ones, each different word counted once, five for full marks."""
    scores = []
    for response in responses:
        words = set(re.findall(r"[a-z]+", response.lower()))
        scores.append(min(1.0, max(0.0, (len(words & HAPPY) - len(words & SAD)) / 5)))
    return scores
