"""Generate minimal pairs of English sentences: one acceptable, one that breaks a single rule."""

from random import Random

# With an "s", nouns are plural and verbs are singular.
NOUNS = ["boy", "girl", "teacher", "doctor", "farmer"]
THINGS = ["book", "letter", "picture", "chair", "key"]
OBJECTS = [f"the {thing}" for thing in THINGS] + [f"the {thing}s" for thing in THINGS]
INTRANSITIVE = {  # base: past
    "sleep": "slept",
    "arrive": "arrived",
    "wait": "waited",
    "smile": "smiled",
}
TRANSITIVE = [  # base, past, participle
    ("take", "took", "taken"),
    ("choose", "chose", "chosen"),
    ("break", "broke", "broken"),
    ("steal", "stole", "stolen"),
]
REFLEXIVE_VERBS = ["admire", "blame", "describe"]
REFLEXIVE_OF = {"boy": "himself", "girl": "herself"}
KNOWING_VERBS = ["know", "remember", "forget"]
ADJECTIVES = ["old", "young", "tall", "famous", "quiet", "angry", "happy", "clever"]
PLACES = [
    "near the river",
    "behind the house",
    "in the garden",
    "beside the road",
    "at the station",
]
ADVERBS = ["today", "every day", "again", "quickly", "in the morning", "without a word"]
SINGULAR_DETERMINERS = ["this", "that", "every"]
PLURAL_DETERMINERS = ["these", "those", "many"]

Pair = tuple[str, str]  # the acceptable sentence, the unacceptable one


def _with_s(word: str, needed: bool) -> str:
    return f"{word}s" if needed else word


def _person(rng: Random, plural: bool) -> str:
    """A noun phrase for people, sometimes with an adjective, sometimes with a place."""
    phrase = _with_s(rng.choice(NOUNS), plural)
    if rng.random() < 0.4:
        phrase = f"{rng.choice(ADJECTIVES)} {phrase}"
    if rng.random() < 0.3:
        phrase = f"{phrase} {rng.choice(PLACES)}"
    return f"the {phrase}"


def agreement(rng: Random) -> Pair:
    """A verb agrees with its subject in number, whatever comes between them."""
    plural = rng.random() < 0.5
    verb = rng.choice(list(INTRANSITIVE))
    subject = _person(rng, plural)
    adverb = rng.choice(ADVERBS)
    return (
        f"{subject} {_with_s(verb, not plural)} {adverb}",
        f"{subject} {_with_s(verb, plural)} {adverb}",
    )


def determiner(rng: Random) -> Pair:
    """A determiner agrees with its noun in number."""
    plural = rng.random() < 0.5
    noun = rng.choice(THINGS)
    word = rng.choice(PLURAL_DETERMINERS if plural else SINGULAR_DETERMINERS)
    subject = _person(rng, rng.random() < 0.5)
    _, verb, _ = rng.choice(TRANSITIVE)
    start = f"{subject} {verb} {word}"
    return f"{start} {_with_s(noun, plural)}", f"{start} {_with_s(noun, not plural)}"


def word_order(rng: Random) -> Pair:
    """Determiner, adjective and noun come in this order; the verb precedes its object."""
    adjective = rng.choice(ADJECTIVES)
    noun = rng.choice(NOUNS)
    _, verb, _ = rng.choice(TRANSITIVE)
    thing = rng.choice(OBJECTS)
    wrong_orders = [
        f"the {noun} {adjective} {verb} {thing}",
        f"{adjective} the {noun} {verb} {thing}",
        f"the {adjective} {noun} {thing} {verb}",
        f"{verb} the {adjective} {noun} {thing}",
    ]
    return f"the {adjective} {noun} {verb} {thing}", rng.choice(wrong_orders)


def argument_structure(rng: Random) -> Pair:
    """A transitive verb takes an object; an intransitive verb takes none."""
    subject = _person(rng, rng.random() < 0.5)
    thing = rng.choice(OBJECTS)
    if rng.random() < 0.5:
        _, verb, _ = rng.choice(TRANSITIVE)
        adverb = rng.choice(ADVERBS)
        return f"{subject} {verb} {thing} {adverb}", f"{subject} {verb} {adverb}"
    verb = rng.choice(list(INTRANSITIVE.values()))
    adverb = rng.choice(ADVERBS)
    return f"{subject} {verb} {adverb}", f"{subject} {verb} {thing} {adverb}"


def reflexive(rng: Random) -> Pair:
    """A reflexive pronoun agrees with the subject in gender and number."""
    noun = rng.choice(list(REFLEXIVE_OF))
    plural = rng.random() < 0.4
    verb = rng.choice(REFLEXIVE_VERBS)
    pronouns = ["himself", "herself", "themselves"]
    right = "themselves" if plural else REFLEXIVE_OF[noun]
    pronouns.remove(right)
    wrong = rng.choice(pronouns)
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.5 else ""
    subject = f"the {rng.choice(ADJECTIVES)} {_with_s(noun, plural)}{place}"
    start = f"{subject} {_with_s(verb, not plural)}"
    adverb = rng.choice(ADVERBS)
    return f"{start} {right} {adverb}", f"{start} {wrong} {adverb}"


def wh_movement(rng: Random) -> Pair:
    """A fronted "what" leaves a gap in the object position."""
    subject = _person(rng, plural=False)
    thing = rng.choice(OBJECTS)
    base, past, _ = rng.choice(TRANSITIVE)
    if rng.random() < 0.5:
        right = f"what did {subject} {base}"
    else:
        right = f"{_person(rng, plural=True)} {rng.choice(KNOWING_VERBS)} what {subject} {past}"
    return right, f"{right} {thing}"


def auxiliary(rng: Random) -> Pair:
    """An auxiliary determines the form of the verb after it."""
    plural = rng.random() < 0.5
    forms = rng.choice(TRANSITIVE)
    base, _, participle = forms
    subject = _person(rng, plural)
    thing = rng.choice(OBJECTS)
    have = "have" if plural else "has"
    helper, right = rng.choice([("will", base), ("must", base), (have, participle)])
    wrong = rng.choice([form for form in forms if form != right])
    return f"{subject} {helper} {right} {thing}", f"{subject} {helper} {wrong} {thing}"


def question(rng: Random) -> Pair:
    """In a question with "did", the auxiliary comes first and the verb is in its base form."""
    subject = _person(rng, rng.random() < 0.5)
    base, past, _ = rng.choice(TRANSITIVE)
    thing = rng.choice(OBJECTS)
    wrong = rng.choice([f"did {subject} {past} {thing}", f"{subject} did {base} {thing} did"])
    return f"did {subject} {base} {thing}", wrong


RULES = [
    agreement,
    determiner,
    word_order,
    argument_structure,
    reflexive,
    wh_movement,
    auxiliary,
    question,
]


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
        end = "?" if good.startswith(("what did ", "did ")) else "."
        pairs.append((good.capitalize() + end, bad.capitalize() + end, rule.__name__))
    return pairs
