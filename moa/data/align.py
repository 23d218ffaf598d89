"""Match the people a caption names with the people a segmenter found: the training records.

Entry point, called by `python -m moa align`:

    run(config, split, raw, captions, segments, records, rejected, phrases)      one shard of each

Every photo ends either as a record or as a rejected row with one of `REASONS` in
`moa.data.errors`; none is lost. `phrases` says of every photo whom its caption names, and who found that out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPProcessor

from moa.choose import greedy_pairs
from moa.data import phrases
from moa.data.annotators import load, revision
from moa.data.crops import middle_square
from moa.data.errors import BrokenImage, DataError, Rejected
from moa.data.parser import PHRASES, Finder, Kind, finder
from moa.data.phrases import Phrase
from moa.data.records import (
    CAPTION,
    RAW,
    RECORD,
    REJECTED,
    SEGMENT,
    Row,
    decode_image,
    decode_mask,
    encode_mask,
    read_rows,
    sha256,
    write_rows,
)
from moa.methods import ModelSource


@dataclass(frozen=True)
class AlignConfig:
    """Which photos become records, and how words find their people."""

    tokenizer: ModelSource  # of the text encoder that will read the captions
    tokenizer_subfolder: str = "tokenizer"  # "" if the tokenizer lies at the top of its folder
    phrases: Kind = (
        "auto"  # noun phrases by spaCy or the lexicon; auto: spaCy if it and `spacy` are installed
    )
    spacy: str = "en_core_web_sm"  # spaCy's pipeline: an installed package, or a folder
    matcher: Literal["label", "clip"] = "label"  # label: left to right; clip: CLIP score x label similarity
    clip: ModelSource | None = None  # CLIPModel with its processor, for `matcher: clip`
    label_model: ModelSource | None = (
        None  # sentence encoder that compares phrase and label; null: as strings
    )
    clip_text: Literal["phrase", "clause"] = "clause"  # judged against a segment: "a man", or all said of him
    extra_segments: Literal["reject", "ignore"] = (
        "reject"  # of a photo with more people than its caption names; ignore: CLIP finds the named ones
    )
    plurals: Literal["expand", "reject"] = "expand"  # "two men" becomes "a man and a man", or is rejected
    min_area: float = 0.02  # least share of the photo that a person must cover; smaller ones are not counted
    max_subjects: int = 4  # [FastComposer]
    max_rejected: float = 0.9  # largest share of rejected photos in a shard; beyond it, the source is rotten
    device: str = "cpu"  # that CLIP runs on; "cpu" with another matcher

    def __post_init__(self) -> None:
        if self.matcher != "clip":  # nothing else runs on a GPU, so none is to be asked for
            object.__setattr__(self, "device", "cpu")
        if self.matcher == "clip" and self.clip is None:
            raise ValueError("matcher 'clip' needs the key `clip`: name a CLIP model, or use matcher 'label'")
        if self.extra_segments == "ignore" and self.matcher != "clip":
            raise ValueError("extra_segments 'ignore' needs matcher 'clip': order does not tell who is named")
        if self.max_subjects < 1:
            raise ValueError(f"max_subjects must be at least 1, not {self.max_subjects}")
        for name in ("min_area", "max_rejected"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, not {getattr(self, name)}")


# --- Matching ---------------------------------------------------------------------------------------------


def one_to_one(scores: NDArray[Any]) -> list[int]:
    """For each phrase its segment, the best remaining pair first; equal scores go by order.

    `scores` is [P, S] with P <= S; DataError otherwise.
    """
    if scores.shape[0] > scores.shape[1]:
        raise DataError(f"{scores.shape[0]} phrases cannot have {scores.shape[1]} segments one to one")
    return [segment for _, segment in sorted(greedy_pairs(scores))]


def order_equals(matches: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Give people with the same text their segments from left to right: no score can tell them apart."""
    ordered = list(matches)
    for text in set(texts):
        places = [i for i, other in enumerate(texts) if other == text]
        for place, segment in zip(places, sorted(matches[i] for i in places), strict=True):
            ordered[place] = segment
    return ordered


def label_similarity(word: str, label: str) -> float:
    """1 if a word of the person lexicon meets the label "person", or word and label are equal; else 0."""
    return float(word.lower() == label.lower() or (label == "person" and word.lower() in phrases.SINGULAR))


Similarity = Callable[[Sequence[str], Sequence[Phrase], Sequence[str]], NDArray[Any]]


def same_strings(texts: Sequence[str], people: Sequence[Phrase], labels: Sequence[str]) -> NDArray[Any]:
    """`label_similarity` of each person's word and each label, [P, S]."""
    return np.array([[label_similarity(person.word, label) for label in labels] for person in people])


class SentenceSimilarity:
    """The cosine, moved to 0..1, between phrases and labels in a sentence encoder: means of last states."""

    def __init__(self, source: ModelSource) -> None:
        self.model = load(AutoModel, source, "data.align.label_model", dtype=torch.float32).eval()
        self.revision = revision(source, self.model)
        self.tokenizer = load(AutoTokenizer, source, "data.align.label_model")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [texts, channels]."""
        inputs = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        states, here = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * here).sum(1) / here.sum(1), dim=-1)

    def __call__(self, texts: Sequence[str], people: Sequence[Phrase], labels: Sequence[str]) -> NDArray[Any]:
        return ((1 + self.embed(texts) @ self.embed(labels).T) / 2).double().numpy()


Scorer = Callable[[Image.Image, Sequence[str], Sequence[Row]], NDArray[Any]]


def no_scores(photo: Image.Image, texts: Sequence[str], segments: Sequence[Row]) -> NDArray[Any]:
    """Equal scores [P, S]: label and order decide."""
    return np.ones((len(texts), len(segments)))


class ClipScorer:
    """CLIP's cosine, moved to 0..1, between what is said of a person and the photo cropped to a segment."""

    def __init__(self, source: ModelSource, device: str = "cpu") -> None:
        self.device = device
        self.model = load(CLIPModel, source, "clip_judge", dtype=torch.float32).to(device).eval()
        self.revision = revision(source, self.model)
        self.processor = load(CLIPProcessor, source, "clip_judge")

    @torch.inference_mode()
    def __call__(self, photo: Image.Image, texts: Sequence[str], segments: Sequence[Row]) -> NDArray[Any]:
        crops = [photo.crop(segment["bbox"]) for segment in segments]
        inputs = self.processor(
            text=list(texts), images=crops, return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        outputs = self.model(**inputs)
        text = torch.nn.functional.normalize(outputs.text_embeds, dim=-1)
        image = torch.nn.functional.normalize(outputs.image_embeds, dim=-1)
        return ((1 + text @ image.T) / 2).double().cpu().numpy()


def match(
    photo: Image.Image,
    caption: str,
    people: list[Phrase],
    segments: Sequence[Row],
    scorer: Scorer,
    whole: bool,
    similarity: Similarity = same_strings,
) -> list[Row]:
    """The segment of each phrase, in the caption's order; `segments` are given from left to right.

    `whole`: judge a person by all that is said of them, not by the phrase alone.
    """
    if len(people) == len(segments) == 1:  # nothing to decide; scores decide only, and are kept nowhere
        return list(segments)
    named = [caption[phrase.start : phrase.end] for phrase in people]
    texts = [phrases.clause(caption, people, i) for i in range(len(people))] if whole else named
    similar = similarity(named, people, [segment["label"] for segment in segments])
    scores = scorer(photo, texts, segments) * similar
    return [segments[index] for index in order_equals(one_to_one(scores), texts)]


# --- Checks -----------------------------------------------------------------------------------------------


def named_people(caption: str, plurals: str, find: Finder) -> tuple[str, list[Phrase]]:
    """The caption as it will be trained on, and the people it names. Raises Rejected."""
    text = phrases.expand_plurals(caption) if plurals == "expand" else caption
    plural = phrases.find_plural(text)
    if plural:
        raise Rejected("plural", f"{plural!r} in {caption!r}")
    people = find(text)
    if not people:
        raise Rejected("no_person_word", repr(caption))
    return text, people


def load_tokenizer(config: AlignConfig) -> Any:
    """The text encoder's tokenizer. Raises DataError if it cannot say which characters a token covers."""
    tokenizer = load(AutoTokenizer, config.tokenizer, "prior", subfolder=config.tokenizer_subfolder)
    if not tokenizer.is_fast:
        raise DataError(f"{tokenizer.name_or_path}: a fast tokenizer is needed, to find words in tokens")
    return tokenizer


def tokenizer_revision(tokenizer: Any) -> str:
    """A hash of what a fast tokenizer does; it has no weights, and its folder may hold a whole prior."""
    text = f"{tokenizer.model_max_length}\n{tokenizer.backend_tokenizer.to_str()}"
    return f"sha256:{sha256(text.encode())[:16]}"


def check_tokens(tokenizer: Any, caption: str, people: Sequence[Phrase]) -> None:
    """Raise Rejected if the text encoder would not see every person's word to its end."""
    encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded["input_ids"]) > tokenizer.model_max_length:
        count = len(encoded["input_ids"])
        raise Rejected("truncated", f"{count} tokens, of {tokenizer.model_max_length} at most: {caption!r}")
    ends = {end for start, end in encoded["offset_mapping"] if start < end}
    lost = [phrase.word for phrase in people if phrase.end not in ends]
    if lost:
        raise Rejected("truncated", f"no token ends with {lost} in {caption!r}")


def large_enough(segments: Sequence[Row], pixels: int, config: AlignConfig) -> list[Row]:
    """The segments that count, from left to right. Raises Rejected if there are none."""
    if not segments:
        raise Rejected("no_segment", "nobody found")
    large = [segment for segment in segments if segment["area"] >= config.min_area * pixels]
    if not large:
        areas = [segment["area"] for segment in segments]
        raise Rejected("too_small", f"areas {areas} of {pixels} pixels")
    return sorted(large, key=lambda segment: (segment["bbox"][0] + segment["bbox"][2], segment["segment_id"]))


def check_number(people: int, config: AlignConfig) -> None:
    """Raise Rejected if these are more subjects than a record may hold."""
    if people > config.max_subjects:
        raise Rejected("too_many", f"{people} people, {config.max_subjects} at most")


def check_visible(segments: Sequence[Row], ids: NDArray[Any]) -> None:
    """Raise Rejected if training, which sees the middle square of a photo, would see nothing of somebody."""
    seen = set(np.unique(middle_square(ids)).tolist())
    hidden = [segment["bbox"] for segment in segments if segment["segment_id"] not in seen]
    if hidden:
        raise Rejected("outside", f"boxes {hidden} in a photo of {ids.shape[1]} × {ids.shape[0]} pixels")


# --- Records ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligner:
    """What alignment needs for every photo."""

    config: AlignConfig
    tokenizer: Any
    find: Finder
    scorer: Scorer
    similarity: Similarity
    models: Sequence[Row]  # role, model and revision of those that decide, as `PHRASES` has them

    @classmethod
    def load(cls, config: AlignConfig) -> Aligner:
        """Load tokenizer and, if asked for, parser, CLIP and sentence encoder. Raises DataError."""
        tokenizer = load_tokenizer(config)
        used = [("tokenizer", config.tokenizer.id, tokenizer_revision(tokenizer))]
        scorer: Scorer = no_scores
        if config.matcher == "clip" and config.clip:
            scorer = ClipScorer(config.clip, config.device)
            used.append(("clip", config.clip.id, scorer.revision))
        similarity: Similarity = same_strings
        if config.label_model:
            similarity = SentenceSimilarity(config.label_model)
            used.append(("label_model", config.label_model.id, similarity.revision))
        models = [{"role": role, "model": name, "revision": which} for role, name, which in used]
        return cls(config, tokenizer, finder(config.phrases, config.spacy), scorer, similarity, models)

    def phrases(self, caption: Row) -> Row:
        """Whom a row of captions names: a row of `PHRASES`."""
        text: str | None = None
        people: list[Phrase] = []
        problem = caption["problem"]
        if not problem:
            try:
                text, people = named_people(caption["caption"], self.config.plurals, self.find)
            except Rejected as why:
                problem = str(why)
        return {
            "id": caption["id"],
            "caption": text,
            "phrases": [{"word": p.word, "start": p.start, "end": p.end} for p in people],
            "problem": problem,
            "model": self.find.model,
            "revision": self.find.revision,
            "models": self.models,
        }

    def __call__(self, split: str, raw: Row, caption: Row, found: Row, named: Row) -> Row:
        """The record of one photo. Raises Rejected."""
        for row in (caption, found, named):
            if row["problem"]:
                reason, _, detail = row["problem"].partition(": ")
                raise Rejected(reason, detail)
        text, people = named["caption"], [Phrase(**phrase) for phrase in named["phrases"]]
        check_tokens(self.tokenizer, text, people)
        ids = decode_mask(found["mask"])
        segments = large_enough(found["segments"], ids.size, self.config)
        extra = self.config.extra_segments == "ignore"
        check_number(len(people) if extra else len(segments), self.config)
        if len(people) > len(segments) or (len(people) < len(segments) and not extra):
            raise Rejected("count_mismatch", f"{len(people)} named, {len(segments)} found: {text!r}")
        try:
            photo = decode_image(raw["image"])
        except BrokenImage as error:
            raise Rejected("broken_image", str(error)) from error
        matched = match(
            photo, text, people, segments, self.scorer, self.config.clip_text == "clause", self.similarity
        )
        check_visible(matched, ids)
        return self._record(split, raw, caption, found, text, people, matched, ids)

    @staticmethod
    def _record(
        split: str,
        raw: Row,
        caption: Row,
        found: Row,
        text: str,
        people: Sequence[Phrase],
        matched: Sequence[Row],
        ids: NDArray[Any],
    ) -> Row:
        kept = np.where(np.isin(ids, [segment["segment_id"] for segment in matched]), ids, 0)
        subjects = [
            {
                "segment_id": segment["segment_id"],
                "word": phrase.word,
                "start": phrase.start,
                "end": phrase.end,
                "bbox": segment["bbox"],
                "label": segment["label"],
                "score": segment["score"],
            }
            for phrase, segment in zip(people, matched, strict=True)
        ]
        return {
            "id": raw["id"],
            "image": raw["image"],
            "width": ids.shape[1],
            "height": ids.shape[0],
            "caption": text,
            "segments": subjects,
            "mask": encode_mask(kept),
            "split": split,
            "source": raw["source"],
            "sha256": raw["sha256"],
            "caption_model": caption["model"],
            "caption_revision": caption["revision"],
            "segment_model": found["model"],
            "segment_revision": found["revision"],
        }


def by_id(rows: Sequence[Row], wanted: Sequence[str], path: str | Path) -> Mapping[str, Row]:
    """Rows by id. Raises DataError unless they are exactly the photos of the raw shard."""
    listed = {row["id"]: row for row in rows}
    if set(listed) != set(wanted) or len(listed) != len(rows):
        raise DataError(
            f"{path} is not about the photos of its raw shard; delete it and run the workflow again"
        )
    return listed


def check_rejected(
    raw: str | Path, photos: Sequence[Row], refused: Sequence[Row], config: AlignConfig
) -> None:
    """Raise DataError, with the counts, if more than `max_rejected` of a raw shard's photos was rejected."""
    if len(refused) > config.max_rejected * len(photos):
        counts = dict(Counter(row["reason"] for row in refused).most_common())
        raise DataError(
            f"{raw}: {len(refused)} of {len(photos)} photos were rejected {counts}, more than max_rejected "
            f"{config.max_rejected}; look at photos and annotators, or raise data.align.max_rejected"
        )


def run(
    config: AlignConfig,
    split: Literal["train", "validation"],
    raw: str | Path,
    captions: str | Path,
    segments: str | Path,
    records: str | Path,
    rejected: str | Path,
    phrases: str | Path,
) -> None:
    """Turn a shard of annotated photos into records, rejected rows, and a row of phrases for each photo.

    Raises DataError for bad inputs, and if more than `max_rejected` of the shard was rejected; phrases and
    rejected rows are written even then, so that one can look.
    """
    photos = read_rows(raw, RAW)
    names = [row["id"] for row in photos]
    captioned = by_id(read_rows(captions, CAPTION), names, captions)
    segmented = by_id(read_rows(segments, SEGMENT), names, segments)
    aligner = Aligner.load(config)
    kept: list[Row] = []
    refused: list[Row] = []
    named = {name: aligner.phrases(captioned[name]) for name in names}
    for row in tqdm(photos, desc=f"align {Path(raw).stem}", unit="image"):
        try:
            found = captioned[row["id"]], segmented[row["id"]], named[row["id"]]
            kept.append(aligner(split, row, *found))
        except Rejected as why:
            refused.append({"id": row["id"], "reason": why.reason, "detail": why.detail})
    write_rows(phrases, named.values(), PHRASES)
    write_rows(rejected, refused, REJECTED)
    check_rejected(raw, photos, refused, config)
    write_rows(records, kept, RECORD)
