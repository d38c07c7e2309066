"""Generate minimal pairs of English sentences from a small grammar: one acceptable, one that breaks a single rule."""

import random

NOUNS = {"boy": "boys", "girl": "girls", "teacher": "teachers", "doctor": "doctors", "farmer": "farmers"}
THINGS = {"book": "books", "letter": "letters", "picture": "pictures", "chair": "chairs", "key": "keys"}
INTRANSITIVE = [  # present singular, present plural, past
    ("sleeps", "sleep", "slept"),
    ("arrives", "arrive", "arrived"),
    ("waits", "wait", "waited"),
    ("smiles", "smile", "smiled"),
]
TRANSITIVE = [  # base, past, participle
    ("take", "took", "taken"),
    ("choose", "chose", "chosen"),
    ("break", "broke", "broken"),
    ("steal", "stole", "stolen"),
]
REFLEXIVE = [("admires", "admire"), ("blames", "blame"), ("describes", "describe")]
KNOW = ["know", "remember", "forget"]
REFLEXIVE_OF = {"boy": "himself", "girl": "herself"}
ADJECTIVES = ["old", "young", "tall", "famous", "quiet", "angry", "happy", "clever"]
PLACES = ["near the river", "behind the house", "in the garden", "beside the road", "at the station"]
ADVERBS = ["today", "every day", "again", "quickly", "in the morning", "without a word"]
SINGULAR_DETERMINERS, PLURAL_DETERMINERS = ["this", "that", "every"], ["these", "those", "many"]

Pair = tuple[str, str]  # acceptable sentence, sentence with one rule broken


def _person(rng: random.Random, plural: bool) -> str:
    """A noun phrase for people, sometimes with an adjective, sometimes with a place."""
    noun = rng.choice(list(NOUNS))
    words = ["the", rng.choice(ADJECTIVES) if rng.random() < 0.4 else "", NOUNS[noun] if plural else noun]
    return " ".join(filter(None, [*words, rng.choice(PLACES) if rng.random() < 0.3 else ""]))


def _thing(rng: random.Random) -> str:
    return f"the {rng.choice([*THINGS, *THINGS.values()])}"


def agreement(rng: random.Random) -> Pair:
    """A verb agrees with its subject in number, whatever comes between them."""
    plural, verb = rng.random() < 0.5, rng.choice(INTRANSITIVE)
    subject, rest = _person(rng, plural), rng.choice(ADVERBS)
    return f"{subject} {verb[plural]} {rest}", f"{subject} {verb[not plural]} {rest}"


def determiner(rng: random.Random) -> Pair:
    """A determiner agrees with its noun in number."""
    plural, noun = rng.random() < 0.5, rng.choice(list(THINGS))
    good = rng.choice(PLURAL_DETERMINERS if plural else SINGULAR_DETERMINERS)
    right, wrong = (THINGS[noun], noun) if plural else (noun, THINGS[noun])
    subject, verb = _person(rng, rng.random() < 0.5), rng.choice(TRANSITIVE)[1]
    return f"{subject} {verb} {good} {right}", f"{subject} {verb} {good} {wrong}"


def word_order(rng: random.Random) -> Pair:
    """Determiner, adjective and noun come in this order; the verb precedes its object."""
    subject = f"the {rng.choice(ADJECTIVES)} {rng.choice(list(NOUNS))}"
    verb, thing = rng.choice(TRANSITIVE)[1], _thing(rng)
    words = subject.split()
    wrong = rng.choice(
        [
            f"{words[0]} {words[2]} {words[1]} {verb} {thing}",
            f"{words[1]} {words[0]} {words[2]} {verb} {thing}",
            f"{subject} {thing} {verb}",
            f"{verb} {subject} {thing}",
        ]
    )
    return f"{subject} {verb} {thing}", wrong


def argument_structure(rng: random.Random) -> Pair:
    """A transitive verb takes an object; an intransitive verb takes none."""
    subject, thing = _person(rng, rng.random() < 0.5), _thing(rng)
    if rng.random() < 0.5:
        verb, rest = rng.choice(TRANSITIVE)[1], rng.choice(ADVERBS)
        return f"{subject} {verb} {thing} {rest}", f"{subject} {verb} {rest}"
    verb, rest = rng.choice(INTRANSITIVE)[2], rng.choice(ADVERBS)
    return f"{subject} {verb} {rest}", f"{subject} {verb} {thing} {rest}"


def reflexive(rng: random.Random) -> Pair:
    """A reflexive pronoun agrees with the subject in gender and number."""
    noun, plural, verb = rng.choice(list(REFLEXIVE_OF)), rng.random() < 0.4, rng.choice(REFLEXIVE)
    right = "themselves" if plural else REFLEXIVE_OF[noun]
    wrong = rng.choice([word for word in ("himself", "herself", "themselves") if word != right])
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.5 else ""
    start = f"the {rng.choice(ADJECTIVES)} {NOUNS[noun] if plural else noun}{place} {verb[plural]}"
    rest = rng.choice(ADVERBS)
    return f"{start} {right} {rest}", f"{start} {wrong} {rest}"


def wh_movement(rng: random.Random) -> Pair:
    """A fronted "what" leaves a gap in the object position."""
    subject, thing, (base, past, _) = _person(rng, False), _thing(rng), rng.choice(TRANSITIVE)
    if rng.random() < 0.5:
        return f"what did {subject} {base}", f"what did {subject} {base} {thing}"
    outer, verb = _person(rng, True), rng.choice(KNOW)
    return f"{outer} {verb} what {subject} {past}", f"{outer} {verb} what {subject} {past} {thing}"


def auxiliary(rng: random.Random) -> Pair:
    """An auxiliary determines the form of the verb after it."""
    plural, (base, past, participle) = rng.random() < 0.5, rng.choice(TRANSITIVE)
    subject, thing = _person(rng, plural), _thing(rng)
    helper, right = rng.choice([("will", base), ("must", base), ("have" if plural else "has", participle)])
    wrong = rng.choice([form for form in (base, past, participle) if form != right])
    return f"{subject} {helper} {right} {thing}", f"{subject} {helper} {wrong} {thing}"


def question(rng: random.Random) -> Pair:
    """In a question with "did", the auxiliary comes first and the verb is in its base form."""
    subject, (base, past, _) = _person(rng, rng.random() < 0.5), rng.choice(TRANSITIVE)
    thing = _thing(rng)
    wrong = rng.choice([f"did {subject} {past} {thing}", f"{subject} did {base} {thing} did"])
    return f"did {subject} {base} {thing}", wrong


RULES = (agreement, determiner, word_order, argument_structure, reflexive, wh_movement, auxiliary, question)
QUESTIONS = ("what did ", "did ")


def minimal_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Generate `count` tuples (acceptable sentence, unacceptable sentence, rule name), cycling through the rules.

    The same arguments give the same pairs. No sentence occurs twice.
    """
    rng = random.Random(seed)
    pairs, seen = [], set()
    while len(pairs) < count:
        rule = RULES[len(pairs) % len(RULES)]
        pair = rule(rng)
        if seen.isdisjoint(pair):
            seen.update(pair)
            end = "?" if pair[0].startswith(QUESTIONS) else "."
            good, bad = (sentence[0].upper() + sentence[1:] + end for sentence in pair)
            pairs.append((good, bad, rule.__name__))
    return pairs
