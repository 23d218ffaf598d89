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
    ],
)
def test_counted_people_are_named_one_by_one(caption, expanded):
    """Two subjects on the one token "men" would be bound to the same word."""
    assert expand_plurals(caption) == expanded
    ends = [p.end for p in person_phrases(expanded)]
    assert len(ends) == len(set(ends))


def test_uncounted_people_are_noticed():
    assert find_plural("a group of people") == "people"
    assert find_plural("the women's shop for a man") is None


def test_a_clause_is_all_that_is_said_of_one_person():
    caption = "a man in a blue hoodie, smiling, and a woman in red, in front of hills"
    people = person_phrases(caption)
    assert clause(caption, people, 0) == "a man in a blue hoodie, smiling"
    assert clause(caption, people, 1) == "a woman in red, in front of hills"
