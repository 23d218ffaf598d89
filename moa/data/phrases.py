"""Who a caption speaks of: noun phrases of people with character offsets, by a lexicon.

Good enough for captions of photos ("a man in a hat and a smiling young woman"); needs no parser or download.
`moa.data.parser` finds the phrases by spaCy instead, and takes from here which words mean a person.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

SINGULAR = (
    "man", "woman", "person", "boy", "girl", "child", "kid", "baby", "toddler", "infant", "teenager", "lady",
    "guy", "gentleman", "male", "female", "bride", "groom", "player", "actor", "actress", "singer", "model",
    "soldier", "officer", "student", "teacher", "doctor", "nurse", "chef", "king", "queen", "prince",
    "princess",
)  # fmt: skip
PLURAL = {
    "men": "man", "women": "woman", "people": "person", "persons": "person", "children": "child",
    "ladies": "lady", "babies": "baby", "gentlemen": "gentleman", "actresses": "actress",
    "princesses": "princess",
} | {
    word + "s": word for word in SINGULAR
    if word not in ("man", "woman", "person", "child", "lady", "baby", "gentleman", "actress", "princess")
}  # fmt: skip
NUMERALS = {"two": 2, "a couple of": 2, "a pair of": 2, "both": 2, "three": 3, "four": 4}
_DETERMINERS = r"a|an|the|one|another|this|that"
_JOINING = (
    "of", "and", "or", "with", "in", "on", "at", "by", "to", "from", "for", "near", "next", "behind",
    "beside", "wearing", "holding", "who", "is", "are", "as", "while",
)  # fmt: skip
_NO_PEOPLE = ("man bun", "baby blue", "baby pink", "baby bump", "model car", "model train")
_WORDS = "|".join(SINGULAR)
_ADJECTIVE = rf"(?!(?:{'|'.join(_JOINING)}|{_DETERMINERS})\b)[a-z][a-z-]*"
# "a smiling young man", "man"; neither "a man's hat" nor "man bun", and of "a baby girl" the last word
_PERSON = re.compile(
    rf"\b(?P<determined>(?:{_DETERMINERS})\s+(?:{_ADJECTIVE}\s+){{0,3}}?)?(?<![\w-])"
    rf"(?!(?:{'|'.join(_NO_PEOPLE)})\b)(?P<word>{_WORDS})\b(?![-'’])(?!\s+(?:{_WORDS})\b)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(
    rf"\b(?P<number>{'|'.join(NUMERALS)})\s+(?P<adjectives>(?:{_ADJECTIVE}\s+){{0,3}}?)"
    rf"(?P<word>{'|'.join(PLURAL)})\b(?!['’])",
    re.IGNORECASE,
)
_PLURAL = re.compile(rf"(?<![\w-])(?:{'|'.join(PLURAL)})\b(?!['’])", re.IGNORECASE)


def lexicon_hash() -> str:
    """16 hexadecimal digits that change with the words and patterns above."""
    text = "\n".join(pattern.pattern for pattern in (_PERSON, _NUMBERED, _PLURAL))
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
    """The phrases but those that mean somebody who was named before, "the man" after "a man"."""
    kept: list[Phrase] = []
    for phrase in phrases:
        first = caption[phrase.start : phrase.end].split()[0].lower()
        known = {other.word.lower() for other in kept}
        if first not in ("the", "this", "that") or phrase.word.lower() not in known:
            kept.append(phrase)
    return kept


def expand_plurals(caption: str) -> str:
    """Name counted people one by one: "two young men" becomes "a young man and a young man"."""

    def one_by_one(match: re.Match[str]) -> str:
        noun = match["adjectives"] + PLURAL[match["word"].lower()]
        article = "an" if noun[0].lower() in "aeiou" else "a"
        return " and ".join([f"{article} {noun}"] * NUMERALS[match["number"].lower()])

    return _NUMBERED.sub(one_by_one, caption)


def find_plural(caption: str) -> str | None:
    """The first plural word for people, such as "people", if there is one."""
    match = _PLURAL.search(caption)
    return match[0] if match else None


def clause(caption: str, phrases: list[Phrase], index: int) -> str:
    """What is said of one person: from the phrase up to the next one's, "a man in a blue hoodie, smiling"."""
    end = phrases[index + 1].start if index + 1 < len(phrases) else len(caption)
    return re.sub(r"[\s,;]+(and)?[\s,;]*$", "", caption[phrases[index].start : end])
