"""Running text of the demo language: documents with a place, a few people and a mood they keep.

Beside events and opinions a document restates (``in other words``), infers (``so``), contradicts
(``it is not true that``) and defines (``a dog is an animal``), so that what words mean to one another can be
learned from the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from infra.demo.grammar import VERB_OBJECTS, Clause, NounPhrase, Speaker, say, sentence
from infra.demo.lexicon import Concept, build_lexicon
from infra.demo.morphology import article, plural

RESTATEMENTS = ("in other words", "that is", "to say it again", "put differently")
INFERENCES = ("so", "therefore", "it follows that", "this means that")
DENIALS = ("it is not true that", "it is false that", "nobody can say that")


def changed(clause: Clause, speaker: Speaker, slot: str) -> Clause:
    """The clause with one of its concepts replaced by another of the same class: a different statement."""
    rng, lexicon = speaker.rng, speaker.lexicon
    if slot == "subject":
        return replace(clause, subject=another_person(clause.subject, speaker))
    if slot == "verb":
        if clause.verb in lexicon.opposite and rng.random() < 0.5:
            return replace(clause, verb=lexicon.opposite[clause.verb])
        verbs = next(verbs for verbs in lexicon.actions.values() if clause.verb in verbs)
        return replace(clause, verb=rng.choice([verb for verb in verbs if not set(verb) & set(clause.verb)]))
    if slot == "object":
        assert clause.object is not None
        if lexicon.kind_of(clause.object.noun) in lexicon.people or clause.object.determiner == "name":
            return replace(clause, object=another_person(clause.object, speaker))
        group = next(group for group, verbs in lexicon.actions.items() if clause.verb in verbs)
        kind = rng.choice(VERB_OBJECTS.get(group, ["tool"]))
        noun = rng.choice([concept for concept in lexicon.things[kind] if concept != clause.object.noun])
        return replace(clause, object=replace(clause.object, noun=noun))
    if slot == "place":
        return replace(clause, place=rng.choice([place for place in lexicon.places if place != clause.place]))
    assert slot == "time"
    times = {speaker.time(clause.tense) for _ in range(8)} - {clause.time}
    return replace(clause, time=rng.choice(sorted(times)))


def another_person(phrase: NounPhrase, speaker: Speaker) -> NounPhrase:
    stranger = Speaker(speaker.lexicon, speaker.rng)  # anyone, from any topic
    while (other := stranger.person()).noun == phrase.noun:
        stranger.change_topic()
    return other


def entailed(clause: Clause, speaker: Speaker) -> Clause:
    """Something weaker that must hold where the clause does: no adjuncts, sometimes the object's class."""
    weaker = replace(clause, place=None, time=None)
    if clause.object is not None and not clause.negated and speaker.rng.random() < 0.5:
        kind = speaker.lexicon.kind_of(clause.object.noun)
        if kind is not None:
            weaker = replace(weaker, object=NounPhrase((kind,), clause.object.plural, "a"))
    return weaker


def contradicted(clause: Clause, speaker: Speaker) -> Clause:
    """A statement that cannot hold together with the clause, or does not follow from it."""
    bare = replace(clause, place=None, time=None)
    draw = speaker.rng.random()
    if clause.verb in speaker.lexicon.opposite and draw < 0.5:
        return replace(bare, verb=speaker.lexicon.opposite[clause.verb])
    if draw < 0.75:
        return replace(bare, negated=not clause.negated)
    return changed(bare, speaker, "object")


def definition(speaker: Speaker) -> list[str]:
    rng, lexicon = speaker.rng, speaker.lexicon
    classes = {**lexicon.things, **lexicon.people}
    kind = rng.choice([*speaker.things, speaker.people])
    concept: Concept = rng.choice(classes[kind])
    word = rng.choice(concept)
    if rng.random() < 0.5:
        return [article(word), word, "is", article(kind), kind]
    return ["all", plural(word), "are", plural(kind)]


def fact(speaker: Speaker, people: list[NounPhrase], place: Concept) -> Clause:
    """An event of the document: its people, mostly at its place."""
    rng = speaker.rng
    clause = speaker.event(rng.choice(people), adjuncts=0.6)
    if clause.place is not None and rng.random() < 0.6:
        clause = replace(clause, place=place)
    if rng.random() < 0.15:
        clause = replace(clause, subject=speaker.with_relative(clause.subject), place=None)
    return clause


def settled(clause: Clause, rng: Random) -> Clause:
    """The clause with one word drawn for each of its concepts, to be said again in the same words."""

    def one(phrase: NounPhrase) -> NounPhrase:
        adjective = (rng.choice(phrase.adjective),) if phrase.adjective else None
        return replace(phrase, noun=(rng.choice(phrase.noun),), adjective=adjective)

    return replace(
        clause,
        subject=one(clause.subject),
        verb=(rng.choice(clause.verb),),
        object=one(clause.object) if clause.object else None,
        place=(rng.choice(clause.place),) if clause.place else None,
    )


def document(speaker: Speaker) -> str:
    """One document: two or three facts and a work, told, retold, weakened and denied, in one mood."""
    rng, lexicon = speaker.rng, speaker.lexicon
    speaker.change_topic()
    people = [speaker.person() for _ in range(2)]
    place, work, good = speaker.pick(speaker.places), speaker.pick(lexicon.works), rng.random() < 0.5
    tone = rng.sample(lexicon.positive if good else lexicon.negative, 8)
    sentences: list[str] = []
    for _ in range(rng.randint(2, 3)):
        clause = fact(speaker, people, place)
        told = settled(clause, rng) if rng.random() < 0.7 else clause
        turns = [
            say(told, rng),
            [rng.choice(RESTATEMENTS), ",", *say(told, rng)],
            [rng.choice(INFERENCES), *say(entailed(clause, speaker), rng)],
            [rng.choice(DENIALS), *say(contradicted(clause, speaker), rng)],
        ]
        sentences.append(sentence(turns[0]))
        sentences += [sentence(turn) for turn in rng.sample(turns[1:], 2)]
        if rng.random() < 0.3:
            sentences.append(sentence(definition(speaker)))
        sentences += [sentence(speaker.opinion(work, good, tone)) for _ in range(rng.randint(1, 2))]
    return " ".join(sentences)


def documents(seed: int, size: int) -> Iterator[str]:
    """Documents until ``size`` bytes are reached; a pure function of the seed."""
    speaker = Speaker(build_lexicon(), Random(seed))
    written = 0
    while written < size:
        text = document(speaker)
        written += len(text) + 1
        yield text
