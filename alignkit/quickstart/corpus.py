"""Short animal stories from templates: an opening, four events and an ending, each cheerful or gloomy.

In the text a model is pre-trained on every sentence takes its mood by the toss of a coin, so the model can go on either
way. In a preference pair the chosen story is cheerful throughout, the rejected one gloomy throughout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from alignkit.core import rng

Mood = Literal["cheerful", "gloomy"]

NUM_EVENTS = 4

NAMES = {
    "she": ("Mia", "Lily", "Anna", "Rosa", "Ella", "Nora", "Ruby", "Zoe", "Clara", "Tess"),
    "he": ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Oscar", "Jack", "Hugo", "Paul"),
}
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
ANIMALS = ("rabbit", "fox", "bear", "mouse", "duck", "frog", "cat", "goat", "hedgehog", "squirrel")
PLACES = ("river", "forest", "garden", "meadow", "beach", "market", "hill", "lake", "farm", "park")
TIMES = ("morning", "afternoon", "evening", "day")
SEASONS = ("spring", "summer", "autumn", "winter")
TOYS = ("boat", "ball", "kite", "drum", "basket", "hat", "book", "lamp")
COLOURS = ("red", "blue", "green", "yellow", "white")
FOODS = ("pear", "cake", "berry", "pie", "carrot", "nut")

OPENINGS = (
    "One {season} {time}, {name} the {animal} went to the {place} with a {colour} {toy}.",
    "{name} the {animal} took a {colour} {toy} to the {place} one {season} {time}.",
    "Early one {season} {time}, {name} the {animal} walked to the {place} with a {colour} {toy}.",
    "{name} was a little {animal} with a {colour} {toy}, who came to the {place} one {season} {time}.",
)
EVENTS: Mapping[Mood, tuple[str, ...]] = {
    "cheerful": (
        "A kind {other} gave {him} a sweet {food}.",
        "{He} met a {other} and they played a fun game with the {toy}.",
        "The sun was warm and {name} danced on the grass.",
        "{name} found a shiny gift under a tree.",
        "The birds sang a lovely song for {him}.",
        "{He} showed {his} beautiful {toy} to a good friend.",
        "A {other} smiled at {him} and gave {him} a hug.",
        "{name} won a race at the {place} and everyone cheered.",
        "{He} helped a little {other}, who thanked {him} with a {food}.",
        "{name} laughed with joy and held the {toy} high in the air.",
    ),
    "gloomy": (
        "A mean {other} stole {his} last {food}.",
        "A rude {other} shouted at {him} and broke the {toy}.",
        "A cold storm came and {name} was afraid.",
        "{name} fell over a stone and hurt {his} foot.",
        "The sky grew dark and {he} felt alone.",
        "{He} lost {his} {toy} in the mud and began to cry.",
        "An angry {other} ran after {him} with a stick.",
        "{name} got sick from a bad {food} at the {place}.",
        "{He} was hungry and tired, and nobody helped {him}.",
        "{name} looked at {his} broken {toy} with tears in {his} eyes.",
    ),
}
ENDINGS: Mapping[Mood, tuple[str, ...]] = {
    "cheerful": (
        "{name} went home happy.",
        "It was the best {time} of the {season}, and {name} was glad.",
        "{He} was proud and slept in a warm bed.",
        "{name} and {his} friends lived happily in the {place}.",
    ),
    "gloomy": (
        "{name} went home sad.",
        "It was the worst {time} of the {season}, and {name} cried.",
        "{He} was lonely and slept in a cold bed.",
        "{name} sat sadly in the rain at the {place}.",
    ),
}


class Story:
    """One opening and all that can follow it. Stories of the same key are the same."""

    def __init__(self, seed: int, purpose: str, index: int) -> None:
        self._random = rng.generator(seed, purpose, index)
        pronoun = self._random.choice(tuple(NAMES))
        he, him, his = PRONOUNS[pronoun]
        animal = self._random.choice(ANIMALS)
        self._others = [other for other in ANIMALS if other != animal]
        self._words = {
            "name": self._random.choice(NAMES[pronoun]),
            "he": he,
            "He": he.capitalize(),
            "him": him,
            "his": his,
            "animal": animal,
            "place": self._random.choice(PLACES),
            "time": self._random.choice(TIMES),
            "season": self._random.choice(SEASONS),
            "toy": self._random.choice(TOYS),
            "colour": self._random.choice(COLOURS),
        }
        self.prompt = self._random.choice(OPENINGS).format(**self._words)

    def continuation(self, moods: list[Mood]) -> str:
        """One event a mood and an ending in the last one's, with a leading space. No event comes twice."""
        *events, last = moods
        order = {mood: self._random.sample(templates, len(templates)) for mood, templates in EVENTS.items()}
        chosen = [order[mood].pop() for mood in events] + [self._random.choice(ENDINGS[last])]
        return "".join(" " + self._fill(template) for template in chosen)

    def tossed_moods(self) -> list[Mood]:
        """A mood for every sentence, each by the toss of a coin."""
        return [self._random.choice(("cheerful", "gloomy")) for _ in range(NUM_EVENTS + 1)]

    def _fill(self, template: str) -> str:
        return template.format(other=self._random.choice(self._others), food=self._random.choice(FOODS), **self._words)


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """`count` whole stories of mixed moods, as rows with the column `text`."""
    stories = [Story(seed, "quickstart text", index) for index in range(count)]
    return [{"text": story.prompt + story.continuation(story.tossed_moods())} for story in stories]


def pairs(count: int, seed: int, split: str, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` rows prompt, chosen (cheerful), rejected (gloomy), all with different prompts and none in `without`."""
    rows: dict[str, dict[str, str]] = {}
    index = 0
    while len(rows) < count:
        story = Story(seed, f"quickstart {split}", index)
        index += 1
        if story.prompt in without or story.prompt in rows:
            continue
        rows[story.prompt] = {
            "id": f"{split}-{index}",
            "prompt": story.prompt,
            "chosen": story.continuation(["cheerful"] * (NUM_EVENTS + 1)),
            "rejected": story.continuation(["gloomy"] * (NUM_EVENTS + 1)),
        }
    return list(rows.values())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_corpus(folder: Path, *, num_texts: int, num_pairs: int, num_held_out: int, seed: int) -> None:
    """`pretrain.jsonl`, `pairs.jsonl` and `held_out.jsonl`; no prompt of the last is in either of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = pairs(num_held_out, seed, "held_out")
    kept_back = frozenset(row["prompt"] for row in held_out)
    stories = [row for row in texts(num_texts, seed) if not row["text"].startswith(tuple(kept_back))]
    write_jsonl(folder / "pretrain.jsonl", stories)
    write_jsonl(folder / "pairs.jsonl", pairs(num_pairs, seed, "pairs", without=kept_back))
    write_jsonl(folder / "held_out.jsonl", held_out)
