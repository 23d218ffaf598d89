"""Noun phrases by spaCy: its own chunks on trees that the test sets, and a trained parser's where it is."""

from __future__ import annotations

import sys

import pytest

from moa.data import parser
from moa.data.errors import DataError
from moa.data.parser import Lexicon, Parser, finder
from moa.data.phrases import person_phrases

MISSING = "spaCy is not installed: `pip install spacy`"
# caption: part of speech, dependency and head (from 0) of each token, as a grammarian would have it
TREES = {
    "a man": "DET/det/1 NOUN/ROOT/1",
    "a football player in a man's shirt": (
        "DET/det/2 NOUN/compound/2 NOUN/ROOT/2 ADP/prep/2 DET/det/5 NOUN/poss/7 PART/case/5 NOUN/pobj/3"
    ),
    "a smiling young woman and the old man holding a baby blue hat": (
        "DET/det/3 VERB/amod/3 ADJ/amod/3 NOUN/ROOT/3 CCONJ/cc/3 DET/det/7 ADJ/amod/7 NOUN/conj/3 VERB/acl/7"
        " DET/det/12 NOUN/compound/12 ADJ/amod/12 NOUN/dobj/8"
    ),
    "a boy sits, the boy smiles": (
        "DET/det/1 NOUN/nsubj/2 VERB/ccomp/6 PUNCT/punct/6 DET/det/5 NOUN/nsubj/6 VERB/ROOT/6"
    ),
    "mountains": "NOUN/ROOT/0",
}


def annotate(doc):
    """Write the tree of a caption into its tokens; captions without one stay as they are."""
    tree = TREES.get(doc.text, "").split()
    assert len(tree) in (0, len(doc)), [token.text for token in doc]
    for token, part in zip(doc, tree, strict=False):
        token.pos_, token.dep_, head = part.split("/")
        token.head = doc[int(head)]
    return doc


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    """A pipeline in a folder, whose parser is `annotate`."""
    spacy = pytest.importorskip("spacy", reason=MISSING)
    if not spacy.Language.has_factory("grammarian"):
        spacy.Language.component("grammarian", func=annotate)
    nlp = spacy.blank("en", meta={"name": "grammar", "version": "1.2.3"})
    nlp.add_pipe("grammarian")
    folder = tmp_path_factory.mktemp("pipeline")
    nlp.to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("a man", ["a man"]),
        ("a football player in a man's shirt", ["a football player"]),
        (
            "a smiling young woman and the old man holding a baby blue hat",
            ["a smiling young woman", "the old man"],
        ),
        ("a boy sits, the boy smiles", ["a boy"]),
        ("mountains", []),
    ],
)
def test_people_are_the_heads_of_noun_chunks(pipeline, caption, people):
    found = Parser(pipeline)(caption)
    assert [caption[p.start : p.end] for p in found] == people
    assert all(caption[p.end - len(p.word) : p.end] == p.word for p in found)


def test_the_tree_decides_not_the_words(pipeline, monkeypatch):
    """The same words with another head are another phrase: what is read is the parse."""
    caption = "a football player in a man's shirt"
    assert [p.word for p in Parser(pipeline)(caption)] == ["player"]
    wrong = TREES[caption].replace("NOUN/compound/2 NOUN/ROOT/2", "NOUN/ROOT/1 NOUN/dobj/1")
    monkeypatch.setitem(TREES, caption, wrong.replace("DET/det/2", "DET/det/1"))
    found = Parser(pipeline)(caption)
    assert [caption[p.start : p.end] for p in found] == ["player"]


def test_who_found_the_phrases_is_said(pipeline):
    spacy = pytest.importorskip("spacy", reason=MISSING)
    assert (Parser(pipeline).model, Parser(pipeline).revision) == (
        "en_grammar",
        f"1.2.3, spaCy {spacy.__version__}",
    )
    assert Lexicon().model == "lexicon" and Lexicon().revision.startswith("sha256:")


def test_auto_takes_the_parser_where_it_is_and_the_lexicon_elsewhere(pipeline, monkeypatch):
    assert isinstance(finder("auto", pipeline), Parser)
    assert isinstance(finder("lexicon", pipeline), Lexicon)
    assert isinstance(finder("auto", "xx_not_installed"), Lexicon)
    assert isinstance(finder("spacy", pipeline), Parser)
    monkeypatch.setattr(parser, "find_spec", lambda name: None)
    assert isinstance(finder("auto", pipeline), Lexicon)


def test_a_parser_that_is_asked_for_and_not_there_is_an_error(pipeline, tmp_path, monkeypatch):
    import spacy

    with pytest.raises(
        DataError, match=r"data\.align\.spacy: 'xx_no' cannot be loaded .*spacy download xx_no"
    ):
        finder("spacy", "xx_no")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(DataError, match="has no parser"):
        finder("auto", str(tmp_path / "blank"))
    (tmp_path / "blank/meta.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        finder("auto", str(tmp_path / "blank"))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"spaCy is not installed .*pip install spacy"):
        finder("spacy", pipeline)


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("a man in a hat and a smiling young woman", ["a man", "a smiling young woman"]),
        ("a football player in a red jersey", ["a football player"]),
        ("a bald man with a beard, wearing a suit, and the woman next to him", ["a bald man", "the woman"]),
        ("a little girl with blonde hair smiling at the camera", ["a little girl"]),
        ("a woman with a man bun", ["a woman"]),
        ("close up of a woman's face", []),
    ],
)
def test_a_trained_parser_finds_people(caption, people):
    """Runs where spaCy's own small pipeline is installed, `python -m spacy download en_core_web_sm`."""
    if not parser.installed("en_core_web_sm"):
        pytest.skip("en_core_web_sm is not installed")
    assert [caption[p.start : p.end] for p in Parser("en_core_web_sm")(caption)] == people


def test_the_lexicon_s_finder_is_the_lexicon():
    caption = "a smiling young man and an old lady"
    assert Lexicon()(caption) == person_phrases(caption)
