"""Which people a caption names, and at which characters."""

from __future__ import annotations

import numpy as np
import pytest

from moa.data.phrases import clause, expand_plurals, find_plural, person_phrases
from moa.miniature.captions import task_caption, web_caption
from moa.miniature.world import identities, sample_scene


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a man in a hat", ["a man"]),
        ("a smiling young man and an old lady", ["a smiling young man", "an old lady"]),
        ("Woman with a child", ["Woman", "a child"]),
        ("a photo of a boy on the beach", ["a boy"]),
        ("a baby girl in a baby blue dress", ["a baby girl"]),
        ("a man and another man", ["a man", "another man"]),
        ("a man sits, the man smiles", ["a man"]),
        ("a woman with a man bun", ["a woman"]),
        ("a man's hat on a snowman", []),
        ("a man and the other man", ["a man", "the other man"]),
        ("a man, the other man, and the other man again", ["a man", "the other man"]),
        ("a boy and the second boy", ["a boy", "the second boy"]),
        ("a cat on a king size bed", []),
        ("a queen-sized bed, a model airplane and a chef hat", []),
        ("a woman in a nurse uniform", ["a woman"]),
        ("a boy dressed up as a king", ["a boy"]),
        ("a man as well as a woman", ["a man", "a woman"]),
        ("a record player beside a piano player", ["a piano player"]),
        ("a male lion and a baby elephant", []),
        ("a smiling male, a female in red", ["a smiling male", "a female"]),
        ("an adult man and a teen girl", ["an adult man", "a teen girl"]),
        ("a father and his son", ["a father", "his son"]),
        ("a mother kissing her newborn baby", ["a mother", "her newborn baby"]),
        ("a policeman, a policewoman and a firefighter", ["a policeman", "a policewoman", "a firefighter"]),
        ("bride and groom", ["bride", "groom"]),
        ("a male soccer player and a female soldier", ["a male soccer player", "a female soldier"]),
        ("grandpa with his granddaughter", ["grandpa", "his granddaughter"]),
        ("a mansion in Manchester, a chairman-like statue", []),
        ("mountains", []),
        ("", []),
    ],
)
def test_people_are_found_with_their_offsets(caption, phrases):
    found = person_phrases(caption)
    assert [caption[p.start : p.end] for p in found] == phrases
    assert all(caption[p.end - len(p.word) : p.end] == p.word for p in found)


def test_class_words_of_rendered_captions_are_found_exactly():
    """The reference: the renderer knows at which characters it named whom."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, identities("train"), 1 + seed % 2, prop=seed % 3 == 0)
        for caption in (task_caption(scene, rng), web_caption(scene, rng)):
            found = person_phrases(caption.text)
            assert tuple((p.end - len(p.word), p.end) for p in found) == caption.spans, caption.text


@pytest.mark.parametrize(
    ("caption", "expanded"),
    [
        ("two men and a woman", "a man and a man and a woman"),
        ("two old women wearing hats", "an old woman and an old woman wearing hats"),
        ("a couple of kids", "a kid and a kid"),
        ("three people", "a person and a person and a person"),
        ("two cats", "two cats"),
        ("2 men", "a man and a man"),
        ("12 men, 1.2 women and twenty-two men", "12 men, 1.2 women and twenty-two men"),
        ("the two men", "a man and a man"),
        ("these 3 old ladies", "an old lady and an old lady and an old lady"),
        ("a man and the other two men", "a man and a man and a man"),
        ("a group of two young women", "a young woman and a young woman"),
        ("a woman with her two children", "a woman with her child and her child"),
        ("a trio of policemen", "a policeman and a policeman and a policeman"),
        ("two wives", "a wife and a wife"),
        ("a couple posing for a photo", "a person and a person posing for a photo"),
        ("an elderly couple", "an elderly person and an elderly person"),
        ("smiling couple on a beach", "a smiling person and a smiling person on a beach"),
        ("a couple of dogs", "a couple of dogs"),
        ("two couples", "a person and a person and a person and a person"),
    ],
)
def test_counted_people_are_named_one_by_one(caption, expanded):
    """Two subjects on the one token "men" would be bound to the same word."""
    assert expand_plurals(caption) == expanded
    ends = [p.end for p in person_phrases(expanded)]
    assert len(ends) == len(set(ends))


@pytest.mark.parametrize(
    "caption",
    [
        "two men sit, the two men smile",
        "a man and a man, both men in hats",
        "a man and a woman, the couple smiling",
        "one or two men",
    ],
)
def test_people_named_before_or_vaguely_are_not_counted_again(caption):
    """The caption stays, and so does its plural, for which the photo is rejected."""
    assert find_plural(expand_plurals(caption))
    assert len(person_phrases(expand_plurals(caption))) <= 2


@pytest.mark.parametrize(
    ("caption", "plural"),
    [
        ("a group of people", "people"),
        ("a man and his friends", "friends"),
        ("policewomen", "policewomen"),
        ("a happy couple", "couple"),
        ("a man with a couple of dogs", None),
        ("the women's shop for a man", None),
    ],
)
def test_uncounted_people_are_noticed(caption, plural):
    assert find_plural(caption) == plural


def test_a_clause_is_all_that_is_said_of_one_person():
    caption = "a man in a blue hoodie, smiling, and a woman in red, in front of hills"
    people = person_phrases(caption)
    assert clause(caption, people, 0) == "a man in a blue hoodie, smiling"
    assert clause(caption, people, 1) == "a woman in red, in front of hills"
