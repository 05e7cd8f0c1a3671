"""Postcards: a little language whose answers a rule can score, for learning all three stages in minutes.

    prompt    Write a postcard from Rome about the food.
    response  Dear Ana, Rome is lovely. The soup was fine, the bread was sweet and the wine was grand. Love, Ben

Four slots (the place and three things that belong to the topic) hold a bright or a dull adjective. Demonstrations toss
a fair coin for each slot and one card in five names a wrong place, so that a model which imitates them scores about
0.45; the best card scores 1. Of the two cards of a preference pair the better one by that rule is `chosen`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from diptych import random
from diptych.errors import UserError

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris", "Jonas")
PLACES = (
    *("Rome", "Paris", "Lima", "Oslo", "Cairo", "Delhi", "Kyoto", "Quito", "Tunis", "Porto"),
    *("Milan", "Bern", "Riga", "Seoul", "Dublin", "Malta", "Bali", "Perth", "Osaka", "Turin"),
    *("Havana", "Lagos", "Vienna", "Zagreb"),
)
TOPICS = {
    "food": ("soup", "bread", "wine"),
    "weather": ("sun", "wind", "rain"),
    "beach": ("sand", "sea", "boat"),
    "hotel": ("room", "bed", "bath"),
    "museum": ("art", "hall", "guide"),
    "market": ("fish", "fruit", "crowd"),
    "train": ("seat", "ride", "coffee"),
    "town": ("park", "square", "view"),
}
PHRASINGS = (
    "Write a postcard from {place} about the {topic}.",
    "Send a card from {place} and tell of the {topic}.",
    "You are in {place}. Write home about the {topic}.",
)
BRIGHT = ("lovely", "great", "fine", "sweet", "grand", "superb", "charming", "splendid")
DULL = ("dreary", "gloomy", "dreadful", "sour", "grim", "awful", "shabby", "dismal")

PROMPTS = tuple((place, topic, phrase) for place in PLACES for topic in TOPICS for phrase in PHRASINGS)
NUM_SLOTS = 4
BRIGHT_RATE = 0.5
WRONG_PLACE_RATE = 0.2
MALFORMED_RATE = 0.15  # of the cards that preference pairs are drawn from
CLEAR_DIFFERENCE = 0.3  # at least this between the scores of a preference pair

_PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")
_NOUNS = {noun for nouns in TOPICS.values() for noun in nouns}
_SLOT = re.compile(r"\b(\w+) (?:is|was) (\w+)")
_GREETING = re.compile(r"\bDear\b")
_OPENING = re.compile(rf"Dear (?:{'|'.join(NAMES)}),\s")
_SIGN_OFF = re.compile(r"\bLove\b")
_CLOSING = re.compile(rf"\sLove, (?:{'|'.join(NAMES)})$")


def generate(
    kind: Literal["demonstrations", "preferences", "prompts"], *, count: int, seed: int
) -> list[dict[str, Any]]:
    """Rows with `prompt`/`response`, `prompt`/`chosen`/`rejected` or `prompt`. All 576 prompts come once before any
    comes again."""
    rows = []
    for index, (place, topic, phrase) in enumerate(_prompts(kind, count, seed)):
        generator = random.generator(seed, f"task:postcards:{kind}", row=index)
        row = {"prompt": phrase.format(place=place, topic=topic)}
        if kind == "demonstrations":
            row["response"] = _card(generator, place, topic, malformed_rate=0.0)
        elif kind == "preferences":
            row["chosen"], row["rejected"] = _pair(generator, row["prompt"], place, topic)
        rows.append(row)
    return rows


def score(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The true score of each response, in [0, 1]; a reward function for recipes (`diptych.data.tasks.postcards:score`).

    (bright slots / max(4, slots)) x (1 if the asked place and no other is named, else 1/2) x (1/2 for each of greeting
    and sign-off that is not there exactly once, at its place). Any text has a score; the empty one has 0.
    """
    del rows  # the prompt says it all
    return [_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    asked = _PLACE.search(prompt)
    if asked is None:
        raise UserError(f"postcards:score: the prompt names no place that it knows: {prompt!r}")
    response = response.strip()
    slots: dict[str, str] = {}
    for thing, adjective in _SLOT.findall(response):
        if thing in _NOUNS or thing in PLACES:
            slots.setdefault(thing, adjective)  # what is said twice counts once
    share = sum(adjective in BRIGHT for adjective in slots.values()) / max(NUM_SLOTS, len(slots))
    place = 1.0 if set(_PLACE.findall(response)) == {asked.group(1)} else 0.5
    opened = len(_GREETING.findall(response)) == 1 and _OPENING.match(response) is not None
    closed = len(_SIGN_OFF.findall(response)) == 1 and _CLOSING.search(response) is not None
    return share * place * (1.0 if opened else 0.5) * (1.0 if closed else 0.5)


def _prompts(kind: str, count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    for index in range(count):
        epoch, position = divmod(index, len(PROMPTS))
        if position == 0:
            permutation = random.permutation(seed, f"task:postcards:{kind}:prompts", len(PROMPTS), step=epoch)
        yield PROMPTS[permutation[position]]


def _card(generator: np.random.Generator, place: str, topic: str, *, malformed_rate: float) -> str:
    """One card. Every draw is one uniform, so that the stream is the same with every version of NumPy."""

    def pick(words: Sequence[str]) -> str:
        return words[int(generator.random() * len(words))]

    def adjective() -> str:
        return pick(BRIGHT if generator.random() < BRIGHT_RATE else DULL)

    if generator.random() < WRONG_PLACE_RATE:
        place = pick([other for other in PLACES if other != place])
    things = list(TOPICS[topic])
    first = things.pop(int(generator.random() * 3))
    second = things.pop(int(generator.random() * 2))
    greeted = pick(NAMES)
    sender = pick([name for name in NAMES if name != greeted])
    parts = [
        f"Dear {greeted},",
        f"{place} is {adjective()}.",
        f"The {first} was {adjective()}, the {second} was {adjective()} and the {things[0]} was {adjective()}.",
        f"Love, {sender}",
    ]
    if generator.random() < malformed_rate:
        parts.pop(0 if generator.random() < 0.5 else -1)
    return " ".join(parts)


def _pair(generator: np.random.Generator, prompt: str, place: str, topic: str) -> tuple[str, str]:
    """Two cards whose scores differ clearly, the better one first."""
    while True:
        cards = [_card(generator, place, topic, malformed_rate=MALFORMED_RATE) for _ in range(2)]
        first, second = (_score(prompt, card) for card in cards)
        if abs(first - second) >= CLEAR_DIFFERENCE:
            return (cards[0], cards[1]) if first > second else (cards[1], cards[0])
