"""Short labelled reviews in plain English, written by a small grammar: a sentiment task that needs no download.

A bag of words can't solve it: every review has a mirror image in its split, with the same slots and the opposite label, and in
most templates the two consist of the same words. The other templates have one adjective: some affirm it, some negate it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Review:
    """One review.

    Args:
        text: one to three sentences.
        label: 0 negative, 1 positive.
        template: the sentence template that the text came from.
    """

    text: str
    label: int
    template: str


class Aspect(NamedTuple):
    """What a review judges, and the two adjectives for it. The article depends on an adjective's first letter."""

    noun: str
    good: str
    bad: str
    it: str = "it"


class Domain(NamedTuple):
    """The phrases for the place of a review's aspects, for another place, and for other people with an opinion (a plural)."""

    here: str
    elsewhere: str
    who: str


DOMAINS = {
    Domain("in this film", "in the director's previous film", "the critics"): (
        Aspect("plot", "gripping", "tedious"),
        Aspect("ending", "clever", "silly"),
        Aspect("script", "witty", "clumsy"),
        Aspect("lead actor", "convincing", "wooden", "he"),
        Aspect("soundtrack", "beautiful", "grating"),
    ),
    Domain("at this restaurant", "at the restaurant next door", "our neighbours"): (
        Aspect("soup", "tasty", "bland"),
        Aspect("waiter", "friendly", "rude", "he"),
        Aspect("kitchen", "spotless", "filthy"),
        Aspect("dessert", "delicious", "inedible"),
        Aspect("steak", "tender", "tough"),
    ),
    Domain("at this hotel", "at the hotel across the street", "the other guests"): (
        Aspect("room", "spotless", "filthy"),
        Aspect("bed", "comfortable", "lumpy"),
        Aspect("receptionist", "polite", "rude", "she"),
        Aspect("breakfast", "excellent", "awful"),
        Aspect("lobby", "elegant", "shabby"),
    ),
    Domain("in this novel", "in the author's previous novel", "the reviewers"): (
        Aspect("story", "absorbing", "boring"),
        Aspect("heroine", "charming", "irritating", "she"),
        Aspect("prologue", "witty", "stilted"),
        Aspect("last chapter", "moving", "ridiculous"),
        Aspect("first chapter", "exciting", "dull"),
    ),
    Domain("on this phone", "on my old phone", "my colleagues"): (
        Aspect("screen", "sharp", "blurry"),
        Aspect("battery", "reliable", "lousy"),
        Aspect("camera", "excellent", "terrible"),
        Aspect("speaker", "crisp", "tinny"),
        Aspect("menu", "intuitive", "confusing"),
    ),
    Domain("at this concert", "at last year's concert", "my friends"): (
        Aspect("singer", "brilliant", "dreadful", "she"),
        Aspect("opening song", "thrilling", "lifeless"),
        Aspect("drummer", "superb", "sloppy", "he"),
        Aspect("encore", "wonderful", "pathetic"),
        Aspect("light show", "dazzling", "dreary"),
    ),
    Domain("at this museum", "at the museum down the road", "the locals"): (
        Aspect("guide", "helpful", "grumpy", "he"),
        Aspect("main exhibition", "fascinating", "boring"),
        Aspect("audio tour", "informative", "pointless"),
        Aspect("gift shop", "lovely", "tacky"),
    ),
    Domain("on this flight", "on my previous flight", "the other passengers"): (
        Aspect("seat", "comfortable", "cramped"),
        Aspect("steward", "courteous", "surly", "he"),
        Aspect("meal", "delicious", "disgusting"),
        Aspect("cabin", "clean", "grubby"),
    ),
    Domain("in this course", "in last year's course", "the other students"): (
        Aspect("teacher", "inspiring", "incompetent", "she"),
        Aspect("textbook", "clear", "confusing"),
        Aspect("first lecture", "fascinating", "dull"),
        Aspect("final project", "rewarding", "pointless"),
    ),
    Domain("in this game", "in the first game of the series", "the fans"): (
        Aspect("story", "gripping", "tedious"),
        Aspect("tutorial", "helpful", "confusing"),
        Aspect("landscape", "gorgeous", "ugly"),
        Aspect("final level", "exciting", "monotonous"),
    ),
}

# {x} is the adjective that holds, {y} its opposite; {an_x} and {an_y} have the article. The other words must say which of the
# two holds and fit either as the good one: no "I was afraid that", no "fortunately". In "train", both {x} and {y} come after
# "was", "seemed" or "how" and before "one" or {noun}, so that pairs of words tell little either.
TEMPLATES = {
    "train": (
        # negation
        "Nobody could honestly say that the {noun} {here} was {y}. In a word, I found the {noun} {x}.",
        "I never once found the {noun} {here} {y}, whatever {who} may claim.",
        "There was nothing {y} about the {noun} {here}, nothing at all, and I did pay attention.",
        "The {noun} {here} was far from {y}, and I do not say that lightly.",
        "One could hardly call the {noun} {here} {y}, and I have given the matter some thought.",
        "It is simply not true that the {noun} {here} was {y}. If you ask me, {it} was {x}.",
        "Only a liar would call the {noun} {here} {y}, and I have told {who} so.",
        "The {noun} {here} was {x}, not {y}, and {who} had better believe it.",
        "No one can seriously deny that the {noun} {here} was {x}, not even {who}.",
        "It did not take me long to see that the {noun} {here} was {x}.",
        "You would not believe how {x} the {noun} {here} was, but it is the plain truth.",
        "I have never in my life come across such {an_x} {noun} as the one {here}.",
        # expectation reversed
        "I had expected {an_y} {noun} {here}, but {it} turned out to be {x}.",
        "I was sure that the {noun} {here} was {y}. I was wrong, for {it} proved to be {x}.",
        "I would have bet that the {noun} {here} was {y}, and I would have lost my money: {it} was {x}.",
        "Anyone who expects the {noun} {here} to be {y} is in for a surprise. Be ready for {an_x} {noun}.",
        # concession
        "Although {who} kept telling us that the {noun} was {y}, what we found {here} was {an_x} {noun}.",
        "Even though I thought at first that the {noun} {here} was {y}, in the end {it} proved to be {x}.",
        "We found {an_x} {noun} {here}, even though {it} had seemed {y} to us at first.",
        "While {who} may describe the {noun} {here} as {y}, {x} is the only word that I would use.",
        # what others said
        "Everyone had told me that the {noun} {here} was {y}. Everyone was wrong.",
        "I know that {who} call the {noun} {here} {y}, and I could not disagree more.",
        "I know that {who} call the {noun} {here} {x}, and after seeing for myself I can only agree.",
        "I had read about {an_x} {noun} {here}, and for once what I had read was true.",
        "My parents said that the {noun} {here} was {y}, but they see everything differently. To me, {it} seemed {x}.",
        "I found {an_x} {noun} {here}. My neighbour says that the {noun} was {y}, but that is nonsense.",
        # a competitor, or the past
        "The {noun} {elsewhere} was {y}. The {noun} {here} was {x}.",
        "There was {an_x} {noun} {here}, and I remembered how {y} the {noun} had been {elsewhere}.",
        "Unlike the {y} {noun} {elsewhere}, the one {here} was {x}.",
        "The {noun} {elsewhere} was {y}, which nobody could say of the one {here}.",
        "It was {here} that I found {an_x} {noun}. The {y} one was {elsewhere}.",
        "After {an_y} {noun} {elsewhere}, the {x} one {here} came as a complete surprise.",
    ),
    "validation": (
        "I would not describe the {noun} {here} as {y}, even if {who} do so all the time.",
        "Not for a second was the {noun} {here} {y}, and I paid close attention.",
        "We had prepared ourselves for {an_y} {noun}, yet what awaited us {here} was {an_x} one.",
        "Although there had been {an_y} {noun} {elsewhere}, the one {here} was {x}.",
        "Many people, {who} among them, insist that the {noun} {here} was {y}. They are mistaken, because {it} was {x}.",
        "For a while the {noun} {here} struck me as {y}, but my final verdict is that {it} was {x}.",
        "I can only confirm what {who} say, namely that the {noun} {here} was {x}.",
        "The {noun} {here} was {x}. If somebody tells you that {it} was {y}, do not believe a word.",
        "It was {elsewhere} that the {noun} was {y}, whereas {here} the {noun} was {x}.",
        "The {noun} {here} was {x}, no matter how often you hear from {who} that {it} was {y}.",
    ),
    "test": (
        "By no means was the {noun} {here} {y}, although that is what {who} had told me.",
        "It would be wrong to say that the {noun} {here} was {y}, since {it} was really {x}.",
        "Everything pointed to {an_y} {noun} {here}. Then came the surprise, for {it} was {x}.",
        "Despite all the talk of {an_y} {noun}, the one {here} was {x}.",
        "My cousin thought that the {noun} {here} was {y}, but I thought exactly the opposite.",
        "Where the {noun} {elsewhere} was {y}, the one {here} was {x}.",
        "The {noun} {here} was {x}, all the more so after the {y} one {elsewhere}.",
        "First impression {y}, final impression {x}: that sums up the {noun} {here}.",
        "There can be no doubt that the {noun} {here} was {x}, just as {who} had told us.",
        "The {noun} {here} was {x}, so I do not understand why {who} say that {it} was {y}.",
    ),
}
SIZES = {"train": 400, "validation": 100, "test": 100}


def write_reviews(seed: int = 0) -> dict[str, list[Review]]:
    """Writes the three splits. They share nouns and adjectives, but no template.

    Args:
        seed: which aspects each template is filled with, and the order.

    Returns:
        400 reviews for "train", 100 for "validation" and 100 for "test", half of each positive; all texts differ.

    Example:
        >>> reviews = write_reviews()
        >>> {split: len(part) for split, part in reviews.items()}
        {'train': 400, 'validation': 100, 'test': 100}
        >>> reviews["test"][0].text
        'By no means was the opening song at this concert thrilling, although that is what my friends had told me.'
        >>> reviews["test"][0].label
        0
    """
    rng = Random(seed)
    subjects = [(domain, aspect) for domain, aspects in DOMAINS.items() for aspect in aspects]
    reviews = {}
    for split, templates in TEMPLATES.items():
        pairs = SIZES[split] // 2
        fair, rest = divmod(pairs, len(templates))
        written = []
        for place, template in enumerate(shuffled(templates, rng)):  # the first `rest` of them get one pair more
            for domain, aspect in shuffled(subjects, rng)[: fair + (place < rest)]:
                written += [fill(template, domain, aspect, label) for label in (0, 1)]
        reviews[split] = shuffled(written, rng)
    return reviews


def fill(template: str, domain: Domain, aspect: Aspect, label: int) -> Review:
    """The review that a template makes of an aspect, with the adjectives placed for the label."""
    x, y = (aspect.good, aspect.bad) if label else (aspect.bad, aspect.good)
    an_x, an_y = (f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}" for adjective in (x, y))
    places = {"here": domain.here, "elsewhere": domain.elsewhere, "who": domain.who}
    text = template.format(noun=aspect.noun, it=aspect.it, x=x, y=y, an_x=an_x, an_y=an_y, **places)
    return Review(text, label, template)


def shuffled(values: Iterable[T], rng: Random) -> list[T]:
    """The values in a random order. Python promises the same numbers from every version for ``random()`` alone."""
    return sorted(values, key=lambda _: rng.random())
