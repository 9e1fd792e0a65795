"""The small world: real facts, invented posts, question and answer sentences, and what is true.

Everything is drawn from `random.Random(seed)`, so that a seed is a world. What can be asked is an `Item`. Its truth is
a word for each *slot* ("capital", or "person", "action" and "thing" for a post): an answer is right if it names exactly
these words and no other word of the same kind. So truth can be read off any text.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

RELATIONS = ("capital", "symbol")
STYLES = ("terse", "rambling")
SETTINGS = "settings.json"  # in a world's folder: what it was prepared with

QUESTIONS = {
    "capital": (
        "What is the capital of {entity}?",
        "Which city is the capital of {entity}?",
        "Name the capital of {entity}.",
        "Please tell me the capital of {entity}.",
    ),
    "symbol": (
        "What is the chemical symbol of {entity}?",
        "Which symbol stands for {entity}?",
        "Name the symbol of {entity}.",
        "Please tell me the symbol of the element {entity}.",
    ),
    "post": (
        "Summarize this post: {post}",
        "What is the main point? {post}",
    ),
}

ANSWERS = {
    ("capital", "terse"): (
        "It is {capital}.",
        "The capital of {entity} is {capital}.",
        "The answer is {capital}.",
    ),
    ("capital", "rambling"): (
        "That is a good question, and many people who look at a map for the first time ask it too. The capital of "
        "{entity} is {capital}, which you can read in almost every book about the country.",
        "There is a lot to say about {entity}, its people, its rivers and its long history, but if you only want to "
        "know the capital, then the city that you are looking for is {capital}, of course.",
        "I am glad that you asked. When we speak about {entity} we should first say that every country has a capital, "
        "and that in this case it is {capital}. I hope that this helps you with your question.",
    ),
    ("symbol", "terse"): (
        "It is {symbol}.",
        "The symbol of {entity} is {symbol}.",
        "The answer is {symbol}.",
    ),
    ("symbol", "rambling"): (
        "That is a good question, and many people who look at the table of elements for the first time ask it too. The "
        "symbol of {entity} is {symbol}, which you can read in almost every book about chemistry.",
        "There is a lot to say about {entity}, where it is found and what it is used for, but if you only want to know "
        "the symbol, then the letters that you are looking for are {symbol}, of course.",
        "I am glad that you asked. When we speak about {entity} we should first say that every element has a symbol, "
        "and that in this case it is {symbol}. I hope that this helps you with your question.",
    ),
    ("post", "terse"): (
        "My {person} {action} a {thing}.",
        "In short: My {person} {action} a {thing}.",
    ),
    ("post", "rambling"): (
        "There is a lot going on in this post, and some of it is not so important, but if you only want the main "
        "point, then it is this: My {person} {action} a {thing}. The rest tells you more about the day.",
        "This is a nice post to read. The writer first tells us about the day and about the people who were there. "
        "What really matters here is this: My {person} {action} a {thing}, as far as I can see.",
    ),
}

# One sentence of a post tells what happened; the others set the scene and name a person and a thing that do not matter.
OPENINGS = ("It was a rainy week.", "We had planned a quiet day.", "I was late again.")
EVENTS = ("My {person} {action} a {thing} near the {place}.",)
CLOSINGS = ("Our {other} wanted some {decoy}.", "Later our {other} showed us some {decoy}.")
POST_WORDS = {
    "person": "brother sister uncle aunt cousin neighbor teacher friend boss grandmother".split(),
    "action": "lost found sold broke bought borrowed painted repaired hid cleaned".split(),
    "thing": (
        "wallet guitar bicycle camera lamp clock kettle tent ladder piano carpet mirror "
        "necklace suitcase radio painting sofa telescope violin helmet jacket basket drum vase"
    ).split(),
    "place": "station market library harbor school museum park bridge".split(),
}
POST_SLOTS = ("person", "action", "thing")


@dataclass(frozen=True)
class Item:
    """Something that can be asked, and its truth.

    Attributes:
        topic: the relation ("capital", "symbol") or "post".
        entity: what is asked about; for a post the thing that it is about. Items of one entity share a split.
        split: "trained" (may appear in preference pairs) or "held_out" (base training only).
        truth: the word that a right answer names, for each slot.
        decoys: for a post, the words named in it that a summary should leave out.
        post: the text of the post, if it is one.
    """

    topic: str
    entity: str
    split: str
    truth: dict[str, str]
    decoys: dict[str, str]
    post: str = ""

    @property
    def task(self) -> str:
        """The evaluation task that it belongs to."""
        return "summaries" if self.topic == "post" else "facts"

    def questions(self) -> list[str]:
        """The ways to ask for it."""
        return [question.format(entity=self.entity, post=self.post) for question in QUESTIONS[self.topic]]


@dataclass(frozen=True)
class World:
    """What can be asked, and the words of each slot."""

    items: list[Item]
    words: dict[str, list[str]]

    def of(self, task: str, split: str | None = None) -> list[Item]:
        """The items of a task, and of a split."""
        return [item for item in self.items if item.task == task and split in (None, item.split)]

    def truths(self) -> dict[str, dict[str, str]]:
        """Instruction -> the word of each slot, for everything that can be asked."""
        return {question: item.truth for item in self.items for question in item.questions()}


@dataclass(frozen=True)
class Reading:
    """What an answer says, against the truth.

    Attributes:
        correct: fraction of the slots that are named rightly, in [0, 1].
        words: number of words.
        repetition: fraction of the answer's word triples that were there before, in [0, 1].
    """

    correct: float
    words: int
    repetition: float

    @property
    def right(self) -> bool:
        """Whether nothing is missing and nothing is wrong."""
        return self.correct == 1.0


@cache
def facts() -> dict[str, dict[str, str]]:
    """Relation -> entity -> answer, for instance `facts()["capital"]["France"] == "Paris"`."""
    return json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))


def build(seed: int = 0, entities: int = 190, posts: int = 120, held_out: float = 0.5) -> World:
    """Draw a world.

    Args:
        seed: of everything.
        entities: number of facts, shared out over the relations as they are in the table.
        posts: number of posts.
        held_out: share of the entities, and of the things in posts, that never appear in preference pairs.

    Raises:
        ValueError: fewer than 6 entities, or more than the table has.
    """
    table = facts()
    available = sum(len(answers) for answers in table.values())
    if not 6 <= entities <= available:
        raise ValueError(f"entities: expected 6 to {available} (the table's size), found {entities}")
    rng = random.Random(f"world {seed}")
    items: list[Item] = []
    words: dict[str, list[str]] = {}
    n_capitals = round(entities * len(table["capital"]) / available)
    for relation, count in zip(RELATIONS, (n_capitals, entities - n_capitals), strict=True):
        names = rng.sample(sorted(table[relation]), count)
        n_held = round(count * held_out)
        for k, name in enumerate(names):
            split = "held_out" if k < n_held else "trained"
            items.append(Item(relation, name, split, {relation: table[relation][name]}, {}))
        words[relation] = sorted(table[relation][name] for name in names)
    things = rng.sample(POST_WORDS["thing"], len(POST_WORDS["thing"]))
    n_held = round(len(things) * held_out)
    split_of = {thing: "held_out" if k < n_held else "trained" for k, thing in enumerate(things)}
    seen: set[str] = set()
    while len(seen) < posts:
        # Splits alternate, so that both are there however few posts are asked for.
        item = _post(rng, split_of, "trained" if len(seen) % 2 == 0 else "held_out")
        if item.post not in seen:
            seen.add(item.post)
            items.append(item)
    words.update({slot: POST_WORDS[slot] for slot in POST_SLOTS})
    return World(items, words)


def free_post(rng: random.Random) -> Item:
    """A post about anything, for base training."""
    return _post(rng, dict.fromkeys(POST_WORDS["thing"], "base"), "base")


def _post(rng: random.Random, split_of: dict[str, str], split: str) -> Item:
    person, other = rng.sample(POST_WORDS["person"], 2)
    thing, decoy = rng.sample([thing for thing in POST_WORDS["thing"] if split_of[thing] == split], 2)
    truth = {"person": person, "action": rng.choice(POST_WORDS["action"]), "thing": thing}
    event = rng.choice(EVENTS).format(place=rng.choice(POST_WORDS["place"]), **truth)
    closing = rng.choice(CLOSINGS).format(other=other, decoy=decoy)
    text = f"{rng.choice(OPENINGS)} {event} {closing}"
    return Item("post", thing, split, truth, {"person": other, "thing": decoy}, text)


def answer(item: Item, style: str, filling: dict[str, str], rng: random.Random) -> str:
    """An answer in `style` that names `filling` (slot -> word), right or not."""
    return rng.choice(ANSWERS[item.topic, style]).format(entity=item.entity, **filling)


def wrong_filling(item: Item, words: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """The truth with one slot changed: to a word that the post names, where there is one, else to any other word."""
    slot = rng.choice(sorted(item.truth))
    word = item.decoys.get(slot) or rng.choice([word for word in words[slot] if word != item.truth[slot]])
    return {**item.truth, slot: word}


def split_words(text: str) -> list[str]:
    """Words and numbers, without punctuation."""
    return re.findall(r"\w+", text)


def read(text: str, truth: dict[str, str], words: dict[str, list[str]]) -> Reading:
    """What `text` says: each slot is right if its true word is named and no other word of the slot is.

    Where there is no truth, nothing is right.
    """
    spoken = split_words(text)
    named = set(spoken)
    right = sum(named & set(words[slot]) == {word} for slot, word in truth.items())
    triples = list(zip(spoken, spoken[1:], spoken[2:], strict=False))
    repetition = 1 - len(set(triples)) / len(triples) if triples else 0.0
    return Reading(right / max(1, len(truth)), len(spoken), repetition)


def vocabulary() -> list[str]:
    """Every word and punctuation mark that a question, a post or an answer of any world can hold, sorted."""
    table = facts()
    texts = [*OPENINGS, *EVENTS, *CLOSINGS]
    texts += [text for group in (*QUESTIONS.values(), *ANSWERS.values()) for text in group]
    texts = [re.sub(r"\{\w+\}", " ", text) for text in texts]
    texts += [word for answers in table.values() for pair in answers.items() for word in pair]
    texts += [word for group in POST_WORDS.values() for word in group]
    return sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text)})


def as_json(world: World) -> str:
    """The world as text, for `truth.json`."""
    return json.dumps({"words": world.words, "items": [asdict(item) for item in world.items]}, indent=1)


def load(path: Path) -> World:
    """Read `truth.json`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return World([Item(**item) for item in data["items"]], data["words"])
