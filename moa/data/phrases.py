"""Who a caption speaks of: noun phrases of people with character offsets, by a lexicon.

Good enough for captions of photos ("a man in a hat and a smiling young woman"); needs no parser or download.
`moa.data.parser` finds the phrases by spaCy instead, and takes from here which words mean a person.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SINGULAR = (
    # by age and sex
    "man", "woman", "person", "boy", "girl", "child", "kid", "baby", "toddler", "infant", "newborn",
    "teenager", "teen", "youngster", "adult", "lady", "gal", "guy", "dude", "lad", "gentleman", "male",
    "female",
    # by kin and company
    "mother", "father", "mom", "mum", "mommy", "dad", "daddy", "parent", "grandmother", "grandfather",
    "grandma", "grandpa", "granny", "grandparent", "grandson", "granddaughter", "grandchild", "son",
    "daughter", "brother", "sister", "sibling", "twin", "husband", "wife", "uncle", "aunt", "cousin",
    "friend", "boyfriend", "girlfriend", "bride", "groom", "bridesmaid", "groomsman",
    # by what they do
    "actor", "actress", "artist", "astronaut", "athlete", "barber", "bartender", "boxer", "businessman",
    "businesswoman", "cameraman", "celebrity", "cheerleader", "chef", "clown", "coach", "cosplayer",
    "cowboy", "cowgirl", "cyclist", "dancer", "doctor", "driver", "drummer", "entertainer", "farmer",
    "fighter", "firefighter", "fireman", "fisherman", "golfer", "graduate", "guitarist", "hiker",
    "journalist", "king", "lawyer", "mechanic", "model", "monk", "musician", "nun", "nurse", "officer",
    "painter", "paramedic", "performer", "photographer", "pianist", "pilot", "player", "policeman",
    "policewoman", "politician", "president", "priest", "prince", "princess", "professor", "queen",
    "rapper", "referee", "reporter", "rider", "runner", "sailor", "salesman", "saleswoman", "schoolboy",
    "schoolgirl", "scientist", "scout", "singer", "skateboarder", "skater", "skier", "snowboarder",
    "soldier", "student", "surfer", "surgeon", "swimmer", "teacher", "tourist", "violinist", "waiter",
    "waitress", "worker", "wrestler",
)  # fmt: skip


def _plural(word: str) -> str:
    """The regular plural of a word for a person, and that of man, woman, child and wife."""
    for ending, several in (("man", "men"), ("child", "children"), ("wife", "wives")):
        if word.endswith(ending):
            return word.removesuffix(ending) + several
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|ch|sh)$", word) else "s")


PLURAL = {_plural(word): word for word in SINGULAR} | {"people": "person", "couples": "couple"}
NUMERALS = {
    "two": 2, "2": 2, "a couple of": 2, "a pair of": 2, "a duo of": 2, "both": 2, "three": 3, "3": 3,
    "a trio of": 3, "four": 4, "4": 4,
}  # fmt: skip
_POSSESSIVES = "his|her|their|my|our"
_DETERMINERS = rf"a|an|the|one|another|this|that|{_POSSESSIVES}"
_JOINING = (
    "of", "and", "or", "with", "in", "on", "at", "by", "to", "from", "for", "near", "next", "behind",
    "beside", "wearing", "holding", "who", "is", "are", "as", "while",
)  # fmt: skip
# After any of these words for people they mean no person: "king size bed", "a chef hat", "a baby elephant"
_THINGS = (
    "bag", "bed", "bib", "blanket", "boots", "bottle", "cap", "car", "card", "carriage", "carrier",
    "chair", "clothes", "clothing", "coat", "costume", "costumes", "crib", "crown", "doll", "dress",
    "food", "glasses", "gown", "hat", "helmet", "house", "jacket", "jeans", "jersey", "jet", "mask",
    "outfit", "piano", "plane", "seat", "shirt", "shoes", "shorts", "shower", "size", "sized", "statue",
    "stroller", "suit", "sunglasses", "sweater", "throne", "toy", "train", "uniform", "veil",
    "airplane", "aircraft", "boat", "ship", "animal", "bear", "bird", "cat", "cow", "deer", "dog",
    "duck", "elephant", "goat", "lamb", "lion", "monkey", "pig", "rabbit", "sheep", "tiger",
)  # fmt: skip
_NO_PEOPLE = (
    "man bun", "man made", "baby blue", "baby pink", "baby bump", "king kong", "king charles spaniel",
    "queen bee",
)  # fmt: skip
_NO_PEOPLE_AFTER = ("record player", "cd player", "dvd player", "music player", "mp3 player", "table runner")
# As often adjectives as nouns: "a male", but not "a male lion", whatever comes after
_ADJECTIVAL = ("male", "female", "adult", "teen", "newborn", "twin")
_WORDS = "|".join(SINGULAR)
_ADJECTIVE = rf"(?!(?:{'|'.join(_JOINING)}|{_DETERMINERS})\b)[a-z][a-z-]*"
# The end of a noun phrase: no further noun comes
_ENDS = rf"(?=\s*(?:$|[^\w\s'’-])|\s+(?:{'|'.join(_JOINING)}|\w+ing|\w+ed|sits|stands|poses|smiles|looks)\b)"
_NONE_AFTER = "".join(rf"(?!(?<=\b{before}\s){word}\b)" for before, word in map(str.split, _NO_PEOPLE_AFTER))
# "a smiling young man", "man"; neither "a man's hat" nor "man bun", and of "a baby girl" the last word
_PERSON = re.compile(
    rf"\b(?P<determined>(?:{_DETERMINERS})\s+(?:{_ADJECTIVE}\s+){{0,3}}?)?(?<![\w-])"
    rf"(?!(?:{'|'.join(_NO_PEOPLE)})\b){_NONE_AFTER}(?!(?:{'|'.join(_ADJECTIVAL)})\b(?!{_ENDS}))"
    rf"(?P<word>{_WORDS})\b(?![-'’])(?!\s+(?:{_WORDS}|{'|'.join(_THINGS)})\b)",
    re.IGNORECASE,
)
# "two young men", "the other three", "her two children", "a group of 3 women"; not "one or two men"
_NUMBERED = re.compile(
    rf"(?<![\w.,-])(?<!\bor )(?:an?\s+(?:{_ADJECTIVE}\s+)?(?:group|team|band)\s+of\s+)?"
    rf"(?P<before>(?:(?:the|these|those|all|other|another|{_POSSESSIVES})\s+)*)"
    rf"(?P<number>{'|'.join(NUMERALS)})\s+(?P<adjectives>(?:{_ADJECTIVE}\s+){{0,3}}?)"
    rf"(?P<word>{'|'.join(PLURAL)})\b(?!['’])",
    re.IGNORECASE,
)
# "a young couple", "couple"; not "a couple of dogs"
_COUPLE = re.compile(
    rf"(?:(?<![\w-])(?P<before>{_DETERMINERS})\s+|^)(?P<adjectives>(?:{_ADJECTIVE}\s+){{0,3}}?)couple\b"
    rf"{_ENDS}(?!\s+of\b)",
    re.IGNORECASE,
)
_PLURAL = re.compile(rf"(?<![\w-])(?:{'|'.join(PLURAL)}|couple(?!\s+of\b))\b(?!['’])", re.IGNORECASE)
# What somebody plays is nobody else: "a boy dressed as a king"
_PLAYED = re.compile(r"\b(?:dressed|disguised|posing|acting|made)(?:\s+up)?\s+(?:as|like)\s+$", re.IGNORECASE)
_DEFINITE = {"the", "this", "that", "these", "those", "all", "both"}
_OTHERS = {"other", "another", "second", "third", "fourth"}


def lexicon_hash() -> str:
    """16 hexadecimal digits that change with the words and patterns above."""
    patterns = (_PERSON, _NUMBERED, _COUPLE, _PLURAL, _PLAYED)
    text = "\n".join(pattern.pattern for pattern in patterns)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase that means one person; its head noun `word` ends where the phrase ends."""

    word: str  # as in the caption, "man"
    start: int  # first character of the phrase, "a young man"
    end: int  # just past its last character


def person_phrases(caption: str) -> list[Phrase]:
    """The people that a caption names, in its order; "the man" after "a man" is the same one again."""
    found = (Phrase(match["word"], match.start(), match.end()) for match in _PERSON.finditer(caption))
    return new_people(caption, found)


def new_people(caption: str, phrases: Iterable[Phrase]) -> list[Phrase]:
    """The phrases but those that mean somebody who was named before, "the man" after "a man", or is played.

    "The other man" is somebody else, the first time.
    """
    kept: list[Phrase] = []
    words: set[str] = set()
    texts: set[str] = set()
    for phrase in phrases:
        text = " ".join(caption[phrase.start : phrase.end].lower().split())
        first, *others = text.split()
        known = text in texts if _OTHERS & set(others) else phrase.word.lower() in words
        if (first in _DEFINITE and known) or _PLAYED.search(caption, 0, phrase.start):
            continue
        kept.append(phrase)
        words.add(phrase.word.lower())
        texts.add(text)
    return kept


def _spoken_of_before(match: re.Match[str], noun: str, before: Sequence[str]) -> bool:
    """Whether "the two men" are men, or "the couple" people, whom the caption has named already."""
    if not _DEFINITE & set(before) or _OTHERS & set(before):
        return False
    earlier = match.string[: match.start()]
    named = {phrase.word.lower() for phrase in person_phrases(earlier)}
    named |= {PLURAL.get(several[0].lower(), "person") for several in _PLURAL.finditer(earlier)}
    return noun in named or (noun == "person" and bool(named))


def _one_by_one(before: Sequence[str], noun: str, count: int) -> str:
    """ "A young man and a young man"; a possessive stays, "her child and her child"."""
    article = "an" if noun[0].lower() in "aeiou" else "a"
    whose = next((word for word in before if word in _POSSESSIVES.split("|")), article)
    return " and ".join([f"{whose} {noun}"] * count)


def expand_plurals(caption: str) -> str:
    """Name counted people one by one: "two young men" becomes "a young man and a young man".

    "A couple" is two persons. "The two men" after men were named are left as they are.
    """

    def numbered(match: re.Match[str]) -> str:
        number, noun = match["number"].lower(), PLURAL[match["word"].lower()]
        before = [*match["before"].lower().split(), number]
        if _spoken_of_before(match, noun, before):
            return match[0]
        return _one_by_one(before, match["adjectives"] + noun, NUMERALS[number])

    def couple(match: re.Match[str]) -> str:
        before = (match["before"] or "").lower().split()
        if _spoken_of_before(match, "person", before):
            return match[0]
        return _one_by_one(before, match["adjectives"] + "person", 2)

    return _COUPLE.sub(couple, _NUMBERED.sub(numbered, caption))


def find_plural(caption: str) -> str | None:
    """The first plural word for people, such as "people", if there is one."""
    match = _PLURAL.search(caption)
    return match[0] if match else None


def clause(caption: str, phrases: list[Phrase], index: int) -> str:
    """What is said of one person: from the phrase up to the next one's, "a man in a blue hoodie, smiling"."""
    end = phrases[index + 1].start if index + 1 < len(phrases) else len(caption)
    return re.sub(r"[\s,;]+(and)?[\s,;]*$", "", caption[phrases[index].start : end])
