"""The demo language's words: concepts (sets of synonyms), their classes, opposites and tone.

``a/b`` are synonyms, used interchangeably wherever the concept occurs; ``a~b`` are opposites.
Everything here was written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass

Concept = tuple[str, ...]
"""The base forms that name one meaning, e.g. ``("dog", "hound")``."""

KINDS = {
    "animal": "dog/hound cat horse/steed cow pig/hog goat fox wolf bear rabbit/hare mouse donkey/mule deer/stag "
    "badger otter squirrel lamb calf pony hedgehog weasel",
    "bird": "sparrow crow/raven hen goose duck owl eagle robin swan hawk/falcon pigeon/dove lark thrush heron magpie",
    "fish": "trout salmon herring pike eel carp perch mackerel",
    "tree": "oak elm pine/fir birch willow maple cedar ash beech poplar",
    "flower": "rose lily daisy tulip violet poppy orchid primrose marigold",
    "fruit": "apple pear plum cherry grape peach orange lemon fig melon",
    "vegetable": "carrot onion turnip bean cabbage potato leek radish parsnip",
    "tool": "hammer saw axe/hatchet shovel/spade rake drill chisel knife/blade needle ladder rope/cord bucket/pail "
    "lantern/lamp broom wrench",
    "vehicle": "cart/wagon boat/vessel train coach/carriage bicycle sled lorry/truck tram barge canoe",
    "instrument": "piano violin/fiddle flute drum harp trumpet/horn guitar cello organ whistle",
    "garment": "coat/jacket hat/cap scarf/shawl glove shirt/blouse boot/shoe belt cloak/cape apron gown/dress",
    "building": "house/dwelling barn/shed church/chapel tower/turret mill castle/fortress inn/tavern school library "
    "hospital/infirmary palace shop/store theatre station prison/jail cottage/cabin factory/plant",
    "vessel": "cup/mug bowl jug/pitcher bottle/flask plate/dish kettle/pot barrel/cask basket/hamper",
    "document": "letter/note book/volume map/chart poem song/tune story/tale diary/journal contract newspaper/gazette "
    "ticket portrait/picture",
    "jewel": "ring necklace pearl diamond ruby emerald brooch crown/diadem",
    "food": "loaf cake/tart pie/pasty biscuit sausage cheese/curd pudding pancake dumpling",
}

PEOPLE = {
    "worker": "farmer/peasant miller baker/confectioner smith/blacksmith carpenter/joiner weaver/spinner tailor cook/chef "
    "gardener/groundsman shepherd/herdsman builder/mason driver/coachman porter/carrier miner/collier fisherman/angler",
    "scholar": "teacher/tutor pupil/student doctor/physician nurse/matron judge/magistrate lawyer/solicitor clerk/scribe "
    "chemist/apothecary engineer/mechanic painter/artist poet/rhymer author/writer professor/lecturer",
    "soldier": "captain/commander guard/sentry sailor/seaman general/marshal sergeant archer/bowman rider/horseman "
    "pilot/steersman scout/spy",
    "relative": "mother/mama father/papa brother sister/sibling uncle aunt cousin/kinsman grandmother/granny daughter son",
    "noble": "king/monarch queen duke/earl prince princess baron/lord lady/dame knight",
    "townsman": "merchant/trader neighbour/villager stranger/foreigner thief/robber beggar/tramp widow traveller/wanderer "
    "child/kid singer/vocalist dancer/performer mayor/alderman landlord/innkeeper priest/vicar",
}

TOPICS = {
    "farm": (
        "worker",
        "animal vegetable tool",
        "garden/yard field/meadow stable/paddock orchard valley/dale",
    ),
    "sea": ("soldier", "fish vehicle vessel", "harbour/port shore/beach island/isle lake/pond river/stream"),
    "court": ("noble", "jewel garment flower", "courtyard desert/waste"),
    "town": ("townsman", "building document food", "market/fair street/lane square/plaza bridge"),
    "learning": ("scholar", "document instrument", "attic/loft village/hamlet"),
    "home": ("relative", "food fruit vessel", "kitchen cellar/vault"),
    "wild": ("worker", "bird tree", "forest/wood swamp/marsh mountain/peak hill/slope road/path"),
}
"""What a document is about: its people, its things, its places."""

PLACES = (
    "garden/yard forest/wood river/stream market/fair hill/slope harbour/port valley/dale field/meadow bridge kitchen "
    "village/hamlet street/lane square/plaza cellar/vault attic/loft lake/pond shore/beach road/path island/isle "
    "mountain/peak orchard stable/paddock courtyard desert/waste swamp/marsh"
)

# subject class, verb, object classes
ACTIONS = {
    "handle": "carry/bear push/shove~pull/drag lift/raise~lower/drop wash/clean~stain/soil repair/mend~break/smash "
    "paint/colour hide/conceal~show/display find/discover~lose/misplace borrow~lend polish/shine examine/inspect "
    "collect/gather~scatter/strew count/number store/keep~discard/dump measure/gauge wrap/cover~unwrap/uncover",
    "trade": "buy/purchase~sell/vend want/desire~refuse/reject steal/pilfer~return/restore order/request "
    "deliver/supply~withhold admire/praise~despise/scorn choose/select~ignore/overlook",
    "meet": "greet/welcome~dismiss/banish help/assist~hinder/hamper follow/pursue~avoid/evade trust/believe~doubt/distrust "
    "visit/call thank/bless~blame/accuse teach/instruct scold/rebuke~commend/applaud rescue/save~abandon/desert "
    "hire/employ~sack/expel warn/caution invite/summon question/query~answer remember/recall~forget "
    "marry/wed obey/heed~defy/resist amuse/entertain~bore/weary chase/hunt",
    "tend": "feed/nourish~starve guard/protect~attack/assault catch/seize~release/free watch/observe call/hail "
    "calm/soothe~frighten/scare brush/groom chase/hunt",
    "eat": "eat/devour cook/prepare slice/carve taste/sample serve/offer~clear season/salt",
    "build": "build/construct~demolish/wreck enter/invade~leave/vacate paint/colour own/possess visit/tour "
    "open/unlock~close/shut rent/lease rebuild/restore",
    "read": "read/study write/compose~erase/delete copy/transcribe send/post~receive/get burn/scorch sign/endorse hide/conceal",
    "play": "play/practise tune/adjust buy/purchase~sell/vend carry/bear repair/mend~break/smash hear",
}

NEUTRAL_ADJECTIVES = (
    "big/large~small/little hot/warm~cold/chilly old/ancient~new/modern long/lengthy~short/brief heavy/weighty~light/slight "
    "quick/rapid~slow/sluggish wide/broad~narrow/slim dark/dim~bright/radiant wet/damp~dry/arid rich/wealthy~poor/needy "
    "loud/noisy~quiet/silent empty/vacant~full/crowded young/youthful~aged/elderly thick/dense~thin/sparse "
    "sharp/keen~blunt/dull soft/tender~hard/stiff tall/lofty~low/squat deep/profound~shallow famous/renowned~obscure/unknown "
    "strong/sturdy~weak/feeble red/scarlet~green/verdant black/inky~white/pale foreign/alien~local/native round/circular~square/boxy"
)

POSITIVE = (
    "good wonderful delightful charming lovely pleasant splendid excellent brilliant graceful cheerful superb marvellous "
    "beautiful admirable enchanting joyful glorious magnificent touching witty elegant refreshing fascinating gentle "
    "thrilling satisfying inspiring honest heartwarming generous dazzling memorable radiant playful moving tasteful "
    "sparkling engaging clever wise masterful fresh tender warmhearted amusing noble polished vivid uplifting lively "
    "rewarding faultless exquisite sincere absorbing triumphant soothing captivating superlative kindly gifted blissful"
)

NEGATIVE = (
    "bad terrible dreadful awful horrible tedious boring dismal ugly clumsy miserable wretched nasty gloomy shabby dreary "
    "hideous pathetic foolish vulgar dull tiresome shameful lifeless bitter cruel stale grim hollow painful unpleasant "
    "annoying disgusting feeble joyless mediocre muddled offensive poisonous pointless repulsive ridiculous rotten "
    "senseless sloppy sour spiteful stupid tasteless vile vicious worthless crude appalling ghastly insulting lousy "
    "laughable bleak harsh depressing contemptible abysmal"
)

WORKS = (
    "play/drama film/movie concert/recital novel/romance dinner/supper party/feast speech/address journey/voyage show/pageant "
    "lesson/lecture performance/staging dance/ball painting/canvas festival/carnival sermon holiday/vacation opera ceremony/rite "
    "meal/banquet game/match exhibition story/tale song/tune poem picnic"
)

LIKING = "love/adore~hate/loathe enjoy/relish~dislike/detest praise/admire~condemn/mock"

TIMES = {
    "past": (
        "yesterday",
        "last week",
        "last night",
        "long ago",
        "last summer",
        "two days ago",
        "an hour ago",
    ),
    "present": ("every day", "nowadays", "these days", "every week", "each morning", "at present"),
    "future": ("tomorrow", "next week", "next month", "soon", "next summer", "one day"),
}

SEASONINGS = ("very", "quite", "rather", "truly", "so", "really")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")
SYLLABLES = "al an bar bel bran cor dan del dor el fen gar hal ist jor kel lin lor mar mel nor o per quin ros sal tam u ven wil yor zan"


def concepts(words: str) -> list[Concept]:
    """Every concept of a line of words, opposites each on their own."""
    return [tuple(one.split("/")) for pair in words.split() for one in pair.split("~")]


def opposites(words: str) -> dict[Concept, Concept]:
    found: dict[Concept, Concept] = {}
    for pair in words.split():
        if "~" in pair:
            left, right = (tuple(one.split("/")) for one in pair.split("~"))
            found[left], found[right] = right, left
    return found


@dataclass(frozen=True)
class Lexicon:
    """The parsed tables; concepts are equal where their words are."""

    things: dict[str, list[Concept]]
    people: dict[str, list[Concept]]
    places: list[Concept]
    topics: dict[str, tuple[str, list[str], list[Concept]]]
    actions: dict[str, list[Concept]]
    adjectives: list[Concept]
    works: list[Concept]
    liking: list[Concept]
    opposite: dict[Concept, Concept]
    positive: list[str]
    negative: list[str]
    persons: list[str]

    def kind_of(self, concept: Concept) -> str | None:
        """The class a concept belongs to (``dog`` -> ``animal``); None where it has none."""
        for kind, members in (*self.things.items(), *self.people.items()):
            if concept in members:
                return kind
        return None


def build_lexicon() -> Lexicon:
    actions = {group: concepts(words) for group, words in ACTIONS.items()}
    opposite: dict[Concept, Concept] = {}
    for words in (*ACTIONS.values(), NEUTRAL_ADJECTIVES, LIKING):
        opposite |= opposites(words)
    syllables = SYLLABLES.split()
    size = len(syllables)
    names = [
        (syllables[i] + syllables[(7 * i + 5 * j + 3) % size] + ("a", "us", "in", "y")[j % 4]).capitalize()
        for j in range(12)
        for i in range(size)
    ]
    return Lexicon(
        things={kind: concepts(words) for kind, words in KINDS.items()},
        people={kind: concepts(words) for kind, words in PEOPLE.items()},
        places=concepts(PLACES),
        topics={
            topic: (people, things.split(), concepts(places))
            for topic, (people, things, places) in TOPICS.items()
        },
        actions=actions,
        adjectives=concepts(NEUTRAL_ADJECTIVES),
        works=concepts(WORKS),
        liking=concepts(LIKING),
        opposite=opposite,
        positive=POSITIVE.split(),
        negative=NEGATIVE.split(),
        persons=sorted(set(names)),
    )
