"""Meanings and how they are said: a clause is a small frozen tree, and one tree has many sentences.

Saying the same clause twice, with another draw of synonyms and word order, is a paraphrase; changing one
concept is a different statement; dropping an adjunct is an entailment. The labelled tasks are built on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, TypeVar

from infra.demo.lexicon import NUMBERS, SEASONINGS, TIMES, Concept, Lexicon
from infra.demo.morphology import article, participle, past, plural, third_person

Item = TypeVar("Item")
Tense = Literal["past", "present", "future"]


@dataclass(frozen=True)
class NounPhrase:
    noun: Concept
    plural: bool = False
    determiner: Literal["the", "a", "number", "name"] = "the"
    number: str = "two"
    adjective: Concept | None = None
    relative: Clause | None = None
    """``the dog that chased the cat``: its subject is this noun."""


@dataclass(frozen=True)
class Clause:
    """Who does what to whom, when and where."""

    subject: NounPhrase
    verb: Concept
    object: NounPhrase | None = None
    tense: Tense = "past"
    negated: bool = False
    place: Concept | None = None
    time: str | None = None


def is_plural(phrase: NounPhrase) -> bool:
    return phrase.plural and phrase.determiner != "name"


def say_noun_phrase(phrase: NounPhrase, rng: Random, wrong_agreement: bool = False) -> list[str]:
    if phrase.determiner == "name":
        return [phrase.noun[0]]
    noun = rng.choice(phrase.noun)
    words = [rng.choice(phrase.adjective)] if phrase.adjective else []
    words.append(plural(noun) if phrase.plural else noun)
    if phrase.determiner == "a" and not phrase.plural:
        words.insert(0, article(words[0]))
    elif phrase.determiner == "number" and phrase.plural:
        words.insert(0, phrase.number)
    elif not (phrase.determiner == "a" and phrase.plural):
        words.insert(0, "the")
    if phrase.relative is not None:
        words += ["that", *say_predicate(phrase.relative, rng, wrong_agreement)]
    return words


def _be(clause_plural: bool, tense: Tense) -> list[str]:
    if tense == "future":
        return ["will", "be"]
    return [{"past": ("was", "were"), "present": ("is", "are")}[tense][clause_plural]]


def say_verb(verb: str, subject_plural: bool, tense: Tense, negated: bool, rng: Random) -> list[str]:
    """The finite verb group: ``did not chase``, ``will chase``, ``chases``, ``never chased``."""
    if tense == "future":
        return ["will", *(["not"] if negated else []), verb]
    if negated and rng.random() < 0.3:
        return ["never", *say_verb(verb, subject_plural, tense, False, rng)]
    if negated:
        auxiliary = "did" if tense == "past" else "do" if subject_plural else "does"
        return [auxiliary, "not", verb]
    if tense == "past":
        return [past(verb)]
    return [verb if subject_plural else third_person(verb)]


def say_predicate(clause: Clause, rng: Random, wrong_agreement: bool = False) -> list[str]:
    """Everything after the subject, adjuncts of time left out."""
    number = is_plural(clause.subject) != wrong_agreement
    words = say_verb(rng.choice(clause.verb), number, clause.tense, clause.negated, rng)
    if clause.object is not None:
        words += say_noun_phrase(clause.object, rng)
    if clause.place is not None:
        words += ["in", "the", rng.choice(clause.place)]
    return words


def say_passive(clause: Clause, rng: Random) -> list[str]:
    assert clause.object is not None
    copula = _be(is_plural(clause.object), clause.tense)
    words = [
        *say_noun_phrase(clause.object, rng),
        copula[0],
        *(["not"] if clause.negated else []),
        *copula[1:],
    ]
    words += [participle(rng.choice(clause.verb)), "by", *say_noun_phrase(clause.subject, rng)]
    if clause.place is not None:
        words += ["in", "the", rng.choice(clause.place)]
    return words


def say(clause: Clause, rng: Random, vary: bool = True, wrong_agreement: bool = False) -> list[str]:
    """The words of a clause, without capital or stop.

    ``vary`` draws passive voice and fronted time adjuncts too; synonyms are always drawn.
    """
    passive = vary and clause.object is not None and rng.random() < 0.25
    if passive and not wrong_agreement:
        words = say_passive(clause, rng)
    else:
        words = [*say_noun_phrase(clause.subject, rng), *say_predicate(clause, rng, wrong_agreement)]
    if clause.time:
        words = [clause.time, ",", *words] if vary and rng.random() < 0.4 else [*words, clause.time]
    return words


def sentence(words: list[str]) -> str:
    """``the dog barked`` -> ``The dog barked.``"""
    text = " ".join(words).replace(" ,", ",")
    return text[0].upper() + text[1:] + "."


VERB_OBJECTS = {
    "handle": ["tool", "garment", "vessel", "jewel", "vehicle", "document"],
    "trade": [
        "jewel",
        "garment",
        "food",
        "fruit",
        "vegetable",
        "animal",
        "vehicle",
        "tool",
        "flower",
        "tree",
    ],
    "tend": ["animal", "bird", "fish"],
    "eat": ["food", "fruit", "vegetable", "fish"],
    "build": ["building"],
    "read": ["document"],
    "play": ["instrument"],
}
"""Which things a group of verbs can be done to; what is left, ``meet``, is done to people."""


class Speaker:
    """Draws meanings from a lexicon, on the topic it is at; the same seed is the same language.

    The early words of a class are common and the late ones rare, as in any text.
    """

    def __init__(self, lexicon: Lexicon, rng: Random) -> None:
        self.lexicon = lexicon
        self.rng = rng
        self.change_topic()

    def change_topic(self) -> None:
        topic = self.rng.choice(sorted(self.lexicon.topics))
        self.people, self.things, self.places = self.lexicon.topics[topic]

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items, density falling as x^-2/3 along the sequence."""
        return items[int(len(items) * self.rng.random() ** 3)]

    def person(self) -> NounPhrase:
        if self.rng.random() < 0.1:
            return NounPhrase((self.pick(self.lexicon.persons),), determiner="name")
        return self.dressed(self.pick(self.lexicon.people[self.people]))

    def dressed(self, noun: Concept) -> NounPhrase:
        rng = self.rng
        draw = rng.random()
        many = draw < 0.35
        return NounPhrase(
            noun,
            plural=many,
            determiner="number" if many and rng.random() < 0.4 else "a" if rng.random() < 0.25 else "the",
            number=self.pick(NUMBERS),
            adjective=self.pick(self.lexicon.adjectives) if rng.random() < 0.25 else None,
        )

    def thing(self, kinds: Sequence[str]) -> NounPhrase:
        return self.dressed(self.pick(self.lexicon.things[self.rng.choice(kinds)]))

    def event(self, subject: NounPhrase | None = None, adjuncts: float = 0.4) -> Clause:
        """Somebody does something to something or someone that can have it done to."""
        rng = self.rng
        objects = {
            group: [kind for kind in kinds if kind in self.things] for group, kinds in VERB_OBJECTS.items()
        }
        group = rng.choice(["meet", *(group for group, kinds in objects.items() if kinds)])
        tense: Tense = rng.choice(("past", "past", "present", "future"))
        return Clause(
            subject or self.person(),
            self.pick(self.lexicon.actions[group]),
            self.person() if group == "meet" else self.thing(objects[group]),
            tense=tense,
            negated=rng.random() < 0.15,
            place=self.pick(self.places) if rng.random() < adjuncts else None,
            time=self.time(tense) if rng.random() < adjuncts else None,
        )

    def with_relative(self, phrase: NounPhrase) -> NounPhrase:
        """``the judge`` -> ``the judge that greeted the miners``."""
        if phrase.determiner == "name":
            return phrase
        inner = replace(
            self.event(phrase, adjuncts=0.0), negated=False, tense=self.rng.choice(("past", "present"))
        )
        return replace(phrase, relative=inner)

    def time(self, tense: Tense) -> str:
        return self.rng.choice(TIMES[tense])

    def opinion(self, work: Concept, good: bool, words: list[str], negate: float = 0.2) -> list[str]:
        """A sentence on a work that says it is good (or not), perhaps by denying the contrary."""
        rng, lexicon = self.rng, self.lexicon
        noun = rng.choice(work)
        seasoning = rng.choice(SEASONINGS)
        other = lexicon.negative if good else lexicon.positive
        draw = rng.random()
        if draw < negate:
            word = rng.choice(other)
            denial = rng.choice((["was", "not"], ["was", "never"], ["was", "hardly"]))
            return ["the", noun, *denial, *([seasoning] if rng.random() < 0.4 else []), word]
        word = rng.choice(words)
        if draw < 0.45:
            return ["the", noun, "was", *([seasoning] if rng.random() < 0.5 else []), word]
        if draw < 0.6:
            return ["it", "was", article(word), word, noun]
        if draw < 0.7:
            return ["what", article(word), word, noun]
        if draw < 0.85:
            verbs = lexicon.liking[0 if good else 1 :: 2]
            person = say_noun_phrase(self.person(), rng)
            return [*person, past(rng.choice(rng.choice(verbs))), "the", word, noun]
        return ["the", noun, "was", word, "and", rng.choice(words)]
