"""The noun phrases of people in a caption, by spaCy's parser or by the lexicon, and who found them.

Both know the same words for people (`moa.data.phrases.SINGULAR`). The parser sees what a noun phrase is
about: of "a football player in a man's shirt" the head is "player".
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from moa.data import phrases
from moa.data.errors import DataError
from moa.data.phrases import Phrase

Kind = Literal["auto", "spacy", "lexicon"]
_MODEL = pa.struct({"role": pa.string(), "model": pa.string(), "revision": pa.string()})
PHRASES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field(
            "phrases", pa.list_(pa.struct({"word": pa.string(), "start": pa.int32(), "end": pa.int32()}))
        ),
        pa.field("problem", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("revision", pa.string(), nullable=False),
        pa.field("models", pa.list_(_MODEL), nullable=False),
    ],
    metadata={"moa_schema": "phrases/2"},
)


class Finder(Protocol):
    """Finds the people of a caption, in its order."""

    model: str
    revision: str

    def __call__(self, caption: str) -> list[Phrase]: ...


class Lexicon:
    """`moa.data.phrases.person_phrases`; needs nothing else."""

    model = "lexicon"

    def __init__(self) -> None:
        self.revision = f"sha256:{phrases.lexicon_hash()}"

    def __call__(self, caption: str) -> list[Phrase]:
        return phrases.person_phrases(caption)


class Parser:
    """spaCy's noun chunks whose head is a word for a person. DataError if the pipeline has no parser."""

    def __init__(self, pipeline: str) -> None:
        """pipeline: an installed package, "en_core_web_sm", or a folder."""
        self.nlp, library = _load(pipeline)
        about = self.nlp.meta
        self.model = f"{about['lang']}_{about['name']}"
        self.revision = f"{about['version']}, spaCy {library}"
        if not self.nlp("a man").has_annotation("DEP"):
            raise DataError(
                f"data.align.spacy: {pipeline!r} has no parser; name one that has, as en_core_web_sm"
            )

    def __call__(self, caption: str) -> list[Phrase]:
        heads = ((chunk.start_char, chunk.root) for chunk in self.nlp(caption).noun_chunks)
        found = [Phrase(head.text, start, head.idx + len(head.text)) for start, head in heads]
        return phrases.new_people(caption, (p for p in found if p.word.lower() in phrases.SINGULAR))


def _load(pipeline: str) -> tuple[Any, str]:
    """A spaCy pipeline, and spaCy's version. Raises DataError with the cure."""
    try:
        import spacy

        return spacy.load(pipeline, exclude=["ner", "lemmatizer"]), spacy.__version__
    except ImportError as error:
        raise DataError(
            f"data.align.phrases: spaCy is not installed ({error}); `pip install spacy`, or use the lexicon"
        ) from error
    except Exception as error:  # a damaged pipeline makes spaCy raise anything
        raise DataError(
            f"data.align.spacy: {pipeline!r} cannot be loaded ({type(error).__name__}: {error}); "
            f"`python -m spacy download {pipeline}`, or set data.align.phrases to lexicon"
        ) from error


def installed(pipeline: str) -> bool:
    """Whether spaCy and this pipeline are here."""
    if find_spec("spacy") is None:
        return False
    from spacy.util import is_package

    return Path(pipeline).is_dir() or is_package(pipeline)


def finder(kind: Kind, pipeline: str) -> Finder:
    """Who finds the phrases; "auto": the parser if spaCy and the pipeline are installed, else the lexicon."""
    if kind == "lexicon" or (kind == "auto" and not installed(pipeline)):
        return Lexicon()
    return Parser(pipeline)
