"""From annotations to records: right person, right word, and an account of everything that was left out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from moa.data import align
from moa.data.align import (
    AlignConfig,
    Aligner,
    ClipScorer,
    SentenceSimilarity,
    match,
    no_scores,
    one_to_one,
    order_equals,
)
from moa.data.errors import REASONS, DataError
from moa.data.parser import PHRASES
from moa.data.phrases import person_phrases
from moa.data.records import (
    CAPTION,
    RAW,
    RECORD,
    REJECTED,
    SEGMENT,
    decode_mask,
    encode_image,
    encode_mask,
    read_rows,
    sha256,
    write_rows,
)
from moa.hashing import model_hash
from moa.methods import ModelSource

MODEL = {"model": "m", "revision": "r", "settings": "{}"}


@pytest.fixture
def config(tokenizer) -> AlignConfig:
    return AlignConfig(tokenizer, tokenizer_subfolder="", phrases="lexicon", max_rejected=1.0)


def shard(
    folder, cases: list[tuple[str | None, list[tuple[int, int]]]], problem: str | None = None, width: int = 20
) -> list:
    """Write a shard of photos 20 pixels high: each case is a caption and the columns of its segments."""
    raw, captions, segments = [], [], []
    for number, (caption, columns) in enumerate(cases):
        mask, name = np.zeros((20, width), np.int32), f"p{number}"
        for k, (start, stop) in enumerate(columns, start=1):
            mask[:, start:stop] = k
        found = [
            {"segment_id": k, "label": "person", "score": 0.9, "bbox": [a, 0, b, 20], "area": 20 * (b - a)}
            for k, (a, b) in enumerate(columns, start=1)
        ]
        image = encode_image(np.full((20, width, 3), number, np.uint8))
        size = {"sha256": sha256(image["bytes"]), "width": width, "height": 20, "source": "test"}
        raw.append({"id": name, "image": image, **size})
        silent = None if caption else "empty_caption: the model said nothing"
        captions.append({"id": name, "caption": caption, "problem": silent, **MODEL})
        segments.append(
            {"id": name, "mask": encode_mask(mask), "segments": found, "problem": problem, **MODEL}
        )
    kinds = "raw", "captions", "segments", "records", "rejected", "phrases"
    paths = [folder / f"{kind}.parquet" for kind in kinds]
    for path, rows, schema in zip(paths, (raw, captions, segments), (RAW, CAPTION, SEGMENT), strict=False):
        write_rows(path, rows, schema)
    return paths


def outcome(config, folder, caption, columns, problem=None, width=20) -> str:
    """The reason for which a single photo is rejected, or "kept"."""
    paths = shard(folder, [(caption, columns)], problem, width)
    align.run(config, "train", *paths)
    rejected = read_rows(paths[4], REJECTED)
    assert len(rejected) + len(read_rows(paths[3], RECORD)) == 1
    return rejected[0]["reason"] if rejected else "kept"


HALVES = [(0, 9), (11, 20)]


@pytest.mark.parametrize(
    ("caption", "columns", "reason"),
    [
        ("a man in a hat", [(2, 18)], "kept"),
        ("a man and a woman", HALVES, "kept"),
        ("two men", HALVES, "kept"),
        (None, [(2, 18)], "empty_caption"),
        ("a hat on a wall", [(2, 18)], "no_person_word"),
        ("a group of people", HALVES, "plural"),
        ("a man in a hat", [], "no_segment"),
        ("a man in a hat", [(0, 1)], "too_small"),
        ("a man in a hat", HALVES, "count_mismatch"),
        ("a man and a woman", [(2, 18)], "count_mismatch"),
        ("a man", [(i, i + 2) for i in range(0, 20, 4)], "too_many"),
        ("a man " + "with a red hat and " * 30, [(2, 18)], "truncated"),
    ],
)
def test_every_photo_is_kept_or_rejected_with_its_reason(config, tmp_path, caption, columns, reason):
    assert outcome(replace(config, min_area=0.1), tmp_path, caption, columns) == reason
    assert reason in {*REASONS, "kept"}


@pytest.mark.parametrize(
    ("columns", "reason"), [((0, 10), "outside"), ((0, 11), "kept"), ((30, 40), "outside")]
)
def test_a_person_whom_training_would_not_see_is_rejected(config, tmp_path, columns, reason):
    assert outcome(config, tmp_path, "a man", [columns], width=40) == reason


def test_a_photo_that_could_not_be_read_is_rejected_as_such(config, tmp_path):
    assert outcome(config, tmp_path, "a man", [(2, 18)], "broken_image: no image bytes") == "broken_image"


def test_plurals_may_be_rejected_instead(config, tmp_path):
    assert outcome(replace(config, plurals="reject"), tmp_path, "two men", HALVES) == "plural"


def test_small_people_in_the_background_do_not_count(config, tmp_path):
    assert outcome(replace(config, min_area=0.2), tmp_path, "a man", [(0, 15), (18, 19)]) == "kept"


def test_records_are_true_to_their_inputs(config, rendered, annotated, tmp_path):
    """With faultless annotators nothing is lost, and offsets, ids, boxes and images fit each other."""
    paths = [
        annotated.raw,
        annotated.captions,
        annotated.segments,
        tmp_path / "r.parquet",
        tmp_path / "x.parquet",
        tmp_path / "p.parquet",
    ]
    align.run(replace(config, min_area=0.0), "train", *paths)
    records, raw = read_rows(paths[3], RECORD), {row["id"]: row for row in read_rows(paths[0], RAW)}
    assert len(records) == len(raw)
    assert read_rows(paths[4], REJECTED) == []
    for record in records:
        mask, caption = decode_mask(record["mask"]), record["caption"]
        assert record["image"] == raw[record["id"]]["image"]
        assert mask.shape == (record["height"], record["width"])
        assert set(np.unique(mask)) - {0} == {s["segment_id"] for s in record["segments"]}
        for subject in record["segments"]:
            word = caption[subject["end"] - len(subject["word"]) : subject["end"]]
            assert word == subject["word"] in ("man", "woman", "person")
            assert caption[subject["start"] : subject["end"]] == f"a {word}"


def test_only_matched_people_stay_in_the_mask(config, tmp_path):
    """The loss is masked: a bystander in the mask would be trained as part of the subject."""
    paths = shard(tmp_path, [("a man", [(0, 15), (18, 19)])])
    align.run(replace(config, min_area=0.2), "train", *paths)
    assert set(np.unique(decode_mask(read_rows(paths[3], RECORD)[0]["mask"]))) == {0, 1}


@pytest.mark.parametrize("kind", ["lexicon", "auto"])
def test_every_photo_s_phrases_say_who_found_them(config, tmp_path, kind):
    """Whether a record comes of it or not; and records follow the finder that was asked for."""
    pipeline = ""
    if kind == "auto":
        spacy = pytest.importorskip("spacy", reason="spaCy is not installed: `pip install spacy`")
        if not spacy.Language.has_factory("first_noun"):
            spacy.Language.component("first_noun", func=first_noun)
        nlp = spacy.blank("en", meta={"name": "first", "version": "7"})
        nlp.add_pipe("first_noun")
        nlp.to_disk(tmp_path / "pipeline")
        pipeline = str(tmp_path / "pipeline")
    cases = [("a man with a man's hat", [(2, 18)]), ("two men", HALVES), ("a hat", [(2, 18)]), (None, HALVES)]
    paths = shard(tmp_path, cases)
    align.run(replace(config, phrases=kind, spacy=pipeline), "train", *paths)
    rows = read_rows(paths[5], PHRASES)
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    model = "lexicon" if kind == "lexicon" else "en_first"
    assert {row["model"] for row in rows} == {model}
    assert {row["revision"] for row in rows} == {align.finder(kind, pipeline).revision}
    assert [row["caption"] for row in rows[:2]] == ["a man with a man's hat", "a man and a man"]
    problems = [(row["problem"] or "").partition(":")[0] for row in rows]
    assert problems == ["", "", "no_person_word", "empty_caption"]
    assert [len(row["phrases"]) for row in rows] == [1, 2 if kind == "lexicon" else 1, 0, 0]
    kept = {row["id"]: row for row in read_rows(paths[3], RECORD)}
    assert list(kept) == (["p0", "p1"] if kind == "lexicon" else ["p0"])  # the parser named one of two
    said = [{key: s[key] for key in ("word", "start", "end")} for s in kept["p0"]["segments"]]
    assert said == rows[0]["phrases"] == [{"word": "man", "start": 0, "end": 5}]


def test_every_photo_s_phrases_say_which_models_decided(config, clip, sentences, tokenizer, tmp_path):
    """Folders by the hash of their weights, which changes with them; the tokenizer by what it does."""
    paths = shard(tmp_path, [("a man", [(2, 18)]), (None, HALVES)])

    def recorded(config):
        align.run(config, "train", *paths)
        first, second = (row["models"] for row in read_rows(paths[5], PHRASES))
        assert first == second
        return {used["role"]: (used["model"], used["revision"]) for used in first}

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer.id, folder)
    few, all_of_them = (
        replace(config, tokenizer=ModelSource(str(folder))),
        replace(config, matcher="clip", clip=clip, label_model=sentences),
    )
    assert recorded(few).keys() == {"tokenizer"}
    found = recorded(all_of_them)
    assert found["clip"] == (clip.id, f"sha256:{model_hash(Path(clip.id))[:16]}")
    assert found["label_model"] == (sentences.id, f"sha256:{model_hash(Path(sentences.id))[:16]}")
    assert found["tokenizer"] == (tokenizer.id, recorded(few)["tokenizer"][1])

    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["moustache"])
    words.save_pretrained(folder)
    assert recorded(few)["tokenizer"][1] != found["tokenizer"][1]


def first_noun(doc):
    """A parser that knows one noun phrase: the first two words."""
    for token in doc:
        token.pos_, token.dep_, token.head = "X", "dep", doc[min(1, len(doc) - 1)]
    doc[-1 if len(doc) < 2 else 1].pos_ = "NOUN"
    doc[-1 if len(doc) < 2 else 1].dep_ = "ROOT"
    doc[0].dep_ = "det" if len(doc) > 1 else "ROOT"
    return doc


def test_a_rotten_shard_is_an_error_that_counts_the_reasons(config, tmp_path):
    paths = shard(tmp_path, [("a hat", [(2, 18)]), ("a man", [(2, 18)]), ("a hat", [(2, 18)])])
    with pytest.raises(DataError, match=r"2 of 3 photos were rejected .*no_person_word.*max_rejected 0\.5"):
        align.run(replace(config, max_rejected=0.5), "train", *paths)
    assert len(read_rows(paths[4], REJECTED)) == 2
    assert not paths[3].exists()


def test_annotations_of_other_photos_are_refused(config, tmp_path):
    """A stale caption shard beside a new raw shard would put words to the wrong pictures."""
    paths = shard(tmp_path, [("a man", [(2, 18)])])
    rows = read_rows(paths[1], CAPTION)
    write_rows(paths[1], [rows[0] | {"id": "other"}], CAPTION)
    with pytest.raises(DataError, match=r"captions\.parquet is not about the photos"):
        align.run(config, "train", *paths)


# --- Matching ---------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_pair_first_and_nobody_twice():
    assert one_to_one(np.array([[0.9, 0.8], [0.95, 0.1]])) == [1, 0]
    assert one_to_one(np.array([[0.2, 0.1, 0.9]])) == [2]
    with pytest.raises(DataError, match="one to one"):
        one_to_one(np.ones((2, 1)))


def test_greedy_is_one_to_one_for_any_scores():
    rng = np.random.default_rng(0)
    for _ in range(200):
        phrases = int(rng.integers(1, 5))
        scores = rng.integers(0, 3, (phrases, phrases + int(rng.integers(3)))).astype(float)
        chosen = one_to_one(scores)
        assert len(set(chosen)) == phrases
        best = np.argwhere(scores == scores.max())
        assert any(chosen[i] == j for i, j in best), "the best pair must be taken"


def extras(config, clip) -> AlignConfig:
    return replace(config, matcher="clip", clip=clip, extra_segments="ignore", max_subjects=2)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_people_beside_the_named_ones_may_be_ignored(best, config, clip, tmp_path, monkeypatch):
    """One man is named and three people are found: CLIP's favourite is he, the others leave the mask."""
    paths = shard(tmp_path, [("a man", [(0, 8), (8, 14), (14, 20)])])

    def favour(scorer, photo, texts, segments):
        return np.array([[0.9 if i == best else 0.5 for i in range(3)] for _ in texts])

    monkeypatch.setattr(ClipScorer, "__call__", favour)
    align.run(extras(config, clip), "train", *paths)
    (record,) = read_rows(paths[3], RECORD)
    assert [s["segment_id"] for s in record["segments"]] == [best + 1]
    assert set(np.unique(decode_mask(record["mask"]))) == {0, best + 1}


@pytest.mark.parametrize(
    ("caption", "columns", "width", "reason"),
    [
        ("a man", HALVES, 20, "kept"),
        ("a man and a woman", [(0, 6), (7, 13), (14, 20)], 20, "kept"),
        ("a man and a woman", [(2, 18)], 20, "count_mismatch"),
        ("a man, a woman and a boy", [(0, 6), (7, 13), (14, 20)], 20, "too_many"),
        ("a man", [(0, 9), (31, 40)], 40, "outside"),
    ],
)
def test_ignoring_extra_people_excuses_nothing_else(config, clip, tmp_path, caption, columns, width, reason):
    assert outcome(extras(config, clip), tmp_path, caption, columns, width=width) == reason


def test_only_clip_tells_who_is_named(config):
    with pytest.raises(ValueError, match="extra_segments 'ignore' needs matcher 'clip'"):
        replace(config, extra_segments="ignore")


def test_equal_scores_go_from_left_to_right():
    assert one_to_one(np.ones((3, 3))) == [0, 1, 2]
    assert order_equals([2, 0, 1], ["a man", "a man", "a woman"]) == [0, 2, 1]


def people_and_segments():
    caption = "a man in red and a woman in blue"
    segments = [
        {"segment_id": k, "label": "person", "score": 1.0, "bbox": [x, 0, x + 9, 20], "area": 180}
        for k, x in ((1, 0), (2, 11))
    ]
    return caption, person_phrases(caption), segments


def test_the_scorer_decides_between_different_words():
    caption, people, segments = people_and_segments()

    def crosswise(photo, texts, found):
        return np.array([[0.1, 0.9], [0.8, 0.2]])

    photo = Image.new("RGB", (20, 20))
    assert [s["segment_id"] for s in match(photo, caption, people, segments, crosswise, True)] == [2, 1]
    assert [s["segment_id"] for s in match(photo, caption, people, segments, no_scores, True)] == [1, 2]


def test_one_person_of_one_photo_is_not_judged():
    """There is nothing to choose, and CLIP takes seconds on a CPU."""
    caption = "a man in red"

    def judge(photo, texts, found):
        raise AssertionError("asked for a score that decides nothing")

    [person], [segment] = person_phrases(caption), people_and_segments()[2][:1]
    assert match(Image.new("RGB", (20, 20)), caption, [person], [segment], judge, True, judge) == [segment]


def test_clip_alone_follows_the_device(clip, tokenizer):
    """Without it a job needs no GPU, and must not look for one on a machine that has none."""
    config = AlignConfig(tokenizer, "", matcher="clip", clip=clip, device="meta")
    assert Aligner.load(config).scorer.model.device.type == "meta"
    assert replace(config, matcher="label").device == "cpu"


def test_clip_scores_are_cosines_of_crops_and_clauses(clip, tokenizer):
    """Against CLIP's own logits: the same scores up to its temperature."""
    caption, people, segments = people_and_segments()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    scorer = ClipScorer(clip)
    texts = ["a man in red", "a woman in blue"]
    scores = scorer(photo, texts, segments)
    crops = [photo.crop(s["bbox"]) for s in segments]
    inputs = scorer.processor(text=texts, images=crops, return_tensors="pt", padding=True)
    logits = scorer.model(**inputs).logits_per_text.detach().numpy() / np.exp(scorer.model.logit_scale.item())
    np.testing.assert_allclose(2 * scores - 1, logits, atol=1e-5)
    config = AlignConfig(tokenizer, "", matcher="clip", clip=clip)
    chosen = match(photo, caption, people, segments, Aligner.load(config).scorer, True)
    assert sorted(s["segment_id"] for s in chosen) == [1, 2]


@pytest.fixture(scope="module")
def sentences(tokenizer, tmp_path_factory) -> ModelSource:
    """A random sentence encoder with the miniature's tokenizer, padded at the end."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer.id)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("sentences")
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **size)).save_pretrained(folder)
    words.save_pretrained(folder)
    return ModelSource(str(folder))


def test_label_similarity_is_the_cosine_of_mean_states(sentences):
    """By hand, one text at a time: padding must not count."""
    similarity = SentenceSimilarity(sentences)
    texts, labels = ["a man", "a smiling young woman"], ["person", "sports ball"]

    def vector(text):
        inputs = similarity.tokenizer(text, return_tensors="pt")
        return similarity.model(**inputs).last_hidden_state[0].mean(0).detach().double().numpy()

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = [[(1 + cosine(vector(t), vector(k))) / 2 for k in labels] for t in texts]
    found = similarity(texts, [], labels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.01


@pytest.mark.parametrize("encoder", [False, True])
def test_a_match_is_the_greedy_choice_of_clip_times_label_similarity(encoder, clip, sentences, tokenizer):
    """Against brute force: of all pairs left the one with the largest product, until no phrase is left."""
    config = AlignConfig(tokenizer, "", phrases="lexicon", matcher="clip", clip=clip, clip_text="phrase")
    aligner = Aligner.load(replace(config, label_model=sentences if encoder else None))
    caption = "a man and an old woman with a young boy"
    people, seen = person_phrases(caption), set()
    named = [caption[p.start : p.end] for p in people]
    labels = ["person", "dog", "person", "person", "person"]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        photo = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
        segments = [
            {"segment_id": k, "label": label, "bbox": [10 * k, k, 10 * k + 10 + seed, 30]}
            for k, label in enumerate(labels)
        ]
        product = aligner.scorer(photo, named, segments) * aligner.similarity(named, people, labels)
        pairs = {(i, j): product[i, j] for i in range(3) for j in range(5)}
        expected = {}
        while len(expected) < 3:
            i, j = max(pairs, key=pairs.get)
            expected[i] = j
            pairs = {pair: score for pair, score in pairs.items() if pair[0] != i and pair[1] != j}
        chosen = match(photo, caption, people, segments, aligner.scorer, False, aligner.similarity)
        assert [s["segment_id"] for s in chosen] == [expected[i] for i in range(3)]
        assert encoder or 1 not in expected.values(), "a dog is nobody"
        seen.add(tuple(expected.values()))
    assert len(seen) > 1, "the photo must matter"


def test_a_label_model_that_is_not_there_names_its_key(config, tmp_path):
    with pytest.raises(DataError, match=r"data\.align\.label_model: .*nowhere.*cannot be loaded"):
        Aligner.load(replace(config, label_model=ModelSource(str(tmp_path / "nowhere"))))


def test_the_clip_matcher_needs_a_model(tokenizer):
    with pytest.raises(ValueError, match="needs the key `clip`"):
        AlignConfig(tokenizer, matcher="clip")


def test_a_missing_tokenizer_names_the_key(config, tmp_path):
    paths = shard(tmp_path, [("a man", [(2, 18)])])
    with pytest.raises(DataError, match=r"models\.prior.*cannot be loaded"):
        align.run(replace(config, tokenizer_subfolder="nowhere"), "train", *paths)
