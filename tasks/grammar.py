"""Generate minimal pairs of English sentences: one acceptable, one that breaks a single rule."""

from random import Random

# With an "s", nouns are plural and verbs are singular.
NOUNS = ["boy", "girl", "teacher", "doctor", "farmer"]
OBJECTS = ["the book", "the letter", "the chair", "the books", "the letters", "the keys"]
INTRANSITIVE = {  # base: past
    "sleep": "slept",
    "arrive": "arrived",
    "wait": "waited",
    "smile": "smiled",
}
TRANSITIVE = ["took", "chose", "found", "brought"]
ADJECTIVES = ["old", "young", "tall", "famous", "quiet", "clever"]
ADVERBS = ["today", "every day", "again", "quickly", "without a word"]


def _with_s(word: str, needed: bool) -> str:
    return f"{word}s" if needed else word


def _person(rng: Random, plural: bool) -> str:
    """A noun phrase for people, sometimes with an adjective, sometimes near other people."""
    phrase = _with_s(rng.choice(NOUNS), plural)
    if rng.random() < 0.4:
        phrase = f"{rng.choice(ADJECTIVES)} {phrase}"
    if rng.random() < 0.4:
        phrase += f" near the {_with_s(rng.choice(NOUNS), rng.random() < 0.5)}"
    return f"the {phrase}"


def agreement(rng: Random) -> tuple[str, str]:
    """A verb agrees with its subject in number, whatever comes between them."""
    plural = rng.random() < 0.5
    verb = rng.choice(list(INTRANSITIVE))
    subject = _person(rng, plural)
    adverb = rng.choice(ADVERBS)
    return (
        f"{subject} {_with_s(verb, not plural)} {adverb}",
        f"{subject} {_with_s(verb, plural)} {adverb}",
    )


def word_order(rng: Random) -> tuple[str, str]:
    """Determiner, adjective and noun come in this order; the verb precedes its object."""
    adjective = rng.choice(ADJECTIVES)
    noun = rng.choice(NOUNS)
    verb = rng.choice(TRANSITIVE)
    thing = rng.choice(OBJECTS)
    adverb = rng.choice(ADVERBS)
    wrong_orders = [
        f"the {noun} {adjective} {verb} {thing} {adverb}",
        f"{adjective} the {noun} {verb} {thing} {adverb}",
        f"the {adjective} {noun} {thing} {verb} {adverb}",
    ]
    return f"the {adjective} {noun} {verb} {thing} {adverb}", rng.choice(wrong_orders)


def argument_structure(rng: Random) -> tuple[str, str]:
    """A transitive verb takes an object; an intransitive verb takes none."""
    subject = _person(rng, rng.random() < 0.5)
    transitive = rng.choice(TRANSITIVE)
    intransitive = rng.choice(list(INTRANSITIVE.values()))
    thing = rng.choice(OBJECTS)
    adverb = rng.choice(ADVERBS)
    if rng.random() < 0.5:
        return f"{subject} {transitive} {thing} {adverb}", f"{subject} {transitive} {adverb}"
    return f"{subject} {intransitive} {adverb}", f"{subject} {intransitive} {thing} {adverb}"


RULES = [agreement, word_order, argument_structure]


def minimal_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """`count` tuples (acceptable sentence, unacceptable sentence, rule name).

    No sentence occurs twice. The same arguments give the same pairs.
    """
    rng = Random(seed)
    pairs = []
    seen = set()
    while len(pairs) < count:
        rule = RULES[len(pairs) % len(RULES)]
        good, bad = rule(rng)
        if good in seen or bad in seen:
            continue
        seen |= {good, bad}
        pairs.append((f"{good.capitalize()}.", f"{bad.capitalize()}.", rule.__name__))
    return pairs
