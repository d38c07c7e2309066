"""Generate minimal pairs of English sentences from a small grammar: one acceptable, one that breaks a single rule."""

import random

# Nouns and regular verbs; with an "s" nouns are plural, and verbs singular.
NOUNS = ["boy", "girl", "teacher", "doctor", "farmer"]
THINGS = ["book", "letter", "picture", "chair", "key"]
OBJECTS = [f"the {thing}{ending}" for ending in ("", "s") for thing in THINGS]
INTRANSITIVE = {
    "sleep": "slept",
    "arrive": "arrived",
    "wait": "waited",
    "smile": "smiled",
}  # base: past
TRANSITIVE = [  # base, past, participle
    ("take", "took", "taken"),
    ("choose", "chose", "chosen"),
    ("break", "broke", "broken"),
    ("steal", "stole", "stolen"),
]
REFLEXIVE, KNOW = ["admire", "blame", "describe"], ["know", "remember", "forget"]
REFLEXIVE_OF = {"boy": "himself", "girl": "herself"}
ADJECTIVES = ["old", "young", "tall", "famous", "quiet", "angry", "happy", "clever"]
PLACES = [
    "near the river",
    "behind the house",
    "in the garden",
    "beside the road",
    "at the station",
]
ADVERBS = ["today", "every day", "again", "quickly", "in the morning", "without a word"]
SINGULAR_DETERMINERS, PLURAL_DETERMINERS = ["this", "that", "every"], ["these", "those", "many"]


def _person(rng: random.Random, plural: bool) -> str:
    """A noun phrase for people, sometimes with an adjective, sometimes with a place."""
    noun = rng.choice(NOUNS)
    adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.4 else ""
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.3 else ""
    return f"the {adjective}{noun}{'s' * plural}{place}"


def agreement(rng: random.Random) -> tuple[str, str]:
    """A verb agrees with its subject in number, whatever comes between them."""
    plural, verb = rng.random() < 0.5, rng.choice(list(INTRANSITIVE))
    subject, rest = _person(rng, plural), rng.choice(ADVERBS)
    return f"{subject} {verb}{'s' * (not plural)} {rest}", f"{subject} {verb}{'s' * plural} {rest}"


def determiner(rng: random.Random) -> tuple[str, str]:
    """A determiner agrees with its noun in number."""
    plural, noun = rng.random() < 0.5, rng.choice(THINGS)
    word = rng.choice(PLURAL_DETERMINERS if plural else SINGULAR_DETERMINERS)
    start = f"{_person(rng, rng.random() < 0.5)} {rng.choice(TRANSITIVE)[1]} {word} {noun}"
    return f"{start}{'s' * plural}", f"{start}{'s' * (not plural)}"


def word_order(rng: random.Random) -> tuple[str, str]:
    """Determiner, adjective and noun come in this order; the verb precedes its object."""
    adjective, noun, verb, thing = (
        rng.choice(ADJECTIVES),
        rng.choice(NOUNS),
        rng.choice(TRANSITIVE)[1],
        rng.choice(OBJECTS),
    )
    subject = f"the {adjective} {noun}"
    wrong_subjects = [
        f"the {noun} {adjective} {verb} {thing}",
        f"{adjective} the {noun} {verb} {thing}",
    ]
    wrong_verbs = [f"{subject} {thing} {verb}", f"{verb} {subject} {thing}"]
    return f"{subject} {verb} {thing}", rng.choice(wrong_subjects + wrong_verbs)


def argument_structure(rng: random.Random) -> tuple[str, str]:
    """A transitive verb takes an object; an intransitive verb takes none."""
    subject, thing = _person(rng, rng.random() < 0.5), rng.choice(OBJECTS)
    if rng.random() < 0.5:
        verb, rest = rng.choice(TRANSITIVE)[1], rng.choice(ADVERBS)
        return f"{subject} {verb} {thing} {rest}", f"{subject} {verb} {rest}"
    verb, rest = rng.choice(list(INTRANSITIVE.values())), rng.choice(ADVERBS)
    return f"{subject} {verb} {rest}", f"{subject} {verb} {thing} {rest}"


def reflexive(rng: random.Random) -> tuple[str, str]:
    """A reflexive pronoun agrees with the subject in gender and number."""
    noun, plural, verb = rng.choice(list(REFLEXIVE_OF)), rng.random() < 0.4, rng.choice(REFLEXIVE)
    right = "themselves" if plural else REFLEXIVE_OF[noun]
    wrong = rng.choice([word for word in ("himself", "herself", "themselves") if word != right])
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.5 else ""
    start = f"the {rng.choice(ADJECTIVES)} {noun}{'s' * plural}{place} {verb}{'s' * (not plural)}"
    rest = rng.choice(ADVERBS)
    return f"{start} {right} {rest}", f"{start} {wrong} {rest}"


def wh_movement(rng: random.Random) -> tuple[str, str]:
    """A fronted "what" leaves a gap in the object position."""
    subject, thing, (base, past, _) = (
        _person(rng, False),
        rng.choice(OBJECTS),
        rng.choice(TRANSITIVE),
    )
    if rng.random() < 0.5:
        return f"what did {subject} {base}", f"what did {subject} {base} {thing}"
    outer, verb = _person(rng, True), rng.choice(KNOW)
    return f"{outer} {verb} what {subject} {past}", f"{outer} {verb} what {subject} {past} {thing}"


def auxiliary(rng: random.Random) -> tuple[str, str]:
    """An auxiliary determines the form of the verb after it."""
    plural, (base, past, participle) = rng.random() < 0.5, rng.choice(TRANSITIVE)
    subject, thing = _person(rng, plural), rng.choice(OBJECTS)
    helper, right = rng.choice(
        [("will", base), ("must", base), ("have" if plural else "has", participle)]
    )
    wrong = rng.choice([form for form in (base, past, participle) if form != right])
    return f"{subject} {helper} {right} {thing}", f"{subject} {helper} {wrong} {thing}"


def question(rng: random.Random) -> tuple[str, str]:
    """In a question with "did", the auxiliary comes first and the verb is in its base form."""
    subject, (base, past, _), thing = (
        _person(rng, rng.random() < 0.5),
        rng.choice(TRANSITIVE),
        rng.choice(OBJECTS),
    )
    wrong = rng.choice([f"did {subject} {past} {thing}", f"{subject} did {base} {thing} did"])
    return f"did {subject} {base} {thing}", wrong


RULES = (
    agreement,
    determiner,
    word_order,
    argument_structure,
    reflexive,
    wh_movement,
    auxiliary,
    question,
)


def minimal_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """`count` tuples (acceptable sentence, unacceptable sentence, rule name), the same for the same arguments."""
    rng = random.Random(seed)
    pairs, seen = [], set()
    while len(pairs) < count:
        rule = RULES[len(pairs) % len(RULES)]
        pair = rule(rng)
        if seen.isdisjoint(pair):
            seen.update(pair)
            end = "?" if pair[0].startswith(("what did ", "did ")) else "."
            good, bad = (sentence[0].upper() + sentence[1:] + end for sentence in pair)
            pairs.append((good, bad, rule.__name__))
    return pairs
