"""Inflection of the demo language: English spelling rules and the irregular forms its lexicon needs."""

from __future__ import annotations

VOWELS = "aeiou"

IRREGULAR_PLURALS = {
    "mouse": "mice", "goose": "geese", "calf": "calves", "loaf": "loaves", "knife": "knives", "child": "children",
    "deer": "deer", "trout": "trout", "salmon": "salmon", "herring": "herring", "mackerel": "mackerel", "carp": "carp",
    "fisherman": "fishermen", "seaman": "seamen", "coachman": "coachmen", "groundsman": "groundsmen",
    "herdsman": "herdsmen", "bowman": "bowmen", "horseman": "horsemen", "steersman": "steersmen", "kinsman": "kinsmen",
    "alderman": "aldermen", "townsman": "townsmen", "potato": "potatoes", "piano": "pianos", "fish": "fish",
}  # fmt: skip

IRREGULAR_PASTS = {
    "bear": ("bore", "borne"), "break": ("broke", "broken"), "hide": ("hid", "hidden"), "show": ("showed", "shown"),
    "find": ("found", "found"), "lose": ("lost", "lost"), "lend": ("lent", "lent"), "keep": ("kept", "kept"),
    "buy": ("bought", "bought"), "sell": ("sold", "sold"), "steal": ("stole", "stolen"), "choose": ("chose", "chosen"),
    "withhold": ("withheld", "withheld"), "forget": ("forgot", "forgotten"), "teach": ("taught", "taught"),
    "wed": ("wed", "wed"), "feed": ("fed", "fed"), "catch": ("caught", "caught"), "free": ("freed", "freed"),
    "eat": ("ate", "eaten"), "build": ("built", "built"), "leave": ("left", "left"), "shut": ("shut", "shut"),
    "rebuild": ("rebuilt", "rebuilt"), "read": ("read", "read"), "write": ("wrote", "written"),
    "send": ("sent", "sent"), "get": ("got", "got"), "hear": ("heard", "heard"), "strew": ("strewed", "strewn"),
    "overlook": ("overlooked", "overlooked"), "shine": ("shined", "shined"),
}  # fmt: skip

DOUBLING = frozenset(("drag", "drop", "expel", "forget", "get", "shut", "wed", "wrap", "unwrap"))


def plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def _suffixed(verb: str, suffix: str) -> str:
    if verb in DOUBLING:
        return verb + verb[-1] + suffix
    if suffix == "ed" and verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + suffix
    if verb.endswith("ee") and suffix == "ed":
        return verb + "d"
    return verb + suffix


def past(verb: str) -> str:
    return IRREGULAR_PASTS[verb][0] if verb in IRREGULAR_PASTS else _suffixed(verb, "ed")


def participle(verb: str) -> str:
    return IRREGULAR_PASTS[verb][1] if verb in IRREGULAR_PASTS else _suffixed(verb, "ed")


def article(word: str) -> str:
    """``a`` or ``an``, by spelling."""
    return "an" if word[0].lower() in VOWELS else "a"
